"""World: ranks agree, and end together whichever of them fails (world_programs.py)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from fastlm.errors import ConfigError, Elsewhere, RankLostError, UserError, exit_code, run_command
from fastlm.parallel.world import World

PROGRAM = "world_programs:main"
SOON = 15  # seconds, on a busy machine; collectives would wait for two minutes


def run(size, tmp_path, *argv, **options):
    """The ranks' results; none may take long."""
    start = time.monotonic()
    results = run_ranks(size, list(argv), tmp_path, call=PROGRAM, timeout=SOON, **options)
    assert time.monotonic() - start < 2 * SOON
    return results


def test_ranks_agree(tmp_path):
    env = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for result in run(3, tmp_path, "agreement", env=env):
        assert (result.returncode, result.output) == (0, "restarts 2 of 3\n"), result.output


def test_a_restart_reads_nothing_of_the_start_before(tmp_path):
    """torchrun's store outlives the ranks, and holds the addresses and the failure of dead ones."""
    first = start_ranks(2, ["fail_in_step", "0", "error"], tmp_path, call=PROGRAM)
    assert [r.returncode for r in first.wait(SOON)] == [2, 2]
    for late in ("0", "1"):
        for result in run(2, tmp_path, "restarted", late, store=first.store):
            assert (result.returncode, result.output) == (0, "together\n"), result.output


def test_a_programs_own_process_group_is_used_and_left(tmp_path):
    for result in run(2, tmp_path, "own_group"):
        assert (result.returncode, result.output) == (0, ""), result.output


def assert_one_message(results, rank, message, code=2):
    """`rank` alone says something, and all end with the same code."""
    assert [r.returncode for r in results] == [code] * len(results), [r.output for r in results]
    for number, result in enumerate(results):
        stderr = result.stderr
        if number == rank:
            assert re.fullmatch(message, stderr), stderr
        else:
            assert stderr == "", f"rank {number}: {stderr}"


def test_rank_0_fails_to_decide(tmp_path):
    results = run(3, tmp_path, "fail_in_decide")
    assert_one_message(results, 0, "error: train.bin is missing on rank 0\n")


def test_a_decision_that_cannot_be_sent(tmp_path):
    """A bug of ours: rank 0 shows it, and the others do not wait for it."""
    results = run(2, tmp_path, "unpicklable_decision")
    assert [r.returncode for r in results] == [1, 1]
    assert "pickle" in results[0].stderr and results[1].stderr == ""


def test_rank_0_is_told_to_stop_in_a_decision(tmp_path):
    assert_one_message(run(2, tmp_path, "leave_in_decide"), 0, "", code=143)


