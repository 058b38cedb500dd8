"""What ends a run of several processes: one message, all end at once, and nothing is lost."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_programs import TOKENS, WINDOWS, resume, run
from ranks import new_store, run_ranks, start_ranks
from training_runs import losses, metrics, tiny_flags, write_tokens

from fastlm.checkpoint import checkpoint_files, iteration_of, read_checkpoint

RUN = dict(total_steps=12, ckpt_every=4, tokens_per_step=TOKENS, batch_size=WINDOWS // 2)
# A machine that is busy with other things needs some; a rank that waits for another one needs
# ten minutes, the collectives' own limit.
SECONDS = 60


@pytest.fixture(scope="module")
def undisturbed(directory):
    run(2, directory, "undisturbed", **RUN)
    return directory / "undisturbed"


def failed(directory, target, plan, *, size=2, env=None, both=False, store=None, **settings):
    """(exit codes, all that the ranks wrote to stderr, or to `both` streams)."""
    argv = [json.dumps(plan), *tiny_flags(target_dir=target, **{**RUN, **settings})]
    begin = time.monotonic()
    results = run_ranks(
        size, argv, directory, call="rank_programs:train", timeout=SECONDS, env=env, store=store
    )
    assert time.monotonic() - begin < SECONDS
    return [r.returncode for r in results], "".join(r.output if both else r.stderr for r in results)


def messages(stderr):
    """Errors that somebody reads: lines of the command's, and tracebacks by their last line."""
    lines = stderr.splitlines()
    tracebacks = stderr.count("Traceback (most recent call last)")
    chained = stderr.count("The above exception was the direct cause") + stderr.count(
        "During handling of the above exception"
    )
    return [line for line in lines if line.startswith("error:")] + ["traceback"] * (
        tracebacks - chained
    )


PARALLEL = pytest.mark.parametrize("parallel", ["ddp", "fsdp"])


@PARALLEL
def test_a_bad_label_on_one_rank(directory, parallel):
    plan = {"rank": 1, "what": "label", "step": 5}
    codes, stderr = failed(directory, f"label-{parallel}", plan, parallel=parallel)
    assert codes == [1, 1], stderr
    assert messages(stderr) == ["traceback"], stderr
    assert "ValueError" in stderr and "1000" in stderr


def test_a_data_file_missing_on_one_rank(directory):
    plan = {"rank": 1, "what": "elsewhere"}
    codes, stderr = failed(directory, "missing", plan)
    assert codes == [2, 2], stderr
    (message,) = messages(stderr)
    assert "train.npy" in message
    assert not (directory / "missing").exists()


def test_a_token_id_out_of_range(directory):
    codes, stderr = failed(directory, "ids", {}, vocab_size=60)
    assert codes == [2, 2], stderr
    (message,) = messages(stderr)
    assert "vocabulary of 60" in message
    assert not (directory / "ids").exists()


def test_another_configuration_on_one_rank(directory):
    """The command's rank 0 reads the settings for all. train_loop says what differs."""
    results = run_ranks(2, ["{}"], directory, call="rank_programs:train_unlike", timeout=SECONDS)
    assert [r.returncode for r in results] == [2, 2], results
    (message,) = messages("".join(r.stderr for r in results))
    assert message == (
        "error: total_steps=13 on rank 1 and 12 on rank 0: all processes must be given the same"
    )


def test_restarts_need_a_name(directory):
    env = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    argv = [json.dumps({}), *tiny_flags(target_dir=None)]
    results = run_ranks(2, argv, directory, call="rank_programs:train", env=env)
    assert [r.returncode for r in results] == [2, 2]
    (message,) = messages("".join(r.stderr for r in results))
    assert "--max-restarts" in message and "--target-dir" in message


def test_overwrite_is_no_flag_of_restarts(directory):
    env = {"TORCHELASTIC_MAX_RESTARTS": "3"}
    codes, stderr = failed(directory, "restarts", {}, env=env, overwrite=True)
    assert codes == [2, 2]
    (message,) = messages(stderr)
    assert "--overwrite with torchrun --max-restarts" in message


