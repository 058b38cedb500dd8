"""The writer of a run's checkpoints: in the background, one at a time, the old ones deleted."""

import errno
import os
import re
import threading
import time
from pathlib import Path

import pytest
import torch
from checkpoints import make_pair, train_step
from in_process import checkpoint, run_tiny
from training_runs import listing, metrics, same, state

from fastlm import checkpoint_file
from fastlm.checkpoint import checkpoint_files, checkpoint_payload, read_checkpoint
from fastlm.run import saver as saver_module
from fastlm.run.saver import Saver

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

RUN_ID = "0123abcd"


@pytest.fixture
def path_of(tmp_path):
    return lambda name: tmp_path / f"c_{name}.pt"


@pytest.fixture
def held(monkeypatch):
    """Writes wait until this event is set."""
    event, write = threading.Event(), saver_module.write_checkpoint

    def waits(*arguments, **options):
        assert event.wait(30)
        write(*arguments, **options)

    monkeypatch.setattr(saver_module, "write_checkpoint", waits)
    yield event
    event.set()


def payload(step: int = 1, run_id: str | None = RUN_ID) -> dict:
    extra = {} if run_id is None else {"run_id": run_id}
    return checkpoint_payload(torch.nn.Linear(2, 2), None, step, **extra)


def save_all(saver: Saver, *steps: int) -> None:
    for step in steps:
        saver.save(str(step), payload(step), wait=True)


def names(directory: Path) -> set[str]:
    return {path.name.removeprefix("c_").removesuffix(".pt") for path in directory.iterdir()}


# --- in the background ---


def test_what_is_written_is_the_state_at_the_call(path_of, held):
    model, optimizer = make_pair(tie_embeddings=True)
    saver = Saver(path_of, keep_last=3)
    stored = checkpoint_payload(model, optimizer, 2, extra={"tensor": torch.get_rng_state()})
    expected = read_back(stored)
    begin = time.monotonic()
    saver.save("2", stored)
    train_step(model, optimizer, 9)
    assert saver.reports() == [] and not path_of("2").exists()
    assert time.monotonic() - begin < 10  # it does not wait for the write
    held.set()
    saver.wait()
    assert saver.reports() == [(path_of("2"), None)] and saver.reports() == []
    written = read_checkpoint(path_of("2"))
    assert written.pop("best_checkpoint") is None
    assert same(dict(written["model_state"]), dict(expected["model_state"]))
    assert same(written["optimizer_state"], expected["optimizer_state"])
    tied = [written["model_state"][f"{name}.weight"] for name in ("lm_head", "token_embeddings")]
    assert tied[0].data_ptr() == tied[1].data_ptr()  # one matrix, stored once


