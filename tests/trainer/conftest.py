"""Fixtures of the trainer's tests."""

from pathlib import Path

import pytest


@pytest.fixture
def saved(tmp_path) -> Path:
    """A checkpoint of two steps."""
    from checkpoints import make_pair

    from fastlm import save_checkpoint

    path = tmp_path / "checkpoint_2.pt"
    save_checkpoint(*make_pair(), 2, path)
    return path