# Signals

SIGNALS = [("SIGTERM", 143, "ddp"), ("SIGTERM", 143, "fsdp"), ("SIGINT", 130, "fsdp")]
SIGNALS += [("SIGUSR1", 0, "ddp"), ("SIGINT", 130, "ddp"), ("SIGUSR1", 0, "fsdp")]


@pytest.mark.parametrize(
    ("name", "code", "parallel"),
    [
        pytest.param(*case, marks=() if i in (1, 3) else pytest.mark.exhaustive)
        for i, case in enumerate(SIGNALS)
    ],
)
def test_a_signal_to_one_rank(directory, undisturbed, name, code, parallel):
    """All save together, and end as it does; the run goes on to the undisturbed one's end."""
    target = f"{name}-{parallel}"
    plan = {"rank": 1, "what": "signal", "signal": name, "step": 5}
    codes, stderr = failed(directory, target, plan, parallel=parallel)
    assert codes == [code] * 2, stderr
    assert messages(stderr) == []
    assert "stopping" not in stderr  # rank 0 tells what all do
    suffix = "dcp" if parallel == "fsdp" else "pt"
    # The vote of a step has begun before it.
    saved = {path.name for path in (directory / target / "checkpoints").iterdir()}
    assert saved == {f"checkpoint_4.{suffix}", f"checkpoint_7.{suffix}"}
    results = resume(2, directory, target)
    assert "at step 7" in results[0].stdout
    assert_equal(directory / target, undisturbed)


@pytest.mark.parametrize(
    ("name", "code"),
    [("SIGINT", 130), pytest.param("SIGUSR1", 0, marks=pytest.mark.exhaustive)],
)
def test_a_signal_before_the_first_step(directory, name, code):
    plan = {"rank": 1, "what": "signal before", "signal": name}
    codes, stderr = failed(directory, f"early-{name}", plan)
    assert codes == [code] * 2, stderr
    assert messages(stderr) == []
    assert not (directory / f"early-{name}").exists()


def assert_equal(target, undisturbed):
    """Up to rounding: FSDP2 sums in another order than DDP."""
    ours, theirs = losses(target), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(abs(ours[step] / theirs[step] - 1) <= 1e-5 for step in theirs)
    ours, theirs = (metrics(place, "summary")[-1]["val_loss"] for place in (target, undisturbed))
    assert abs(ours / theirs - 1) <= 1e-5


# Disks


@PARALLEL
def test_a_full_disk(directory, undisturbed, parallel):
    """Of a rank that writes: 0 for ddp, 1 for fsdp. The run goes on and says so once."""
    rank = 0 if parallel == "ddp" else 1
    plan = {"rank": rank, "what": "full disk", "bytes": 20_000}
    target = f"full-{parallel}"
    codes, told = failed(directory, target, plan, parallel=parallel, both=True)
    assert codes == [1, 0], told
    (line,) = [line for line in told.splitlines() if line.startswith("[train] missing")]
    assert f"checkpoint_final.{'dcp' if parallel == 'fsdp' else 'pt'}" in line
    assert "Traceback" not in told
    assert told.count("[CKPT] FAILED") == (4 if parallel == "ddp" else 3)
    ours, theirs = losses(directory / target), losses(undisturbed)
    assert ours.keys() == theirs.keys()
    kept = [path.name for path in (directory / target / "checkpoints").iterdir()]
    assert kept == ([] if parallel == "ddp" else ["checkpoint_model.pt"])


# Killed


