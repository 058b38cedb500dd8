"""Saving that goes wrong: killed, full disk, no permission. The old file stays whole."""

import errno
import fcntl
import os
import random
import signal
import stat
import sys
import time

import pytest
import torch
from checkpoints import make_model
from command_server import NOBODY, commands
from training_runs import listing

from fastlm import OutputError, checkpoint_file, save_checkpoint
from fastlm.checkpoint import checkpoint_files, checkpoint_payload, read_checkpoint
from fastlm.checkpoint_file import payload_bytes, remove_stale_temporaries, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

# --- saving goes wrong ---


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_are_those_the_umask_leaves(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        save_checkpoint(make_model(), None, 1, tmp_path / "a.pt")
        assert os.umask(mask) == mask  # and the umask is what it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.pt").stat().st_mode) == mode


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """No kill shows it, only a power failure would: so the order of the calls is looked at."""
    path, calls = tmp_path / "a.pt", []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor):
        status = os.fstat(descriptor)
        is_directory = os.path.samestat(status, tmp_path.stat())
        calls.append("directory" if is_directory else f"file of {status.st_size} bytes")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append("rename") or replace(a, b))
    save_checkpoint(make_model(), None, 1, path)
    assert calls == [f"file of {path.stat().st_size} bytes", "rename", "directory"]


def test_a_payload_that_cannot_be_saved_leaves_the_old_file(saved):
    before = listing(saved.parent)
    with pytest.raises((TypeError, AttributeError)):
        save_checkpoint(make_model(), None, 3, saved, extra=(x for x in ()))
    assert listing(saved.parent) == before


def test_kill_9_while_saving_leaves_the_old_file_or_the_new_one(tmp_path):
    rng = random.Random(3)
    path = tmp_path / "checkpoint_1.pt"
    kills, leftovers = 15, 0
    for _ in range(kills):
        command = commands().start([str(path)], tmp_path, call="command_programs:save_forever")
        command.until(r"\n")
        time.sleep(rng.uniform(0, 0.03))
        command.signal(signal.SIGKILL)
        result = command.wait()
        assert result.returncode == -signal.SIGKILL, result.stderr
        last_reported = int(result.stdout.split()[-1])
        payload = read_checkpoint(path)
        assert payload["iteration"] in (last_reported, last_reported + 1)
        assert (payload["model_state"]["weight"] == payload["iteration"]).all()
        assert checkpoint_files(tmp_path) == [path]
        leftovers = sum(1 for entry in tmp_path.iterdir() if entry != path)
    assert leftovers > 0, "no kill hit a save: this test has shown nothing"


def test_a_death_in_any_call_of_a_save_leaves_the_old_file_or_the_new_one(tmp_path):
    """What it leaves besides is a temporary file, which the next start removes."""
    path = tmp_path / "directory" / "checkpoint_1.pt"
    model = torch.nn.Linear(64, 64)
    torch.nn.init.constant_(model.weight, 1)
    save_checkpoint(model, None, 1, path)
    result = commands().run(
        [str(path), "0"], tmp_path, call="command_programs:die_in_every_call_of_a_save"
    )
    assert result.returncode == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    calls = [name for name, *_ in lines]
    assert [name for name in calls if name != "write"] == [
        *("statvfs", "open", "flock", "fsync", "posix_fadvise", "replace"),
        *("open", "fsync", "close", "done"),  # of the directory, and no more
    ]
    assert calls.count("write") > 3
    renamed = calls.index("replace") + 1
    assert {line[1] for line in lines[:renamed]} == {"1"}
    assert {line[1] for line in lines[renamed:]} == {"2"}
    assert {line[2] for line in lines[2:renamed]} == {"1"}  # once it is open


