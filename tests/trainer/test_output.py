"""Closed pipes, full disks, removed directories: a run goes on, its end says what is missing."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import listing, losses, metrics, same, state, tiny_flags, write_tokens

import fastlm.run.output
from fastlm.run.log import RunLog, has_ended, metrics_path
from fastlm.run.output import LineFile, Missing, replace_content, surviving_output

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")


# --- stdout and stderr ---


@FULL
@pytest.mark.parametrize("kind", ["full", "pipe"])
def test_a_lost_stdout_does_not_end_a_run(tmp_path, kind):
    write_tokens(tmp_path)
    argv = ["stdout", kind, *tiny_flags(ckpt_every=4)]
    result = commands().run(argv, tmp_path, call="command_programs:train_onto")
    assert result.returncode == 1 and "Traceback" not in result.output, result.output
    reason = {"full": "No space left on device", "pipe": "Broken pipe"}[kind]
    form = rf"\[train\] missing: \d+ lines of stdout \({reason}\)\n"
    assert re.fullmatch(form, result.stderr), result.stderr
    assert losses(tmp_path / "run").keys() == set(range(12))
    assert len(metrics(tmp_path / "run", "summary")) == 1
    for name in ("4", "8", "final", "model"):
        assert checkpoint(tmp_path / "run", name).exists()


@FULL
@pytest.mark.parametrize("stream, kind", [("stdout", "closed"), ("stderr", "closed")])
def test_a_stream_that_was_closed_on_purpose_is_not_missed(tmp_path, stream, kind):
    """And no file of the run is opened in its place: what goes to stderr must not get into it."""
    write_tokens(tmp_path)
    argv = [stream, kind, *tiny_flags(total_steps=3)]
    result = commands().run(argv, tmp_path, call="command_programs:train_onto")
    assert result.returncode == 0, result.output
    assert checkpoint(tmp_path / "run").exists()


@FULL
def test_a_user_error_with_a_lost_stderr_keeps_its_code(tmp_path):
    argv = ["stderr", "pipe", *tiny_flags(data="nowhere.npy")]
    result = commands().run(argv, tmp_path, call="command_programs:train_onto")
    assert result.returncode == 2 and "Traceback" not in result.output, result.output


def test_python_says_nothing_of_a_closed_pipe_at_exit():
    """In a real process, whose interpreter flushes stdout at its end: else its code is 120."""
    path = fastlm.run.output.__file__
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("output", {path!r})
output = importlib.util.module_from_spec(spec)
spec.loader.exec_module(output)
import sys
sys.stdin.readline()  # the reader is gone
with output.surviving_output() as missing:
    print("lost")
output.silence_broken_streams()
sys.exit(int(bool(missing)))
"""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE, stdout=writer, stderr=subprocess.PIPE, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    )  # fmt: skip
    os.close(writer)
    os.close(reader)
    _, stderr = process.communicate("\n")
    assert process.returncode == 1
    assert stderr == "[train] missing: 1 line of stdout (Broken pipe)\n"


class Flaky(io.StringIO):
    """Fails while `full`."""

    full = False
    encoding = "ascii"

    def write(self, text):
        text.encode("ascii")
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_a_stream_is_tried_again_at_the_next_line(monkeypatch):
    out, err = Flaky(), Flaky()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with surviving_output() as missing:
        print("one")
        out.full = True
        print("two")
        print("three")
        out.full = False
        print("f\u00fcnf")  # what an ASCII terminal cannot show is spelled out
        with surviving_output() as inner:
            assert inner is missing
        print("six", flush=True)
    assert sys.stdout is out and sys.stderr is err
    assert "one\nf\\xfcnf\nsix\n" in out.getvalue() and "two" not in out.getvalue()
    assert out.getvalue().endswith("[train] missing: 2 lines of stdout (No space left on device)\n")
    assert err.getvalue() == "[train] missing: 2 lines of stdout (No space left on device)\n"
    with surviving_output() as missing:
        print("nothing is missing", file=out)
    assert not missing and out.getvalue().endswith("nothing is missing\n")