@pytest.mark.parametrize("ranks", [("1",), ("2", "1"), ("0", "1", "2")], ids=",".join)
def test_the_lowest_rank_that_fails_speaks(tmp_path, ranks):
    """A data file that is missing on rank 1: one message, no hang."""
    first = min(ranks)
    results = run(3, tmp_path, "fail_together", *ranks)
    assert_one_message(results, int(first), f"error: train.bin is missing on rank {first}\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_mid_step(tmp_path, rank):
    """With collectives under way, which gloo cannot cancel."""
    results = run(3, tmp_path, "fail_in_step", str(rank), "error")
    assert_one_message(results, rank, "error: label 99 at position 7 is out of range\n")


@pytest.mark.parametrize("ranks", [("1",), ("0", "1")], ids=",".join)
def test_an_error_before_the_ranks_are_connected(tmp_path, ranks):
    """All have the same wrong flag: one of them says so. One has it: torchrun ends the others."""
    started = start_ranks(2, ["fail_to_start", *ranks], tmp_path, call=PROGRAM)
    failed = [started.commands[int(rank)].wait(SOON) for rank in ranks]
    for command in started.commands[: 2 - len(ranks)]:
        command.signal(signal.SIGTERM)
        assert command.wait(SOON).returncode == -signal.SIGTERM
    assert [r.returncode for r in failed] == [2] * len(ranks)
    assert sorted(r.stderr for r in failed)[:-1] == [""] * (len(ranks) - 1)
    assert "".join(r.stderr for r in failed) == "error: train.bin is missing on the command line\n"


def test_an_error_before_backward(tmp_path):
    results = run(2, tmp_path, "fail_in_backward", "1")
    assert_one_message(results, 1, "error: train.bin is missing on rank 1\n")


def test_a_bug_on_one_rank(tmp_path):
    results = run(2, tmp_path, "fail_in_step", "1", "bug")
    assert [r.returncode for r in results] == [1, 1]
    assert "ZeroDivisionError: a bug" in results[1].stderr and results[0].stderr == ""


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank(tmp_path, rank):
    """One of the others says so."""
    results = run(3, tmp_path, "fail_in_step", str(rank), "kill")
    assert [r.returncode for r in results] == [-9 if n == rank else 2 for n in range(3)]
    (message,) = [r.stderr for n, r in enumerate(results) if n != rank and r.stderr]
    assert re.fullmatch(
        r"error: rank \d of 3: another process has ended without a message: killed, or its "
        r"machine is gone; --resume continues from the newest checkpoint "
        r"\([^/]*Connection (closed|reset) by peer[^/]*\)\n",
        message,
    ), message


def test_the_store_ends_with_rank_0(tmp_path):
    """As without torchrun, where rank 0 keeps it: its own message, and a line of each other."""
    results = run(2, tmp_path, "fail_in_step", "0", "error", own_store=True)
    assert [r.returncode for r in results] == [2, 2], [r.output for r in results]
    assert results[0].stderr == "error: label 99 at position 7 is out of range\n"
    last = results[1].stderr.splitlines()[-1]  # behind torch's own warnings
    assert last.startswith("error: rank 1 of 2: another process has ended"), results[1].stderr


def test_ctrl_c_on_one_rank(tmp_path):
    results = run(2, tmp_path, "fail_in_step", "1", "interrupt")
    assert results[1].returncode == 130 and results[1].stderr == ""
    assert results[0].returncode == 2 and "another process has ended" in results[0].stderr


def test_a_rank_that_hangs(tmp_path):
    ranks = start_ranks(2, ["hang", "1"], tmp_path, call=PROGRAM)
    result = ranks.commands[0].wait(SOON)
    ranks.commands[1].signal(9)
    assert result.returncode == 2
    assert "a collective has taken more than 0.03 minutes" in result.stderr
    assert "--resume continues from the newest checkpoint" in result.stderr
    ranks.commands[1].wait()


def test_a_decision_may_take_longer_than_a_collective(tmp_path):
    for result in run(2, tmp_path, "patience"):
        assert (result.returncode, result.output) == (0, ""), result.output


def test_a_rank_that_never_comes(tmp_path):
    env = {"WORLD_SIZE": "3"}
    for rank, result in enumerate(run(2, tmp_path, "lonely", env=env)):
        assert result.returncode == 2
        assert re.fullmatch(
            rf"error: rank {rank} of 3 finds no others at 127.0.0.1:\d+ within 0.02 minutes: start "
            rf"all of them with torchrun, at the same time \(.*\)",
            result.stderr.splitlines()[-1],  # behind torch's own warnings
        ), result.stderr


def torchrun(program, tmp_path, *argv, env=None, restarts=0):
    """The result of two ranks that run world_programs.py."""
    helpers = Path(__file__).resolve().parents[1] / "helpers"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(helpers / "world_programs.py"), program, *argv]
    return subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("set_by_user", [None, "1", "2"])
