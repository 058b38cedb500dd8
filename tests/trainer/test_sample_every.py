"""Samples during training: where they are shown, and that the run is the same with them."""

import json

import pytest
import torch
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import flags, losses, metrics, same, state, tiny_flags, write_prepared

from fastlm.run.track import Trackers

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def test_training_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Also where the run is resumed behind a sample; every generator is as it was."""
    seen = []
    row = Trackers.row
    monkeypatch.setattr(Trackers, "row", lambda self, r: (seen.append(r), row(self, r)))
    settings = dict(dropout=0.2, ckpt_every=6)
    run_tiny(tmp_path / "plain", **settings)
    run_tiny(tmp_path / "run", sample_every=4, track=("csv",), **settings)
    first = [r for r in seen if r["event"] == "sample"]
    assert [r["step"] for r in first] == [4, 8]
    (text,) = first[0]["texts"]
    assert len(text.split()) == 101 and all(word.isdecimal() for word in text.split())
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert metrics(tmp_path / "run", "sample") == first
    seen.clear()
    resumed = str(checkpoint(tmp_path / "run", 6))
    run_tiny(
        tmp_path / "run", sample_every=4, track=("csv",), ckpt_path_to_resume=resumed, **settings
    )
    again = [r for r in seen if r["event"] == "sample"]
    assert [(r["step"], r["texts"]) for r in again] == [(8, first[1]["texts"])]
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    a, b = (state(checkpoint(tmp_path / name)) for name in ("plain", "run"))
    assert same(a, b)


def test_text_in_the_log_and_on_the_console(tmp_path):
    write_prepared(tmp_path / "data")
    argv = tiny_flags(data="data", val_data=None, vocab_size=None, context_len=8)
    result = commands().run([*argv, *flags(sample_every=5)], tmp_path)
    assert result.returncode == 0, result.output
    log = (tmp_path / "run" / "logs" / "train.log").read_text().splitlines()
    lines = [line for line in log if line.startswith("[SAMPLE]")]
    assert [line[:22] for line in lines] == ['[SAMPLE] step 000005 "', '[SAMPLE] step 000010 "']
    texts = [json.loads(line[21:]) for line in lines]
    for step, text in zip((5, 10), texts, strict=True):
        assert f"[sample] step {step}:\n{text.strip()}\n" in result.stdout
    rows = metrics(tmp_path / "run", "sample")
    assert [row["step"] for row in rows] == [5, 10, 12]
    assert [row["texts"] for row in rows[:2]] == [[text] for text in texts]
    assert len(rows[2]["texts"]) == 5  # those of the end
    assert metrics(tmp_path / "run", "summary")  # still the last row:
    last = (tmp_path / "run" / "logs" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["event"] == "summary"


def test_a_sample_that_fails_costs_a_line(tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        torch.rand(3)  # and what it has drawn until then
        raise RuntimeError("no memory for the cache")

    run_tiny(tmp_path / "plain", dropout=0.2)
    monkeypatch.setattr("fastlm.run.finish.sample_texts", fail)
    capsys.readouterr()
    run_tiny(tmp_path / "run", dropout=0.2, sample_every=6)
    assert "[train] no sample (RuntimeError: no memory for the cache)" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