def read_back(stored: dict) -> dict:
    """What a save in the foreground would give."""
    import io

    file = io.BytesIO()
    torch.save(stored, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_one_save_is_in_flight_and_the_next_waits_for_it(path_of, held, tmp_path):
    saver = Saver(path_of, keep_last=0)
    saver.save("1", payload(1))
    later = threading.Thread(target=saver.save, args=("2", payload(2)), kwargs={"wait": True})
    later.start()
    later.join(0.2)
    assert later.is_alive() and names(tmp_path) == set()
    held.set()
    later.join()
    assert [path.stem for path, _ in saver.reports()] == ["c_1", "c_2"]
    # Its copy was not the second one's buffer while it was being written.
    assert [read_checkpoint(path_of(n))["iteration"] for n in (1, 2)] == [1, 2]


def test_sync_save_needs_no_thread_and_no_copy(path_of, monkeypatch):
    monkeypatch.setattr(Saver, "_copied", None)
    monkeypatch.setattr(threading, "Thread", None)
    saver = Saver(path_of, keep_last=3, wait_for_each=True)
    saver.save("1", payload())
    assert saver.reports() == [(path_of("1"), None)]


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't start new thread")]
)
def test_without_memory_for_a_copy_the_step_waits(path_of, monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(threading.Thread, "start", fails)
    saver = Saver(path_of, keep_last=3)
    saver.save("1", payload())
    assert saver.reports() == [(path_of("1"), None)] and path_of("1").exists()


def test_minutes_of_wall_clock(path_of, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saver = Saver(path_of, keep_last=3, minutes=2, wait_for_each=True)
    never = Saver(path_of, keep_last=3)
    for now[0], due in ((219.9, False), (220.0, True), (300.0, True)):
        assert saver.due() == due and not never.due()
    saver.save("1", payload())
    for now[0], due in ((419.9, False), (420.0, True)):
        assert saver.due() == due


# --- failures ---


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_a_failure_is_told_and_the_next_save_is_tried(path_of, tmp_path, monkeypatch, number):
    saver, fsync = Saver(path_of, keep_last=3), os.fsync

    def fails(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    save_all(saver, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    ((path, error),) = saver.reports()
    assert path == path_of("1") and names(tmp_path) == set()
    assert error.startswith(f"{path}: cannot be written ({os.strerror(number)})")
    save_all(saver, 2)
    assert saver.reports() == [(path_of("2"), None)]
    assert saver.missing() == [f"{path} ({os.strerror(number)})"]
    save_all(saver, 3, 4)  # of which none would be left of it
    assert saver.missing() == []


def test_a_failure_that_is_made_good_is_none(path_of, monkeypatch):
    saver = Saver(path_of, keep_last=0)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_file, "digest_holds", lambda _: False)
        save_all(saver, 1)
        saver.save("final", payload(1), wait=True)
    for path, error in saver.reports():
        assert error.startswith(f"{path}: cannot be written (read back, its SHA-256")
    first, final = saver.missing()
    assert re.search(r"c_1\.pt \(", first) and re.search(r"c_final\.pt \(", final)
    save_all(saver, 1)
    saver.save("final", payload(1), wait=True)
    assert saver.missing() == []


def test_too_little_room_is_told_in_numbers(path_of, tmp_path, monkeypatch):
    room = os.statvfs_result((4096, 4096, 10**6, 700, 700, 9, 9, 9, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    saver = Saver(path_of, keep_last=3)
    saver.save("1", {**payload(), "more": torch.zeros(10**6)}, wait=True)
    ((_, error),) = saver.reports()
    assert "(it needs 4.0 MB, and 2.9 MB are free)" in error and names(tmp_path) == set()


def test_a_bug_is_no_failure_of_the_disk(path_of, tmp_path):
    saver = Saver(path_of, keep_last=3)
    saver.save("1", {"generator": (x for x in ())}, wait=True)
    with pytest.raises(TypeError, match="generator"):
        saver.reports()
    assert names(tmp_path) == set()


def test_a_vanished_directory_is_made_again(tmp_path):
    saver = Saver(lambda name: tmp_path / "a" / "b" / f"c_{name}.pt", keep_last=3)
    save_all(saver, 1)
    os.rename(tmp_path / "a", tmp_path / "gone")
    save_all(saver, 2)
    assert names(tmp_path / "a" / "b") == {"2"} and all(not r.error for r in saver.reports())


# --- which files stay ---


def test_the_last_ones_stay_and_the_best_and_the_final_one(path_of, tmp_path):
    saver = Saver(path_of, keep_last=2)
    losses = {10: 3.0, 20: 2.5, 30: 2.6, 40: float("nan"), 50: 2.7, 60: 2.4}
    left = {10: "10", 20: "10 20", 30: "20 30", 40: "20 30 40", 50: "20 40 50", 60: "20 50 60"}
    for step, loss in losses.items():
        save_all(saver, step)
        assert names(tmp_path) == set(left[step].split()), step
        saver.evaluated(loss)
        saver.evaluated(0.0)  # of later steps: the checkpoint has its loss
    for name in ("final", "model"):
        saver.save(name, payload(60), wait=True)
    save_all(saver, 70, 80, 90)
    assert names(tmp_path) == {"60", "80", "90", "final", "model"}
    assert saver.missing() == []


def test_0_keeps_all(path_of, tmp_path):
    save_all(Saver(path_of, keep_last=0), *range(1, 9))
    assert names(tmp_path) == set("12345678")


def test_nothing_is_deleted_for_a_file_that_is_not_whole(path_of, tmp_path, monkeypatch):
    """Read back, it is not what was written: no name for it, and the older ones stay."""
    saver = Saver(path_of, keep_last=1)
    save_all(saver, 1)
    before, write = listing(tmp_path), checkpoint_file._write_with_digest

    def damages(content, file):
        write(content, file)
        file.seek(1000)
        file.write(b"\xff" * 9)

    monkeypatch.setattr(checkpoint_file, "_write_with_digest", damages)
    save_all(saver, 2)
    assert listing(tmp_path) == before
    assert [bool(report.error) for report in saver.reports()] == [False, True]
    monkeypatch.undo()
    save_all(saver, 3)
    assert names(tmp_path) == {"3"}


def test_only_files_of_this_run_are_deleted(path_of, tmp_path):
    old = Saver(path_of, keep_last=0)
    save_all(old, 10, 20, 30)
    for name, run_id in (("11", "another"), ("12", None)):
        old.save(name, payload(int(name), run_id), wait=True)
    path_of("13").write_text("no checkpoint")
    (tmp_path / "other_10.pt").write_bytes(path_of("10").read_bytes())
    (tmp_path / "c_15.pt.bak").touch()
    found = checkpoint_files(tmp_path, "c")
    assert len(found) == 6
    saver = Saver(path_of, keep_last=2, found=found)
    save_all(saver, 40, 50)
    assert names(tmp_path) == {"11", "12", "13", "40", "50", "other_10", "15.pt.bak"}
    # What was not found is not known.
    save_all(Saver(path_of, keep_last=1), 60)
    assert "50" in names(tmp_path)


def test_the_best_is_remembered_across_processes(path_of, tmp_path):
    saver = Saver(path_of, keep_last=1)
    for step, loss in ((1, 2.0), (2, 3.0)):
        save_all(saver, step)
        saver.evaluated(loss)
    save_all(saver, 3)
    for step in (4, 5):
        found = checkpoint_files(tmp_path, "c")
        saver = Saver(path_of, keep_last=1, found=found, resumed=path_of(str(step - 1)))
        save_all(saver, step)
        saver.evaluated(2.5)
        assert names(tmp_path) == {"1", str(step)}
    # In a directory that does not hold it, another one can be the best.
    elsewhere = tmp_path / "elsewhere"
    saver = Saver(lambda name: elsewhere / f"c_{name}.pt", keep_last=1, resumed=path_of("5"))
    for step, loss in ((6, 2.5), (7, 2.6), (8, 2.7)):
        save_all(saver, step)
        saver.evaluated(loss)
    assert names(elsewhere) == {"6", "8"}


@pytest.mark.parametrize("best", [5, {}, {"val_loss": "x", "step": 1}, {"val_loss": 1.0}])
def test_a_best_that_is_none(path_of, best):
    checkpoint_file.write_checkpoint({**payload(), "best_checkpoint": best}, path_of("1"))
    saver = Saver(path_of, keep_last=1, found=[path_of("1")], resumed=path_of("1"))
    save_all(saver, 2)
    assert not path_of("1").exists()


def test_one_that_cannot_be_deleted_is_told_and_tried_again(path_of, tmp_path, monkeypatch):
    saver, unlink = Saver(path_of, keep_last=1), Path.unlink

    def fails(path, **options):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    save_all(saver, 1)
    monkeypatch.setattr(Path, "unlink", fails)
    save_all(saver, 2)
    assert f"{path_of('1')}: cannot be deleted" in [r.error or "" for r in saver.reports()][-1]
    monkeypatch.setattr(Path, "unlink", unlink)
    save_all(saver, 3)
    assert names(tmp_path) == {"3"}
    assert saver.missing() == []


# --- an exception's checkpoint ---


def test_the_emergency_checkpoint_is_taken_by_name_alone(tmp_path):
    run_tiny(tmp_path / "straight", ckpt_every=5)
    source = checkpoint(tmp_path / "straight", 5)
    saver = Saver(lambda name: checkpoint(tmp_path / "run", name), keep_last=1)
    assert saver.emergency(read_checkpoint(source)).error is None
    path = checkpoint(tmp_path / "run", "emergency")
    for prefix in (None, "checkpoint"):
        assert checkpoint_files(path.parent, prefix) == []
    run_tiny(tmp_path / "rest", ckpt_path_to_resume=str(path))
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))


def test_an_emergency_raises_nothing_of_its_own(path_of, monkeypatch):
    saver = Saver(path_of, keep_last=1)
    assert "generator" in saver.emergency({"x": (x for x in ())}).error
    monkeypatch.setattr(os, "fsync", None)
    report = saver.emergency(payload())
    assert report.error and not report.path.exists()


# --- in a run ---


def test_a_run_keeps_the_last_and_the_best(tmp_path):
    settings = dict(total_steps=11, ckpt_every=2, eval_every=2, keep_last=2)
    run_tiny(tmp_path, lr_max=0.3, lr_min=0.3, warmup_iters=1, **settings)  # it gets worse
    losses = {row["step"]: row["val_loss"] for row in metrics(tmp_path, "val")}
    losses.pop(10)  # of the last step, that of the final one as of checkpoint 10
    best = min(losses, key=losses.get)
    directory = checkpoint(tmp_path).parent
    expected = {best, 8, 10}
    assert names_of_run(directory) == {*map(str, expected), "final", "model"}


def names_of_run(directory: Path) -> set[str]:
    return {path.stem.removeprefix("checkpoint_") for path in directory.iterdir()}


@pytest.mark.parametrize("sync_save", [True, False])
def test_a_save_changes_nothing(tmp_path, sync_save):
    run_tiny(tmp_path / "never", dropout=0.1)
    run_tiny(tmp_path / "often", dropout=0.1, ckpt_every=1, sync_save=sync_save)
    assert same(state(checkpoint(tmp_path / "often")), state(checkpoint(tmp_path / "never")))
    for step in (1, 7, 11):
        assert read_checkpoint(checkpoint(tmp_path / "often", step))["iteration"] == step


def test_ckpt_minutes(tmp_path):
    run_tiny(tmp_path, total_steps=5, ckpt_minutes=1e-9)
    assert names_of_run(checkpoint(tmp_path).parent) == {*"1234", "final", "model"}


# --- which stay when not all goes well ---


def test_the_last_one_before_skipped_steps_stays(path_of, tmp_path):
    """The guard may roll back to it."""
    saver = Saver(path_of, keep_last=2)
    for step, in_a_row in ((10, 0), (20, 0), (30, 2), (40, 3), (50, 4)):
        guard = {"counts": [in_a_row, in_a_row, 0, 0]}
        saver.save(str(step), {**payload(step), "guard": guard}, wait=True)
    assert names(tmp_path) == {"20", "40", "50"}
    saver.forget_after(20)
    save_all(saver, 30, 40)
    assert names(tmp_path) >= {"30", "40"} and "50" in names(tmp_path)  # another branch's now


def test_the_best_is_one_that_is_there(path_of, tmp_path, monkeypatch):
    saver = Saver(path_of, keep_last=1)
    save_all(saver, 10)
    saver.evaluated(2.0)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_file, "digest_holds", lambda _: False)
        save_all(saver, 20)
    saver.evaluated(1.0)  # of what was not saved
    save_all(saver, 30, 40)
    assert names(tmp_path) == {"10", "40"}


def test_a_resumed_checkpoint_gets_the_loss_that_it_still_lacked(path_of, tmp_path):
    save_all(Saver(path_of, keep_last=1), 10)  # and stopped in the evaluation
    saver = Saver(path_of, keep_last=1, found=[path_of("10")], resumed=path_of("10"))
    saver.evaluated(1.0)
    save_all(saver, 20)
    saver.evaluated(5.0)
    save_all(saver, 30)
    assert names(tmp_path) == {"10", "30"}


def test_reserved_memory_is_what_the_saves_use(path_of):
    model, optimizer = make_pair()
    saver = Saver(path_of, keep_last=0)
    saver.reserve(checkpoint_payload(model, optimizer, 1))
    saver.wait()
    reserved = {place: buffer.data_ptr() for place, buffer in saver._buffers.items()}
    train_step(model, optimizer, 9)
    saver.save("2", checkpoint_payload(model, optimizer, 2), wait=True)
    assert {place: buffer.data_ptr() for place, buffer in saver._buffers.items()} == reserved
    stored = read_checkpoint(path_of("2"))
    assert same(stored["model_state"], dict(model.state_dict()))
