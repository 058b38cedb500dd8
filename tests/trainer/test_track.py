"""Trackers: what each shows of a run, that a resumed run continues its own, and that none stops it.

Each is read back by its own reader.
"""

import csv
import io
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import losses, metrics, same, state, tiny_config, tiny_flags, write_tokens

import fastlm.run.track as track
from fastlm import ConfigError
from fastlm.run.log import RunLog
from fastlm.run.output import Missing

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

OF_A_STEP = {
    f"train/{name}"
    for name in ("loss", "avg_loss", "lr", "grad_norm", "tokens_per_second", "tokens", "seconds")
} | {"train/mfu", "train/memory_bytes"}


def killed_behind(target_dir: Path, step: int) -> None:
    """Makes the metrics those of a run that was killed when it had logged `step`."""
    path = target_dir / "logs" / "metrics.jsonl"
    rows = map(json.loads, path.read_text().splitlines())
    kept = [row for row in rows if row["event"] != "summary" and row["step"] <= step]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in kept))


def run_killed_and_resumed(target_dir: Path, trackers: str) -> None:
    """12 steps, a kill behind step 9, and on from the checkpoint of 8 steps."""
    run_tiny(target_dir, ckpt_every=8, eval_every=4, track=(trackers,))
    killed_behind(target_dir, 9)
    resumed = str(checkpoint(target_dir, 8))
    run_tiny(target_dir, eval_every=4, track=(trackers,), ckpt_path_to_resume=resumed)


def events(directory: Path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is missing"
    )
    reader = accumulator.EventAccumulator(str(directory), size_guidance={"scalars": 0})
    return reader.Reload()


def test_tensorboard_reads_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    run_killed_and_resumed(tmp_path, "tensorboard")
    shown = events(tmp_path / "logs" / "tensorboard")
    assert OF_A_STEP | {"val/loss", "summary/val_loss", "summary/mfu"} <= {*shown.Tags()["scalars"]}
    found = {event.step: event.value for event in shown.Scalars("train/loss")}
    assert [event.step for event in shown.Scalars("train/loss")] == list(range(12))
    assert found == pytest.approx(losses(tmp_path))
    assert [event.step for event in shown.Scalars("val/loss")] == [4, 8, 11]
    times = [event.wall_time for event in shown.Scalars("train/lr")]
    assert times == pytest.approx([row["time"] for row in metrics(tmp_path, "train")])
    (settings,) = shown.Tensors("settings/text_summary")
    assert b'"d_model": 32' in settings.tensor_proto.string_val[0]
    # A new run in its place shows nothing of it.
    run_tiny(tmp_path, total_steps=3, track=("tensorboard",), sample_every=1, overwrite=True)
    shown = events(tmp_path / "logs" / "tensorboard")
    assert [event.step for event in shown.Scalars("train/loss")] == [0, 1, 2]
    (text,) = shown.Tensors("sample/0/text_summary")
    assert text.step == 1 and text.tensor_proto.string_val[0].startswith(b"    0 ")