def test_a_closed_stream_is_survived(monkeypatch):
    out = io.StringIO()
    out.close()
    monkeypatch.setattr(sys, "stdout", out)
    with surviving_output() as missing:
        print("lost", flush=True)
    assert str(missing).startswith("1 line of stdout (")


# --- log files ---


@FULL
def test_lines_wait_for_room_in_their_file(tmp_path):
    path, missing = tmp_path / "logs" / "a.log", Missing()
    path.parent.mkdir()
    path.symlink_to("/dev/full")
    file = LineFile(path, missing)
    file.write("one")
    file.write("two")
    path.unlink()
    file.write("three")
    assert path.read_text() == "one\ntwo\nthree\n"
    file.close()
    assert not missing
    path.unlink()
    path.symlink_to("/dev/full")
    file.write("four")
    file.close()
    assert str(missing) == f"1 line of {path} (No space left on device)"


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path, missing = tmp_path / "a.log", Missing()
    file = LineFile(path, missing)
    file.write("one")
    write, left = os.write, [2]

    def short(handle, data):
        if not left[0]:
            raise OSError(28, "No space left on device")
        count = write(handle, data[: left[0]])
        left[0] -= count
        return count

    monkeypatch.setattr(os, "write", short)
    file.write("two")
    assert path.read_text() == "one\n"
    monkeypatch.undo()
    file.write("three")
    assert path.read_text() == "one\ntwo\nthree\n"


@FULL
def test_waiting_lines_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(fastlm.run.output, "_KEPT_BYTES", 100)
    path, missing = tmp_path / "a.log", Missing()
    path.symlink_to("/dev/full")
    file = LineFile(path, missing)
    for i in range(50):
        file.write(f"{i:09d}")
    path.unlink()
    file.write("the last")
    assert path.read_text().splitlines() == [f"{i:09d}" for i in range(40, 50)] + ["the last"]
    assert str(missing) == f"40 lines of {path} (No space left on device)"


def test_logs_that_are_removed_come_back(tmp_path, monkeypatch, capsys):
    log_train = RunLog.train

    def removing(self, step, **values):
        if step == 5:
            shutil.rmtree(self.directory)
        log_train(self, step, **values)

    monkeypatch.setattr(RunLog, "train", removing)
    run_tiny(tmp_path / "run")
    assert losses(tmp_path / "run").keys() == set(range(5, 12))
    assert (tmp_path / "run" / "logs" / "train.log").read_text().count(" loss ") == 7
    said = capsys.readouterr().out
    last = said.splitlines()[-1]
    assert last.startswith("[train] missing: the beginning of ") and "metrics.jsonl" in last


@FULL
def test_full_log_files_cost_lines_and_nothing_else(tmp_path):
    write_tokens(tmp_path)
    logs = tmp_path / "run" / "logs"
    logs.mkdir(parents=True)
    for name in ("train.log", "metrics.jsonl"):
        (logs / name).symlink_to("/dev/full")
    result = commands().run(tiny_flags(dropout=0.1, ckpt_every=4), tmp_path)
    assert result.returncode == 1, result.output
    last = result.stdout.splitlines()[-1]
    assert re.search(r"missing: \d+ lines of \S+train.log \(No space", last), last
    assert re.search(r"; \d+ lines of \S+metrics.jsonl \(No space", last), last
    plain = commands().run(tiny_flags(dropout=0.1, target_dir="plain"), tmp_path)
    assert plain.returncode == 0
    a, b = (state(checkpoint(tmp_path / name)) for name in ("run", "plain"))
    assert same(a, b)
    for name in ("4", "8", "final", "model"):
        assert checkpoint(tmp_path / "run", name).exists()


# --- metrics ---


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


