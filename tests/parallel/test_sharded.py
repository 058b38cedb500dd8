"""Sharded checkpoints. What needs several ranks is in sharded_cases.py, started once for all."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import everything, make_pair, train_step
from tolerance import assert_bitwise_equal

from fastlm import load_checkpoint
from fastlm.checkpoint import (
    checkpoint_files,
    checkpoint_payload,
    list_checkpoints,
    newest_readable,
    peek,
    read_checkpoint,
    read_values,
)
from fastlm.checkpoint_file import remove_checkpoint
from fastlm.errors import CheckpointError, OutputError

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)

from fastlm.parallel.commit import decoded, encoded, remove_leftovers
from fastlm.parallel.sharded import write_sharded

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
CASES = [
    "two_ranks_save",
    "another_number_of_ranks_goes_on",
    "ranks_with_whole_tensors_go_on",
    "one_process_goes_on",
    "ranks_go_on_from_one_file",
    "several_files_a_rank",
    "a_copy_is_written_while_the_run_goes_on",
    "a_rank_that_cannot_write_is_an_error_of_all",
    "errors_of_one_rank_reach_all",
    "damage_that_one_rank_finds_is_an_error_of_all",
    "another_architecture_is_refused_before_anything_is_read",
    "a_kill_at_any_moment_leaves_the_old_or_the_new",
    "a_killed_rank_leaves_no_checkpoint",
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the ranks print."""
    return run_cases(tmp_path_factory.mktemp("sharded"))


def run_cases(directory: Path, *names: str) -> str:
    command = [sys.executable, str(HELPERS / "sharded_cases.py"), str(directory), *names]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as expired:
        return f"timed out\n{expired.stdout}\n{expired.stderr}"
    return f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("case", CASES)
def test_on_several_ranks(output, case):
    assert f"passed {case}\n" in output, output[-8000:]


def test_every_case_was_run_and_none_failed(output):
    assert output.startswith("exit status 0\n"), output[-8000:]
    assert output.count("passed ") == len(CASES), output


@pytest.mark.exhaustive
def test_a_kill_of_either_rank_at_any_moment(tmp_path):
    name = "a_kill_of_a_rank_at_any_moment_leaves_the_old_or_the_new"
    output = run_cases(tmp_path / "killed", name)
    assert output.startswith("exit status 0\n") and f"passed {name}\n" in output, output[-8000:]


# One process writes and reads


def pair(**settings):
    """Matrices of more values than commit.json takes, and vectors of less."""
    return make_pair(**{"d_model": 16, "d_ff": 48, **settings})


def write(path: Path, **settings):
    model, optimizer = pair(**settings)
    payload = checkpoint_payload(model, optimizer, 7, run_id="r", saved_at=1.5)
    write_sharded(payload, path, read_back=True)
    return model, optimizer


