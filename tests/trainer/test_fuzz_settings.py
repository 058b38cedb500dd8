"""Hostile settings end in a line and exit code 2, whatever they are."""

import re

import pytest
from command_server import commands


@pytest.mark.parametrize(
    "cases, seed", [(100, 10), pytest.param(3000, 11, marks=pytest.mark.exhaustive)]
)
def test_settings_that_nobody_writes(tmp_path, cases, seed):
    """In checkpoints, TOML files and flags, a third of the cases each."""
    result = commands().run(
        [str(cases), str(seed)], tmp_path, call="fuzz_settings:main", timeout=600
    )
    assert result.returncode == 0, result.output
    refused = int(re.search(r"(\d+) refused, 0 failures", result.stdout)[1])
    assert cases // 2 < refused < cases  # and the others were harmless