def test_leftovers_are_told_from_the_files_of_living_processes(tmp_path):
    path = tmp_path / "checkpoint_1.pt"
    save_checkpoint(make_model(), None, 1, path)
    foreign = (".notes.tmp", ".checkpoint_1.pt.tmp", "checkpoint_1.pt.0123abcd.tmp", ".a.pt.0.tmp")
    for name in foreign:
        (tmp_path / name).touch()
    (tmp_path / ".checkpoint_3.pt.0123abcd.tmp").mkdir()
    (tmp_path / ".checkpoint_4.pt.0123abcd.tmp").symlink_to(path)
    old = tmp_path / ".checkpoint_2.pt.a_b1c2d3.tmp"  # of a version that named them by mkstemp
    old.touch()
    handle, living = checkpoint_file._locked_temporary(path)
    before = listing(tmp_path)
    assert remove_stale_temporaries(tmp_path) == [old]
    assert listing(tmp_path) == {n: c for n, c in before.items() if n != old.name}
    os.close(handle)  # as a process's end does
    assert remove_stale_temporaries(tmp_path) == [living]
    assert remove_stale_temporaries(tmp_path / "nowhere") == []


def test_a_file_taken_for_a_leftover_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    flock, path = fcntl.flock, tmp_path / "checkpoint_1.pt"

    def late(handle, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        assert len(remove_stale_temporaries(tmp_path)) == 1
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    save_checkpoint(make_model(), None, 1, path)
    assert list(tmp_path.iterdir()) == [path] and read_checkpoint(path)["iteration"] == 1


@pytest.mark.parametrize("name", ["flock", "posix_fadvise", "statvfs"])
def test_file_systems_that_lack_something_are_written_all_the_same(tmp_path, monkeypatch, name):
    def fails(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl if name == "flock" else os, name, fails)
    path = tmp_path / "checkpoint_1.pt"
    write_checkpoint(checkpoint_payload(make_model(), None, 1), path, read_back=True)
    assert list(tmp_path.iterdir()) == [path] and read_checkpoint(path)["iteration"] == 1


def test_a_directory_that_cannot_be_synced_keeps_its_checkpoint(saved, monkeypatch):
    """EINVAL on some network file systems."""
    fsync = os.fsync

    def fails(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    save_checkpoint(make_model(), None, 3, saved)
    assert list(saved.parent.iterdir()) == [saved] and read_checkpoint(saved)["iteration"] == 3


FAILURES = {
    "fsync": errno.EIO,
    "replace": errno.EROFS,
    "open": errno.EMFILE,
    "statvfs": None,  # a disk without room
    "fdopen": errno.EDQUOT,
}


@pytest.mark.parametrize("name", FAILURES)
def test_every_error_of_the_disk_leaves_the_old_file(saved, monkeypatch, name):
    before, number = listing(saved.parent), FAILURES[name]

    def fails(*arguments):
        if number is None:
            return os.statvfs_result((4096, 4096, 1000, 9, 9, 9, 9, 9, 0, 255))
        if name == "fdopen":
            os.close(arguments[0])
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, name, fails)
    with pytest.raises(OutputError) as caught:
        save_checkpoint(make_model(), None, 3, saved, more=torch.zeros(50_000))
    monkeypatch.undo()
    assert listing(saved.parent) == before
    reason = "it needs 0.2 MB, and 0.0 MB are free" if number is None else os.strerror(number)
    assert str(caught.value) == (
        f"{saved}: cannot be written ({reason}); make room there or choose another directory"
    )


def test_a_tensor_that_stands_twice_takes_its_room_once():
    tensor = torch.zeros(1000)
    payload = {"a": tensor, "b": [tensor.view(10, 100), {"c": tensor[:5]}], "d": torch.zeros(2)}
    assert payload_bytes(payload) == 4008


def test_a_full_disk_leaves_the_old_file(saved):
    """A limit on the size of files stands in for the disk: both end in a failing write."""
    before = listing(saved.parent)
    for limit in (4_096, 100_000, 262_500):  # of 263 kB
        result = commands().run(
            [str(saved)],
            saved.parent,
            call="command_programs:save_once",
            limits={"fsize": limit},
        )
        assert result.returncode == 0, result.output
        assert "File too large" in result.stdout and saved.name in result.stdout
        assert listing(saved.parent) == before


@pytest.mark.skipif(
    sys.platform == "win32" or os.getuid() != 0, reason="only root can become another user"
)
def test_a_directory_that_cannot_be_written(saved):
    saved.parent.chmod(0o755)
    before = listing(saved.parent)
    result = commands().run(
        [saved.name], saved.parent, call="command_programs:save_once", uid=NOBODY
    )
    assert result.returncode == 0, result.output
    assert "Permission denied" in result.stdout and saved.name in result.stdout
    assert listing(saved.parent) == before