@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}])
def test_one_process_reads_what_it_has_written(tmp_path, settings):
    path = tmp_path / "c_7.dcp"
    model, optimizer = write(path, **settings)
    payload = read_checkpoint(path)
    assert payload["run_id"] == "r" and payload["iteration"] == 7
    other, fresh = pair(seed=1, steps=0, **settings)
    assert load_checkpoint(other, fresh, path) == 7
    for a, b in zip(everything(other, fresh), everything(model, optimizer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for each in ((model, optimizer), (other, fresh)):
        train_step(*each, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.detach())


def test_weights_alone_are_loaded_without_reading_the_optimizer_state(tmp_path):
    path = tmp_path / "c_7.dcp"
    model, _ = write(path)
    other, _ = pair(seed=1, steps=0)
    assert load_checkpoint(other, None, path) == 7
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert_bitwise_equal(a.detach(), b.detach())
    write_sharded(checkpoint_payload(model, None, 7), tmp_path / "weights.dcp")
    other, fresh = pair(seed=1, steps=0)
    with pytest.warns(UserWarning, match="holds no optimizer state"):
        load_checkpoint(other, fresh, tmp_path / "weights.dcp")


def test_values_come_without_the_models_tensors_from_either_kind(tmp_path):
    model, optimizer = write(tmp_path / "c_7.dcp")
    payload = checkpoint_payload(model, optimizer, 7, guard={"norms": torch.ones(3)})
    write_sharded(payload, tmp_path / "c_7.dcp")
    torch.save(payload, tmp_path / "c_7.pt")
    for path in (tmp_path / "c_7.dcp", tmp_path / "c_7.pt"):
        values = read_values(path)
        assert values["iteration"] == 7 and torch.equal(values["guard"]["norms"], torch.ones(3))
        assert values["model_state"]["lm_head.weight"].shape == model.lm_head.weight.shape
        large = [*values["model_state"].values()]
        large += [
            t for entry in values["optimizer_state"]["state"].values() for t in entry.values()
        ]
        assert len(large) > 10 and all(tensor.is_meta for tensor in large)


def test_a_name_is_given_anew_and_taken_away(tmp_path):
    path = tmp_path / "c_7.dcp"
    write(path)
    write_sharded({"iteration": 8}, path)
    assert read_checkpoint(path) == {"iteration": 8}
    assert [p.name for p in path.iterdir()] == ["commit.json"]
    remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"c_7.dcp: cannot be written \(File exists\); make"):
        write_sharded({"iteration": 1}, tmp_path / "file" / "c_7.dcp")


SMALL = [
    (1 / 3, torch.float32), ([0.1, -0.0, math.inf, 1e-45], torch.float32),
    ([[1e-320, 2.5]], torch.float64), ([1 / 3, 1e30], torch.bfloat16), ([6e-8], torch.float16),
    ([2**63 - 1, -1], torch.int64), ([[True], [False]], torch.bool), ([], torch.uint8),
    ([-7], torch.int16),
]  # fmt: skip


def test_plain_values_are_the_same_after_json():
    payload = {
        "numbers": [0, -1, 2**80, 0.1, 1e-320, float("inf"), True, None],
        "tuples": ((1, (2.5, "a")), []),
        "keys": {0: {"a": 1}, "b": 2, (1, 2): 3, None: 4},
        "names": {"$tensor": 1, "": 2, "\ud800é": {"$": {}}},
        "small": [torch.tensor(v, dtype=d) for v, d in SMALL],
    }
    text = json.dumps(encoded(payload, {}))
    again = decoded(json.loads(text), lambda t, _: t)
    assert repr(again) == repr(payload)
    for a, (b, dtype) in zip(again["small"], SMALL, strict=True):
        assert_bitwise_equal(a, torch.tensor(b, dtype=dtype))
    for value in (object(), {1, 2}, b"bytes", 1j, type):
        with pytest.raises(TypeError, match=r"config/x is a .*, which no checkpoint holds"):
            encoded({"config": {"x": value}}, {})


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    synced, fsync, rename = [], os.fsync, os.rename

    def recording_fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        synced.append((os.path.basename(path), os.path.isdir(path) or os.path.getsize(path)))
        fsync(descriptor)

    def recording_rename(source, target):
        synced.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "rename", recording_rename)
    write_sharded({"model_state": {"w": torch.ones(200)}}, tmp_path / "c_7.dcp")
    begin = synced.index("rename")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "c_7.dcp").iterdir()}
    assert len(sizes) == 2 and set(sizes.items()) <= set(synced[:begin])  # to the last byte
    assert synced[begin - 1] == ("c_7.dcp.partial", True)
    assert synced[begin + 1 :] == [(tmp_path.name, True)]


# Damage


