"""Test files that Triton's interpreter runs: TRITON_INTERPRET=1 is set before kernels are imported.

So each has a process of its own; and where it is set nothing can be compiled (aot.py).
"""

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def run_interpreted(
    folder: str, *files: str, keyword: str = "", marks: str = "not exhaustive"
) -> tuple[int, str]:
    """Runs test files of tests/`folder` with the interpreter, of them what pytest's -k and -m
    select; (how many passed, the summary line)."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        keyword,
        "-m",
        marks,
    ]
    command += [str(TESTS / folder / file) for file in files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    return int(re.search(r"(\d+) passed", summary)[1]), summary


def sampled(chosen: Callable[..., bool], names: str, *values: Iterable):
    """Parametrizes with every combination of `values`; what is not `chosen` is exhaustive."""
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*case, marks=() if chosen(*case) else pytest.mark.exhaustive)
            for case in itertools.product(*values)
        ],
    )
