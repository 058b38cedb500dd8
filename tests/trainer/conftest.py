"""Fixtures of the trainer's tests."""

import signal
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


@pytest.fixture
def signals_as_in_a_terminal():
    """Whoever started the tests: a background job begins with SIGINT ignored."""
    usual = {number: signal.SIG_DFL for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)}
    usual[signal.SIGINT] = signal.default_int_handler
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
