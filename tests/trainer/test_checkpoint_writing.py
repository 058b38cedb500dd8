"""Saving that goes wrong: killed, full disk, no permission. The old file stays whole."""

import os
import random
import signal
import stat
import sys
import time

import pytest
from checkpoints import make_model
from command_server import NOBODY, commands
from training_runs import listing

from fastlm import save_checkpoint
from fastlm.checkpoint import checkpoint_files, read_checkpoint

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