@pytest.mark.parametrize(
    ("parallel", "dead"),
    [
        ("ddp", 1),
        ("fsdp", 0),
        pytest.param("ddp", 0, marks=pytest.mark.exhaustive),
        pytest.param("fsdp", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_that_is_killed_in_mid_step(directory, undisturbed, parallel, dead):
    """The other ends within seconds and says why; what torchrun starts again goes on."""
    target = f"killed-{parallel}-{dead}"
    plan = {"rank": dead, "what": "kill", "step": 6}
    env, store = {"TORCHELASTIC_MAX_RESTARTS": "1"}, new_store()
    codes, stderr = failed(directory, target, plan, parallel=parallel, env=env, store=store)
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == 2, (codes, stderr)
    (message,) = messages(stderr)
    assert message.startswith(f"error: rank {1 - dead} of 2: another process has ended without a")
    env["TORCHELASTIC_RESTART_COUNT"] = "1"
    codes, stderr = failed(directory, target, plan, parallel=parallel, env=env, store=store)
    assert codes == [0, 0], stderr
    assert_equal(directory / target, undisturbed)


def test_started_again_by_torchrun_another_run_is_not_gone_on_with(directory, undisturbed):
    """The first attempt has refused to write into another run's directory."""
    env = {"TORCHELASTIC_MAX_RESTARTS": "1"}
    for count in ("0", "1"):
        env["TORCHELASTIC_RESTART_COUNT"] = count
        codes, stderr = failed(directory, "undisturbed", {}, env=env, lr_max=0.01)
        assert codes == [2, 2], stderr
        assert "holds the checkpoints of another run" in stderr


@pytest.mark.exhaustive
def test_torchrun_starts_killed_ranks_again(tmp_path):
    from killed_ranks import assert_equal_runs, killed_run, undisturbed_run

    for parallel in ("ddp", "fsdp"):
        expected = undisturbed_run(tmp_path, parallel)
        faults = [
            {"rank": 1, "what": "kill", "step": 7},
            {"rank": 0, "what": "operation", "kind": "rename", "number": 1},
        ]
        killed, directory = killed_run(tmp_path, parallel, faults)
        assert killed == 2
        assert_equal_runs(directory, expected)


def test_ranks_that_are_killed_leave_nobody_waiting(directory):
    """From outside, at some moment of the start or of the steps."""
    argv = [json.dumps({}), *tiny_flags(target_dir="outside", total_steps=100_000, log_every=10)]
    ranks = start_ranks(3, argv, directory, call="rank_programs:train")
    ranks.commands[0].until(r"\[train\] step 20/")
    ranks.commands[2].signal(signal.SIGKILL)
    results = ranks.wait(SECONDS)
    codes = [r.returncode for r in results]
    assert codes == [2, 2, -signal.SIGKILL], [r.stderr for r in results]
    # Both have lost a connection at the same moment; who says it first tells for both.
    assert len(messages("".join(r.stderr for r in results))) == 1


@pytest.mark.exhaustive
@PARALLEL
@pytest.mark.parametrize("whom", ["torchrun", "all", "rank 0"])
def test_sigterm_under_torchrun(tmp_path, parallel, whom):
    """Which passes it on: the second one that a process gets says nothing new."""
    write_tokens(tmp_path)
    flags = tiny_flags(total_steps=100_000, log_every=1, parallel=parallel, d_model=256, d_ff=2048)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "fastlm.train", *flags]
    log = tmp_path / "out.txt"
    with log.open("w") as out:
        agent = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + SECONDS
    while "step 5/" not in log.read_text():
        assert time.monotonic() < deadline and agent.poll() is None, log.read_text()
        time.sleep(0.01)
    pids = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    ranks = {int(rank_of(pid)): int(pid) for pid in pids if rank_of(pid) is not None}
    if whom != "torchrun":
        for rank in (0, 1) if whom == "all" else (0,):
            os.kill(ranks[rank], signal.SIGTERM)
    if whom != "rank 0":
        agent.send_signal(signal.SIGTERM)
    agent.wait(SECONDS)
    said = log.read_text()
    assert said.count("stopping: a checkpoint follows") == 1 and "at once" not in said, said
    assert "[train] stopped after" in said and "continue with: torchrun" in said, said
    (saved,) = checkpoint_files(tmp_path / "run" / "checkpoints")
    assert iteration_of(read_checkpoint(saved)) > 5
    assert not (tmp_path / "run" / "checkpoints" / "run.lock").exists()


def rank_of(pid: str) -> str | None:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    found = [line.split(b"=")[1].decode() for line in environment if line.startswith(b"RANK=")]
    return found[0] if found else None