HOSTILE = [
    b"17", b"[]", b'{"step": 1}', b"\xff", b"", b"null", b'{"event": "train"}', b'{"event": 3}',
    b'{"event": "train", "step": 1}', b'{"event": "val", "step": 2, "val_loss": "x"}',
    b'{"event": "train", "step": "x", "loss": 1, "lr": 1}', b"[" * 100_000,
    b'{"event": "train", "step": 1, "loss": NaN, "lr": null}', b'{"event": "summary", "step": []}',
]  # fmt: skip


def test_hostile_lines_never_stop_a_resume(tmp_path):
    run_tiny(tmp_path / "run", ckpt_every=6)
    path = metrics_path(tmp_path / "run" / "logs")
    whole = path.read_bytes()
    for line in HOSTILE:
        path.write_bytes(line + b"\n" + whole + line)
        assert has_ended(path.parent) in (False, True)
        run_tiny(tmp_path / "run", ckpt_path_to_resume=str(checkpoint(tmp_path / "run", 6)))
        steps = [row["step"] for row in rows_of(path) if row["event"] == "train"]
        assert [step for step in steps if step >= 6] == [*range(6, 12)], line


def test_a_resumed_run_repeats_no_row(tmp_path):
    run_tiny(tmp_path / "run", ckpt_every=4, eval_every=3)
    path = metrics_path(tmp_path / "run" / "logs")
    earlier = (
        b'{"event": "start", "step": 0}\n{"event": "train", "step": 700, "loss": 1.5, "lr": 1}\n'
    )
    torn = path.read_bytes()
    path.write_bytes(earlier + torn + b'{"event": "train", "step": 12, "lo')
    resumed = str(checkpoint(tmp_path / "run", 8))
    run_tiny(tmp_path / "run", eval_every=3, ckpt_path_to_resume=resumed)
    assert path.read_bytes().startswith(earlier)  # another run's
    rows = rows_of(path)[2:]
    assert [r["step"] for r in rows if r["event"] == "train"] == list(range(12))
    assert [r["step"] for r in rows if r["event"] == "val"] == [3, 6, 9, 11]
    assert [r["step"] for r in rows if r["event"] == "start"] == [0, 8]
    assert not [name for name in listing(path.parent) if name.endswith(".tmp")]


def test_what_json_cannot_say_is_null(tmp_path):
    missing = Missing()
    log = RunLog(tmp_path, "train", missing=missing, resuming=False, start_step=0, total_steps=1)
    log.metrics("val", step=0, val_loss=float("nan"), more=[float("inf"), {"x": (1.5, -1e999)}])
    (row,) = rows_of(tmp_path / "metrics.jsonl")
    assert (row["val_loss"], row["more"]) == (None, [None, {"x": [1.5, None]}])


def test_each_prefix_has_its_metrics(tmp_path):
    for prefix, name in (("train", "metrics.jsonl"), ("other", "other_metrics.jsonl")):
        extra = dict(log_save_prefix=prefix, ckpt_save_prefix=prefix)
        run_tiny(tmp_path / "run", total_steps=3, **extra)
        rows = rows_of(tmp_path / "run" / "logs" / name)
        assert [row["step"] for row in rows if row["event"] == "train"] == [0, 1, 2]
        assert has_ended(tmp_path / "run" / "logs", prefix)
    assert len(rows_of(tmp_path / "run" / "logs" / "metrics.jsonl")) == len(rows)


def test_the_old_content_stays_where_the_new_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_content(path, b"new")
    assert listing(tmp_path) == {"a": b"old"}
    # A resumed run says that its metrics could not be cut, and goes on.
    missing = Missing()
    (tmp_path / "metrics.jsonl").write_text('{"event": "train", "step": 3, "loss": 1, "lr": 1}\n')
    RunLog(tmp_path, "train", missing=missing, resuming=True, start_step=2, total_steps=9)
    assert str(missing).startswith("the cut of ") and "at step 2" in str(missing)