def history(path: Path) -> list[dict]:
    """The rows of a .wandb file: LevelDB's log format behind 7 bytes, a protobuf in each record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, rows, parts = path.read_bytes(), [], b""
    assert data.startswith(b":W&B")
    position = 7
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        if left_in_block < 7 or kind == 0:  # the block's end is filled up
            position += left_in_block
            continue
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # the whole, or its last part
            continue
        record, parts = Record.FromString(parts), b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows.append({**row, "_step": record.history.step.num})
    return rows


def test_wandb_offline_goes_on_in_its_own_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb"))
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    streams = sys.stdout, sys.stderr
    run_killed_and_resumed(tmp_path / "run", "wandb")
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert streams == (sys.stdout, sys.stderr)
    files = sorted((tmp_path / "run" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2 and files[0].name == files[1].name  # the run's id
    first, second = map(history, files)
    steps = [row["_step"] for row in first if "train/loss" in row]
    assert steps == list(range(12))
    assert first[0].keys() >= OF_A_STEP
    shown = {row["_step"]: row["train/loss"] for row in first if "train/loss" in row}
    assert shown == pytest.approx(losses(tmp_path / "run"))
    assert [row["_step"] for row in first if "val/loss" in row] == [4, 8, 11]
    # What it knows already is the same again, and left out.
    assert [row["_step"] for row in second if "train/loss" in row] == [10, 11]
    assert "summary/val_loss" in second[-1]


def test_trackio_goes_on_in_its_own_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio")
    run_killed_and_resumed(tmp_path / "run", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("fastlm")
    rows = [row for row in SQLiteStorage.get_logs("fastlm", name) if "train/loss" in row]
    # Those behind 9 twice, since the run was not killed: it was given them before.
    assert sorted(row["step"] for row in rows) == sorted([*range(12), 10, 11])
    shown = {row["step"]: row["train/loss"] for row in rows}
    assert shown == pytest.approx(losses(tmp_path / "run"))


class FakeProgram:
    """Stands for wandb or trackio: keeps what it gets."""

    def __init__(self):
        self.given, self.logged, self.closed = [], [], []

    def init(self, **given):
        self.given.append(given)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)),
            finish=lambda **how: self.closed.append(how),
        )

    Html = Markdown = staticmethod(lambda text: ("text", text))
    Settings = staticmethod(lambda **settings: settings)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_the_programs_are_given(tmp_path, monkeypatch, name):
    program = FakeProgram()
    monkeypatch.setitem(sys.modules, name, program)
    monkeypatch.setattr(track, "check_trackers", lambda names: None)
    monkeypatch.setattr("fastlm.train.check_trackers", lambda names: None)
    run_killed_and_resumed(tmp_path / "run", name)
    first, second = program.given
    assert first["project"] == second["project"] == "fastlm" and first["resume"] == "allow"
    identity = {"wandb": "id", "trackio": "name"}[name]
    assert first[identity] == second[identity]
    assert first["name"].startswith("run") and first["config"]["d_model"] == 32
    steps = [step for step, values in program.logged if "train/loss" in values]
    assert steps == [*range(12), 10, 11]
    assert len(program.closed) == 2


def rows_of(path: Path) -> list[dict]:
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_csv_has_each_step_once(tmp_path):
    run_killed_and_resumed(tmp_path, "csv")
    rows = rows_of(tmp_path / "logs" / "train.csv")
    of_train = {int(row["step"]): float(row["loss"]) for row in rows if row["loss"]}
    assert of_train == losses(tmp_path)
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(12))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [4, 8, 11]
    last = rows[-2]
    assert int(last["tokens"]) == 12 * 128 and float(last["mfu"]) > 0
    assert int(last["memory_bytes"]) > 1 << 20 and float(last["seconds"]) > 0
    # A new run in the same place begins anew.
    run_tiny(tmp_path, total_steps=3, track=("csv",), overwrite=True)
    assert [row["step"] for row in rows_of(tmp_path / "logs" / "train.csv")] == list("0122")


def test_metrics_have_what_a_picture_needs_without_trackers(tmp_path):
    run_tiny(tmp_path, total_steps=3)
    rows = metrics(tmp_path, "train")
    assert [row["tokens"] for row in rows] == [128, 256, 384]
    seconds = [row["seconds"] for row in rows]
    assert 0 < seconds[0] <= seconds[1] <= seconds[2] < 100
    assert all(row["memory_bytes"] > 0 for row in rows)
    assert not any("mfu" in row for row in rows)  # nobody has asked for two seconds of matmuls


@pytest.mark.parametrize("place", ["__init__", "row", "close"])
def test_a_tracker_that_fails_is_left_out(tmp_path, monkeypatch, capsys, place):
    def fail(self, *args):
        raise ConnectionError("no route to host\nmore")

    run_tiny(tmp_path / "plain")
    monkeypatch.setattr(track.Csv, place, fail)
    others = ["tensorboard"] if track.importlib.util.find_spec("tensorboard") else []
    capsys.readouterr()
    run_tiny(tmp_path / "run", track=("csv", *others))
    said = capsys.readouterr().out
    line = "[track] csv: left out from now on (ConnectionError: no route to host); the run goes on"
    assert said.count("[track]") == 1 and line in said.splitlines()
    assert "missing" not in said
    if others:
        assert len(events(tmp_path / "run" / "logs" / "tensorboard").Scalars("train/loss")) == 12
    a, b = (state(checkpoint(tmp_path / name)) for name in ("plain", "run"))
    assert same(a, b)


def test_a_step_taken_back_is_taken_back_everywhere(tmp_path, monkeypatch):
    """The guard rolls back: the run goes on at step 3 with other data."""
    pytest.importorskip("tensorboard")
    program = FakeProgram()
    monkeypatch.setitem(sys.modules, "wandb", program)
    cfg = tiny_config(tmp_path, track=("csv", "tensorboard", "wandb"))
    Path(cfg.log_dir).mkdir()
    log = RunLog(
        cfg.log_dir, "train", missing=Missing(), resuming=False, start_step=0, total_steps=9
    )
    log.track(cfg, "0123456789abcdef")
    log.metrics("start", step=0)
    speed = dict(lr=1.0, grad_norm=math.nan, steps_per_second=1.0, tokens_per_second=1.0)
    for step in range(6):
        log.train(step, loss=float(step), avg_loss=0.0, **speed)
    log.rewind(3)
    for step in range(3, 8):
        log.train(step, loss=10.0 + step, avg_loss=0.0, **speed)
    log.flush()
    expected = {0: 0, 1: 1, 2: 2, 3: 13, 4: 14, 5: 15, 6: 16, 7: 17}
    shown = events(Path(cfg.log_dir) / "tensorboard")
    assert {event.step: event.value for event in shown.Scalars("train/loss")} == expected
    assert "train/grad_norm" not in shown.Tags()["scalars"]  # it was not finite
    rows = rows_of(Path(cfg.log_dir) / "train.csv")
    assert {int(row["step"]): float(row["loss"]) for row in rows} == expected
    assert [row["step"] for row in rows] == list("01234567")
    # What is append-only keeps the other branch.
    steps = [(step, values["train/loss"]) for step, values in program.logged]
    assert steps == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 16), (7, 17)]


def test_several_are_given_with_commas_or_spaces(tmp_path):
    assert tiny_config(tmp_path, track=("csv,wandb", "trackio")).track == (
        "csv",
        "wandb",
        "trackio",
    )
    with pytest.raises(ConfigError, match="track='mlflow': it must be of tensorboard, wandb"):
        tiny_config(tmp_path, track=("csv,mlflow",))


def test_the_command_feeds_them_and_a_resumed_run_brings_them_back(tmp_path):
    write_tokens(tmp_path)
    first = commands().run([*tiny_flags(ckpt_every=4), "--track", "csv"], tmp_path)
    assert first.returncode == 0, first.output
    resumed = ["--resume", "run/checkpoints/checkpoint_4.pt", "--device", "cpu"]
    files = ["--data", "train.npy", "--val-data", "val.npy"]
    second = commands().run([*resumed, *files], tmp_path)
    assert second.returncode == 0, second.output
    rows = rows_of(tmp_path / "run" / "logs" / "train.csv")
    assert [int(row["step"]) for row in rows if row["loss"]] == list(range(12))
    third = commands().run([*resumed, *files, "--track"], tmp_path)
    assert third.returncode == 0 and "changed: track: ('csv',) -> ()" in third.output


def test_a_package_that_is_missing_is_named_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"track='wandb': .* pip install 'fastlm\[wandb\]'"):
        run_tiny(tmp_path / "run", track=("wandb",))
    assert not (tmp_path / "run").exists()
    track.check_trackers(("csv",))
