"""Where a run lives: a directory of its own, one writer, nothing overwritten or left behind."""

import errno
import fcntl
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import listing, losses, same, state, tiny_config, tiny_flags, write_tokens

from fastlm import OutputError
from fastlm.checkpoint import newest_readable
from fastlm.loop import Run
from fastlm.run.directory import RunDirectory
from fastlm.run.lock import LOCK, DirectoryLock
from fastlm.run.resume import Resumed
from fastlm.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


# --- a directory of its own ---


def test_twenty_runs_started_at_once_get_twenty_directories(tmp_path):
    cfg = tiny_config(tmp_path / "runs" / "demo-1")
    barrier, places = threading.Barrier(20), []

    def start():
        barrier.wait()
        with RunDirectory(cfg, new_name=True) as directory:
            directory.begin()
            places.append((directory.cfg.target_dir, directory.cfg.ckpt_dir))
            barrier.wait()  # all of them hold their locks

    threads = [threading.Thread(target=start) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {f"demo-1{end}" for end in ("", *(f"-{number}" for number in range(2, 21)))}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names
    assert sorted(places) == sorted(
        (str(tmp_path / "runs" / n), str(tmp_path / "runs" / n / "checkpoints")) for n in names
    )


def test_runs_of_one_second_as_processes(tmp_path):
    write_tokens(tmp_path)
    argv = tiny_flags(total_steps=1, target_dir=None)
    started = [commands().start(argv, tmp_path) for _ in range(2)]
    for command in started:
        assert command.wait().returncode == 0
    runs = list((tmp_path / "runs").iterdir())
    assert len(runs) == 2
    for run in runs:
        assert {path.name for path in run.iterdir()} == {"checkpoints", "logs"}
        assert checkpoint(run).exists()


def test_a_run_that_does_not_start_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for exception in (SystemExit(143), KeyboardInterrupt(), RuntimeError()):

        def stopped(self, exception=exception):
            raise exception

        monkeypatch.setattr(TrainStep, "warm_up", stopped)
        with pytest.raises(type(exception)):
            run_tiny(tmp_path / "there" / "a" / "b", log_dir=str(tmp_path / "logs" / "x"))
        assert listing(tmp_path) == {"there": None}
    # Nor where it ends while its directories are made.
    monkeypatch.setattr(RunDirectory, "_lock", stopped)
    with pytest.raises(RuntimeError):
        run_tiny(tmp_path / "there" / "a" / "b")
    assert listing(tmp_path) == {"there": None}


# --- one writer ---


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    write_tokens(tmp_path)
    assert commands().run(tiny_flags(max_minutes=1e-9), tmp_path).returncode == 0
    cfg = tiny_config(tmp_path / "run")
    resumed = Resumed.read(checkpoint(tmp_path / "run", 1))
    with RunDirectory(cfg, resumed):
        holder = json.loads((tmp_path / "run" / "checkpoints" / LOCK).read_text())
        assert holder.keys() == {"pid", "host", "started"} and holder["pid"] == os.getpid()
        before = listing(tmp_path)
        for argv in (["--overwrite"], ["--resume", "--target-dir", "./run/"]):
            result = commands().run([*tiny_flags(), *argv], tmp_path)
            assert result.returncode == 2 and result.stderr.count("\n") == 1, result.output
            form = rf"error: \S*run/checkpoints: process {os.getpid()} on \S+, started [\d: -]+, "
            assert re.match(form + "writes there; .*--target-dir", result.stderr)
        # Two target_dirs with one directory of checkpoints, or of logs.
        for flag, name in (("ckpt_dir", "checkpoints"), ("log_dir", "logs")):
            place = {flag: str(tmp_path / "run" / name), "overwrite": True}
            with pytest.raises(OutputError, match=f"run/{name}: process {os.getpid()} on"):
                run_tiny(tmp_path / "other", **place)
        assert listing(tmp_path) == before
    assert not list(tmp_path.rglob(LOCK))
    assert commands().run([*tiny_flags(), "--resume"], tmp_path).returncode == 0


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    (tmp_path / LOCK).write_text('{"pid": 1, "host": "here", "started": "then"}' * 9)
    lock, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    lock.acquire()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
        second.acquire()
    (tmp_path / LOCK).write_text("")  # it has not written its name yet
    with pytest.raises(OutputError, match="another process writes there"):
        second.acquire()
    lock.release()
    second.acquire()
    second.release()
    assert listing(tmp_path) == {}


def test_the_lock_of_a_directory_that_is_gone(tmp_path):
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    (tmp_path / LOCK).unlink()
    other = DirectoryLock(tmp_path)
    other.acquire()  # what stands there now is not the first one's
    lock.release()
    assert (tmp_path / LOCK).exists()
    other.release()


def test_a_file_system_without_locks_is_told_once(tmp_path, monkeypatch, capsys):
    def flock(handle, how):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(DirectoryLock, "_said", False)
    for name in ("a", "b"):
        run_tiny(tmp_path / name, total_steps=1)
        assert checkpoint(tmp_path / name).exists()
    assert capsys.readouterr().out.count("cannot be locked") == 1
    assert not list(tmp_path.rglob(LOCK))


# --- nothing overwritten ---


def test_a_run_is_not_resumed_into_another_runs_directory(tmp_path):
    for name in "ab":
        run_tiny(tmp_path / name, ckpt_every=4)
    before = listing(tmp_path)
    of_a = str(checkpoint(tmp_path / "a", 8))
    with pytest.raises(OutputError, match=r"b/checkpoints holds the .* of another run .*a/check"):
        run_tiny(tmp_path / "b", ckpt_path_to_resume=of_a)
    # Nor where it was copied there.
    copy = tmp_path / "b" / "checkpoints" / "checkpoint_9.pt"
    copy.write_bytes(Path(of_a).read_bytes())
    with pytest.raises(OutputError, match="of another run"):
        run_tiny(tmp_path / "b", ckpt_path_to_resume=str(copy))
    copy.unlink()
    assert listing(tmp_path) == before
    # Beside it, under another name, it may; and into a directory of its own, again and again.
    run_tiny(tmp_path / "b", ckpt_path_to_resume=of_a, ckpt_save_prefix="a", log_save_prefix="a")
    for _ in range(2):
        run_tiny(tmp_path / "c", ckpt_path_to_resume=of_a)
    ids = [Resumed.read(checkpoint(tmp_path / name)).run_id for name in "abc"]
    assert ids[0] == ids[2] != ids[1]
    after = listing(tmp_path)
    assert {path: after[path] for path in before if path.endswith(".pt")} == {
        path: content for path, content in before.items() if path.endswith(".pt")
    }


def test_a_directory_that_holds_only_a_runs_weights_is_not_a_new_runs(tmp_path):
    run_tiny(tmp_path)
    checkpoint(tmp_path).unlink()
    with pytest.raises(OutputError, match=r"checkpoint_model\.pt.*--overwrite"):
        run_tiny(tmp_path)


def test_a_checkpoint_that_appears_while_a_run_starts_is_not_retired(tmp_path):
    run_tiny(tmp_path, ckpt_every=4)
    for name in (8, "final", "model"):
        checkpoint(tmp_path, name).rename(tmp_path / f"{name}.pt")
    resumed = Resumed.read(checkpoint(tmp_path, 4))
    (tmp_path / "8.pt").rename(checkpoint(tmp_path, 8))
    directory = RunDirectory(tiny_config(tmp_path), resumed)
    with pytest.raises(OutputError, match=r"another process has saved checkpoint_8\.pt"), directory:
        pass


def test_going_back_retires_the_later_checkpoints(tmp_path, monkeypatch, capsys):
    run_tiny(tmp_path, ckpt_every=4, dropout=0.1)
    straight, content = state(checkpoint(tmp_path)), listing(tmp_path / "checkpoints")
    names = ["checkpoint_4.pt", "checkpoint_8.pt", "checkpoint_final.pt", "checkpoint_model.pt"]
    assert sorted(content) == names
    path = str(checkpoint(tmp_path, 4))

    def killed(self):
        raise RuntimeError("killed before the first save")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train", killed)
        with pytest.raises(RuntimeError):
            run_tiny(tmp_path, dropout=0.1, ckpt_path_to_resume=path, lr_max=1e-2)
    said = re.search(r"^\[resume\] .*renamed to …_abandoned$", capsys.readouterr().out, re.M)[0]
    assert "checkpoint_8.pt" in said and "checkpoint_final.pt" in said
    renamed = listing(tmp_path / "checkpoints")
    assert renamed == {
        name if name == "checkpoint_4.pt" else f"{name}_abandoned": content[name] for name in names
    }
    assert newest_readable(tmp_path / "checkpoints")[0] == Path(path)
    # The new branch, and back once more: the second ones get a number.
    for _ in range(2):
        run_tiny(tmp_path, ckpt_every=4, dropout=0.1, ckpt_path_to_resume=path)
        assert same(state(checkpoint(tmp_path)), straight)
    assert sorted(listing(tmp_path / "checkpoints")) == sorted(
        [*names, *(f"{n}_abandoned{i}" for n in names[1:] for i in ("", 2))]
    )
    assert losses(tmp_path).keys() == set(range(12))
    # A new run in its place takes them away.
    run_tiny(tmp_path, total_steps=1, overwrite=True)
    assert sorted(listing(tmp_path / "checkpoints")) == names[2:]


def test_going_back_leaves_other_runs_and_other_directories(tmp_path):
    run_tiny(tmp_path / "a", ckpt_every=4)
    run_tiny(tmp_path / "a", ckpt_every=4, ckpt_save_prefix="b", log_save_prefix="b")
    before = listing(tmp_path / "a" / "checkpoints")
    path = str(checkpoint(tmp_path / "a", 4))
    run_tiny(tmp_path / "c", ckpt_path_to_resume=path)
    assert listing(tmp_path / "a" / "checkpoints") == before
    run_tiny(tmp_path / "a", ckpt_path_to_resume=path)
    after = listing(tmp_path / "a" / "checkpoints")
    assert {n: after.get(n) for n in before if n.startswith("b_")} == {
        n: content for n, content in before.items() if n.startswith("b_")
    }


def test_a_checkpoint_without_a_run_id_is_of_the_run_beside_it(tmp_path):
    run_tiny(tmp_path / "a", ckpt_every=4)
    for name in (4, 8, "final", "model"):
        payload = torch.load(checkpoint(tmp_path / "a", name), weights_only=True)
        del payload["run_id"], payload["saved_at"]
        torch.save(payload, checkpoint(tmp_path / "a", name))
    run_tiny(tmp_path / "b")
    path = str(checkpoint(tmp_path / "a", 4))
    with pytest.raises(OutputError, match="of another run"):
        run_tiny(tmp_path / "b", ckpt_path_to_resume=path)
    run_tiny(tmp_path / "a", ckpt_path_to_resume=path, total_steps=6)
    assert newest_readable(tmp_path / "a" / "checkpoints")[1]["iteration"] == 6
    assert checkpoint(tmp_path / "a", "8").with_name("checkpoint_8.pt_abandoned").exists()
