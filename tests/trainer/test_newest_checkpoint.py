"""Which checkpoint is the newest: by what the files say of themselves, never by their times."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import make_model

from fastlm import CheckpointError, save_checkpoint
from fastlm.checkpoint import checkpoint_files, newest_readable
from fastlm.run.resume import find


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: str, step: int, run_id: str | None = "a", saved_at: float = 100.0, **extra) -> Path:
    identity = {} if run_id is None else {"run_id": run_id, "saved_at": saved_at}
    save_checkpoint(make_model(), None, step, path, **identity, **extra)
    # The later it was written, the older it looks.
    write.time -= 10**9
    os.utime(path, ns=(write.time, write.time))
    return Path(path)


write.time = 10**18


def names(directory, prefix=None) -> list[str]:
    return [path.name for path in checkpoint_files(directory, prefix)]


def test_the_highest_step_is_the_newest_whatever_the_files_times():
    for step in (2, 10, 9):
        write(f"run/checkpoint_{step}.pt", step, saved_at=100.0 + step)
    write("run/checkpoint_final.pt", 12, saved_at=112.0)
    write("run/checkpoint_model.pt", 12)
    expected = ["checkpoint_final.pt", *(f"checkpoint_{n}.pt" for n in (10, 9, 2))]
    assert names("run") == expected
    shutil.copytree("run", "copy", copy_function=shutil.copyfile)
    os.utime("copy/checkpoint_2.pt", ns=(2 * 10**18, 2 * 10**18))
    assert names("copy") == expected
    # The final one counts by its steps: of a run that was continued, it is not the newest.
    write("run/checkpoint_20.pt", 20, saved_at=120.0)
    assert names("run") == ["checkpoint_20.pt", *expected]


def test_the_latest_run_of_a_directory_goes_first():
    write("run/checkpoint_50.pt", 50, run_id="a", saved_at=100.0)
    write("run/checkpoint_7.pt", 7, run_id="b", saved_at=300.0)
    write("run/checkpoint_8.pt", 8, run_id="b", saved_at=200.0)  # its clock was set back
    write("run/other_60.pt", 60, run_id="b", saved_at=150.0)
    assert names("run", "checkpoint") == ["checkpoint_8.pt", "checkpoint_7.pt", "checkpoint_50.pt"]
    assert names("run") == [
        *("checkpoint_8.pt", "checkpoint_7.pt", "other_60.pt", "checkpoint_50.pt")
    ]
    assert names("run", "other") == ["other_60.pt"]
    assert find("run", prefix="other").path.name == "other_60.pt"
    assert find("auto", target_dir=None, ckpt_dir="run").path.name == "checkpoint_8.pt"
    assert find("auto", ckpt_dir="run", prefix="other").path.name == "other_60.pt"
    with pytest.raises(CheckpointError, match="no readable checkpoint none_<step>"):
        find("run", prefix="none")


def test_the_newest_run_is_the_one_that_saved_last():
    for name, saved_at in (("a", 300.0), ("b", 200.0), ("c", 100.0)):
        write(f"runs/{name}/checkpoints/checkpoint_1.pt", 1, name, saved_at)
    os.utime("runs/c/checkpoints/checkpoint_1.pt")
    Path("runs/d/checkpoints").mkdir(parents=True)
    assert find("auto").path.parts[1] == "a"
    # Where nothing is stored, by another program say, the file's time counts.
    write("runs/e/checkpoints/checkpoint_1.pt", 1, None)
    assert find("auto").path.parts[1] == "e"


def test_checkpoints_without_an_identity():
    for step in (3, 20):
        write(f"run/checkpoint_{step}.pt", step, None)
    assert names("run") == ["checkpoint_20.pt", "checkpoint_3.pt"]


@pytest.mark.parametrize("damage", ["record", "tensor", "cut", "empty", "text", "link", "legacy"])
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, capsys):
    write("run/checkpoint_4.pt", 4)
    write("run/checkpoint_9.pt", 9)
    path = write("run/checkpoint_final.pt", 12, note="here")
    content = bytearray(path.read_bytes())
    if damage == "record":
        content[content.index(b"saved_at") + 2] ^= 1
    elif damage == "tensor":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[-100:]
    elif damage in ("empty", "text"):
        content = b"" if damage == "empty" else b"no checkpoint"
    path.write_bytes(content)
    if damage == "link":
        path.unlink()
        path.symlink_to("nowhere.pt")
    elif damage == "legacy":  # torch's format before archives; of a run of its own, and whole
        torch.save({"iteration": 12}, path, _use_new_zipfile_serialization=False)
    found, payload = newest_readable("run")
    if damage == "legacy":
        assert found == path
        return
    assert (found.name, payload["iteration"]) == ("checkpoint_9.pt", 9)
    said = capsys.readouterr().out
    assert said.startswith("[resume] run/checkpoint_final.pt: ") and said.count("\n") == 1


def test_a_flipped_run_id_does_not_hide_the_run(capsys):
    write("run/checkpoint_4.pt", 4, "a" * 16, 100.0)
    path = write("run/checkpoint_9.pt", 9, "a" * 16, 200.0)
    path.write_bytes(path.read_bytes().replace(b"a" * 16, b"a" * 15 + b"c"))
    assert newest_readable("run")[0].name == "checkpoint_4.pt"
    assert "is damaged" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_not_listed():
    for name in ("4_abandoned", "emergency", "model", "x"):
        write(f"run/checkpoint_{name}.pt", 4)
    write("run/checkpoint_4.pt_abandoned", 4)
    Path("run/checkpoint_5.pt").mkdir()
    os.mkfifo("run/checkpoint_6.pt")
    assert names("run") == []