def damaged_copies(path: Path, directory: Path):
    """(copy of `path`, the damaged file) for every file and kind of damage."""
    for i, file in enumerate(sorted(path.iterdir())):
        size = file.stat().st_size
        for place in {0, 7, 8, 11, 12, 50, 75, 76, 90, size // 2, size - 1}:
            copy = directory / f"flip_{i}_{place}.dcp"
            shutil.copytree(path, copy)
            content = bytearray(file.read_bytes())
            content[place] ^= 1 << place % 8
            (copy / file.name).write_bytes(content)
            yield copy, copy / file.name
        for length in (0, size // 2, size - 1):
            copy = directory / f"cut_{i}_{length}.dcp"
            shutil.copytree(path, copy)
            os.truncate(copy / file.name, length)
            yield copy, copy / file.name
        copy = directory / f"gone_{i}.dcp"
        shutil.copytree(path, copy)
        (copy / file.name).unlink()
        yield copy, copy / file.name


def test_damage_is_found_and_the_file_named(tmp_path):
    write(tmp_path / "c_7.dcp")
    count = 0
    for copy, file in damaged_copies(tmp_path / "c_7.dcp", tmp_path):
        model, optimizer = pair(seed=1)
        before = [t.clone() for t in model.state_dict().values()]
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, optimizer, copy)
        assert file.name in str(caught.value) and "\n" not in str(caught.value)
        for a, b in zip(before, model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        count += 1
    assert count == 2 * (11 + 3 + 1)


def test_a_file_too_many_is_refused(tmp_path):
    write(tmp_path / "c_7.dcp")
    shutil.copy(
        tmp_path / "c_7.dcp" / "shard-00001-model-00001-of-00001.safetensors",
        tmp_path / "c_7.dcp" / "shard-00002-model-00001-of-00001.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"shard-00002.*: does not belong to this checkpoint"):
        read_checkpoint(tmp_path / "c_7.dcp")


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def recommit(path: Path) -> None:
    """Gives a commit.json digests that fit, as somebody would who means harm."""
    from fastlm.parallel.commit import commit, partial_of, read_commit, sha256

    content = read_commit(path)
    path.rename(partial_of(path))
    for file in partial_of(path).glob("*.safetensors"):
        content["files"][file.name] = [file.stat().st_size, sha256(file)]
    commit(path, content)


def test_no_pickle_is_executed(tmp_path):
    path, mark = tmp_path / "c_7.dcp", tmp_path / "executed"
    write(path)
    bomb = pickle.dumps(Payload(mark))
    pickle.loads(bomb)  # it is one
    mark.rmdir()
    for name in (".metadata", "__0_0.distcp", "data.pkl"):  # DCP's other storage reads such files
        (path / name).write_bytes(bomb)
    assert read_checkpoint(path)["iteration"] == 7
    assert list_checkpoints(tmp_path)[0].readable
    for bomb_format in (bomb, None):
        file = path / "shard-00001-model-00001-of-00001.safetensors"
        if bomb_format is None:
            torch.save(Payload(mark), file)
        else:
            file.write_bytes(bomb_format)
        recommit(path)
        with pytest.raises(CheckpointError, match="is no readable checkpoint"):
            read_checkpoint(path)
    (path / "commit.json").write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"commit.json: is damaged"):
        read_checkpoint(path)
    assert not mark.exists()


def test_parts_that_do_not_fill_a_tensor_are_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "c_7.dcp"
    write_sharded({"model_state": {"w": torch.arange(600.0)}}, path)
    file = path / "shard-00001-model-00001-of-00001.safetensors"
    place = {"model_state/w": {"saved_offsets": [200]}}
    save_file({"model_state/w": torch.ones(400)}, file, {"DCP_SHARDING_INFO": json.dumps(place)})
    recommit(path)
    with pytest.raises(CheckpointError, match="'model_state/w' has 400 of 600 values"):
        read_checkpoint(path)


# Among others in a directory


def test_directories_and_files_are_listed_together(tmp_path, capsys, monkeypatch):
    model, optimizer = pair()
    for step in (2, 4, 6):
        payload = checkpoint_payload(model, optimizer, step, run_id="r", saved_at=float(step))
        if step == 4:
            torch.save(payload, tmp_path / f"c_{step}.pt")
        else:
            write_sharded(payload, tmp_path / f"c_{step}.dcp")
    (tmp_path / "c_8.dcp.partial").mkdir()
    (tmp_path / "c_9.dcp").touch()  # no directory
    (tmp_path / "c_7.pt").mkdir()  # no file
    assert [p.name for p in checkpoint_files(tmp_path)] == ["c_6.dcp", "c_4.pt", "c_2.dcp"]
    assert torch.equal(
        peek(tmp_path / "c_6.dcp")["optimizer_state"]["state"][0]["step"], torch.tensor(2.0)
    )
    first = list_checkpoints(tmp_path, "c")[0]
    assert (first.step, first.run_id, first.saved_at, first.readable) == (6, "r", 6.0, True)
    assert newest_readable(tmp_path)[0].name == "c_6.dcp"
    with monkeypatch.context() as older:  # a fastlm that reads another format goes no further back
        older.setattr("fastlm.parallel.commit._FORMAT", 0)
        with pytest.raises(
            CheckpointError, match=r"c_6\.dcp: is of format 1, not 0; update fastlm"
        ):
            newest_readable(tmp_path)
    (tmp_path / "c_6.dcp" / "commit.json").unlink()
    path, payload = newest_readable(tmp_path)
    assert path.name == "c_4.pt" and payload["iteration"] == 4
    assert "c_6.dcp: is no whole checkpoint" in capsys.readouterr().out


def test_leftovers_are_removed_unless_somebody_writes_there(tmp_path):
    from fastlm.data.staging import locked

    for name in ("c_1.dcp.partial", "c_2.dcp.partial", "c_3.dcp.replaced", "other.partial"):
        (tmp_path / name).mkdir()
    write_sharded({"iteration": 4}, tmp_path / "c_4.dcp")
    shutil.copytree(tmp_path / "c_4.dcp", tmp_path / "c_4.dcp.replaced")
    with locked(tmp_path / "c_2.dcp.partial"):
        removed = remove_leftovers(tmp_path)
    assert [p.name for p in removed] == ["c_1.dcp.partial", "c_4.dcp.replaced"]
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == ["c_2.dcp.partial", "c_3.dcp", "c_4.dcp", "other.partial"]
    assert remove_leftovers(tmp_path / "nowhere") == []
