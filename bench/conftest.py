"""pytest bench --benchmark-only [--allocator as-is|kept] [--results PREFIX] [--slow] [-k cpu]

--tiny rehearses: every line, no figures.

NANOGPT=DIR names a checkout of nanoGPT, a peer of the training step.

`make bench` runs both allocator states, each in a process of its own: mallopt cannot be undone.
"""

import json
from dataclasses import asdict
from pathlib import Path

import harness
import pytest
import torch

from fastlm import keep_freed_memory


def pytest_addoption(parser):
    parser.addoption(
        "--allocator",
        choices=("as-is", "kept"),
        default="as-is",
        help="a process as it is, or after fastlm.keep_freed_memory(); for all candidates alike",
    )
    parser.addoption(
        "--slow", action="store_true", help="the cases, too, that take minutes on a CPU"
    )
    parser.addoption("--tiny", action="store_true", help="rehearse, with tiny shapes")
    parser.addoption(
        "--results",
        metavar="PREFIX",
        help="write figures and circumstances to PREFIX-as-is.json or PREFIX-kept.json",
    )


def pytest_configure(config):
    harness.TINY = config.getoption("--tiny")  # before the files that it decides about are read


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark_only"):
        skip = pytest.mark.skip(reason="benches run with: pytest bench --benchmark-only")
        for item in items:
            if Path(item.path).parent == Path(__file__).parent:
                item.add_marker(skip)


def pytest_sessionstart(session):
    config = session.config
    if config.getoption("benchmark_only") and config.getoption("--allocator") == "kept":
        assert keep_freed_memory()


@pytest.fixture
def allocator(request) -> str:
    return request.config.getoption("--allocator")


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_runtest_teardown(item):
    """After each bench: a run that is ended early keeps what it has."""
    if path := results_path(item.config):
        results = {
            **harness.circumstances(["pytest", *item.config.invocation_params.args]),
            "allocator": item.config.getoption("--allocator"),
            "comparisons": [asdict(comparison) for comparison in harness.COMPARISONS],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1, default=str) + "\n")


def pytest_terminal_summary(terminalreporter, config):
    for comparison in harness.COMPARISONS:
        terminalreporter.write_line("")
        terminalreporter.write_line(comparison.table())
    if path := results_path(config):
        terminalreporter.write_line(f"\nwritten: {path}")


def results_path(config) -> Path | None:
    prefix, allocator = config.getoption("--results"), config.getoption("--allocator")
    return Path(f"{prefix}-{allocator}.json") if prefix and harness.COMPARISONS else None
