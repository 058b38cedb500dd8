"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest


@pytest.fixture
def without_extras(monkeypatch):
    """In this process: no second of matmuls and no picture at the end of each run."""
    monkeypatch.setattr("fastlm.run.summary.matmul_ceiling", lambda *_: 1e12)
    monkeypatch.setattr("fastlm.run.plot.LivePlotter.save", lambda self, path: None)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of two steps."""
    from checkpoints import make_pair

    from fastlm import save_checkpoint

    path = tmp_path / "checkpoint_2.pt"
    save_checkpoint(*make_pair(), 2, path)
    return path