def test_threads_under_torchrun(tmp_path, set_by_user):
    """All cores are used, though torchrun sets OMP_NUM_THREADS=1, unless the user has set it."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if set_by_user:
        env["OMP_NUM_THREADS"] = set_by_user
    result = torchrun("threads_of_8_cores", tmp_path, env=env)
    found = re.findall(r"threads \d", result.stdout)  # they write at the same time
    assert found == [f"threads {set_by_user or 4}"] * 2, result.stdout + result.stderr


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "argv, message",
    [
        (("fail_in_step", "1", "error"), "error: label 99 at position 7 is out of range"),
        (("fail_in_step", "0", "error"), "error: label 99 at position 7 is out of range"),
        (("fail_together", "1"), "error: train.bin is missing on rank 1"),
        (("fail_to_start", "1"), "error: train.bin is missing on the command line"),
        (("fail_to_start", "0", "1"), "error: train.bin is missing on the command line"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_one_message_under_torchrun(tmp_path, argv, message):
    """Beside torchrun's own report."""
    start = time.monotonic()
    result = torchrun(argv[0], tmp_path, *argv[1:])
    assert result.returncode != 0 and time.monotonic() - start < 40
    assert [line for line in result.stderr.splitlines() if "error:" in line] == [message]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_starts_killed_ranks_again(tmp_path, rank):
    result = torchrun("killed_once", tmp_path, rank, restarts=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("['restart 1 of 2', 'restart 1 of 2']") == 2, result.stdout


# --- Without other processes ---


def test_a_world_of_one():
    for environment in ({}, {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}):
        with World(environment) as world:
            assert (world.rank, world.size, world.local_rank, world.is_main) == (0, 1, 0, True)
            assert world.device is None and world.device_name("auto") == "auto"
            assert world.decide(lambda: 3) == world.together(lambda: 3) == 3
            assert world.vote(1, 2).wait() == [1, 2]
            assert world.sum(torch.ones(1)).item() == 1
            assert world.gather("x") == ["x"] and world.new_cpu_group() is None
            world.barrier()
            error = ValueError()
            assert world.explain(error) is error
    assert not torch.distributed.is_initialized()
    with pytest.raises(ZeroDivisionError), World({}):
        _ = 1 / 0


TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"RANK": None}, "WORLD_SIZE is set in the environment and RANK is not: use torchrun"),
        ({"LOCAL_RANK": None}, "WORLD_SIZE is set in the environment and LOCAL_RANK is not"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE='four' in the environment is no number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0' in the environment is no number"),
        ({"RANK": "-1"}, "RANK='-1' in the environment is no number"),
    ],
)
def test_an_environment_that_is_not_torchruns(changes, message):
    environment = {k: v for k, v in (TORCHRUN | changes).items() if v is not None}
    with pytest.raises(ConfigError, match=re.escape(message)):
        World(environment)


def test_devices(monkeypatch):
    """As on a machine of two GPUs."""
    world = World(TORCHRUN)
    assert world.device_name("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert world.device_name("auto") == world.device_name("cuda") == "cuda:1"
    with pytest.raises(ConfigError, match=r"device='cuda:0' with 2 processes on this machine"):
        world.device_name("cuda:0")
    alone = World(TORCHRUN | {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert alone.device_name("cuda:1") == "cuda:1" and alone.device_name("cuda") == "cuda:0"
    with pytest.raises(ConfigError, match=r"4 processes on a machine of 2 GPU.*nproc-per-node 2"):
        World(TORCHRUN | {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2"}).device_name("auto")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    with pytest.raises(ConfigError, match="not mps: --device cpu"):
        world.device_name("auto")


def test_what_is_a_broken_collective():
    """Others keep their own message, whatever words they use."""
    world = World(TORCHRUN)
    world._store = torch.distributed.HashStore()
    error = RuntimeError("the data loader's worker timed out: connection reset")
    assert world.explain(error) is error and world.explain(error) is error
    other = World(TORCHRUN | {"RANK": "2"})
    other._store = world._store
    for mine in (ValueError("mine"), RuntimeError("[x/third_party/gloo/pair.cc:5] reset")):
        other._failed = False
        found = other.explain(mine)
        assert (type(found), found.rank, found.exit_code) == (Elsewhere, 3, 1)
        assert other.explain(found) is found
    stop = SystemExit(143)
    assert World(TORCHRUN).explain(stop) is stop
    for text in ("[1] is setting up NCCL communicator", "[../gloo/tcp/pair.cc:5] Timed out"):
        world = World(TORCHRUN)
        world._store = torch.distributed.HashStore()
        assert isinstance(world.explain(RuntimeError(text)), RankLostError)


def test_exit_codes(capsys):
    for error, code in (
        (Elsewhere(1, 143), 143), (RankLostError("x"), 2), (PermissionError(13, "no", "x"), 2),
        (KeyboardInterrupt(), 130),
    ):  # fmt: skip

        def command(error=error):
            raise error

        assert exit_code(error) == run_command(command) == code
        silent = isinstance(error, Elsewhere | KeyboardInterrupt)
        assert (capsys.readouterr().err == "") == silent
    assert exit_code(ValueError()) == 1 and exit_code(UserError()) == 2
    assert [exit_code(SystemExit(c)) for c in (None, 0, 129, "text")] == [0, 0, 129, 1]
