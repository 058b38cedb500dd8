"""Runs on mixtures and several validation sets: each is logged, and a run resumes exactly."""

import numpy as np
import pytest
from in_process import TRAIN, VAL, checkpoint
from training_runs import metrics, same, state, tiny_config, tiny_flags

from fastlm import train_loop
from fastlm.data.dataset import as_dataset
from fastlm.data.mixture import Mixture
from fastlm.errors import CheckpointError
from fastlm.train import main

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras", "signals_as_in_a_terminal")

OTHER = TRAIN[::-1].copy()
SETS = {"one": VAL, "two": OTHER[:700]}


def run(target_dir, weight=0.7, **settings) -> None:
    mixture = Mixture([("a", as_dataset(TRAIN), weight), ("b", as_dataset(OTHER), 1 - weight)])
    train_loop(mixture, SETS, tiny_config(target_dir, **settings))


def test_a_resumed_run_on_a_mixture_is_the_uninterrupted_one(tmp_path, capsys):
    run(tmp_path / "straight")
    assert "[run] samples: 70.0% a, 30.0% b" in capsys.readouterr().out
    run(tmp_path / "half", ckpt_every=5)
    half = str(checkpoint(tmp_path / "half", 5))
    run(tmp_path / "rest", ckpt_path_to_resume=half)
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))
    with pytest.raises(CheckpointError, match="its run read other data or in another order"):
        run(tmp_path / "other", weight=0.5, ckpt_path_to_resume=half)


def test_each_validation_set_is_logged_by_its_name(tmp_path, capsys):
    run(tmp_path, eval_every=5)
    output = capsys.readouterr().out
    rows = metrics(tmp_path, "val")
    assert [row["step"] for row in rows] == [5, 10, 11]
    for row in rows:
        parts = [row["val_loss/one"], row["val_loss/two"]]
        assert parts[0] != parts[1] and row["val_loss"] == sum(parts) / 2
        line = f"val_loss {row['val_loss']:.4f} (one {parts[0]:.4f}, two {parts[1]:.4f})"
        assert f"[VAL] step {row['step']:06d} {line}" in output
    (summary,) = metrics(tmp_path, "summary")
    assert summary["val_loss"] == (summary["val_loss/one"] + summary["val_loss/two"]) / 2
    assert summary["val_targets"] == len(VAL) - 1 + 700 - 1
    assert f"[summary] validation  two: loss {summary['val_loss/two']:.4f} nats/token" in output
    # Each is what it would be alone.
    alone = tmp_path / "alone"
    train_loop(
        TRAIN, SETS["two"], tiny_config(alone, eval_only=True, init_from=str(checkpoint(tmp_path)))
    )
    (line,) = [li for li in capsys.readouterr().out.splitlines() if li.startswith("[VAL] val_loss")]
    assert line == f"[VAL] val_loss {summary['val_loss/two']:.4f} over all 699 targets"


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, array in {"a": TRAIN, "b": OTHER, "v": VAL, "w": OTHER[:700]}.items():
        np.save(tmp_path / f"{name}.npy", array)
    data = ["a.npy:3", "b.npy:1"]
    argv = tiny_flags(data=data, val_data=["v=v.npy", "w=w.npy"], total_steps=3)
    assert main(argv) == 0
    assert "[run] samples: 75.0% a.npy, 25.0% b.npy" in capsys.readouterr().out
    assert set(metrics(tmp_path / "run", "val")[0]) >= {"val_loss/v", "val_loss/w"}
    assert main(["--resume", "run", "--eval-only"]) == 0
    output = capsys.readouterr().out
    assert "[VAL] v: loss" in output and "[VAL] w: loss" in output
    assert main(tiny_flags(data=["a.npy:3", "b.npy:x"], target_dir="other")) == 2
    assert "b.npy:x has no weight" in capsys.readouterr().err
