"""Fixtures of the tests of several processes."""

from pathlib import Path

import pytest
from training_runs import write_tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Token files, and the runs of a file's tests: some are compared with each other."""
    directory = tmp_path_factory.mktemp("runs")
    write_tokens(directory)
    return directory
