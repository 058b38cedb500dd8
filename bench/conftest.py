"""pytest bench --benchmark-only [--results FILE.json] [-k cpu]"""

import json
from dataclasses import asdict
from pathlib import Path

import harness
import pytest
import torch

from fastlm.hardware import keep_freed_memory


def pytest_addoption(parser):
    parser.addoption(
        "--results", metavar="FILE", help="write the benches' figures and their circumstances here"
    )


def pytest_collection_modifyitems(config, items):
    if not config.getoption("benchmark_only"):
        skip = pytest.mark.skip(reason="benches run with: pytest bench --benchmark-only")
        for item in items:
            if Path(item.path).parent == Path(__file__).parent:
                item.add_marker(skip)


def pytest_sessionstart(session):
    if session.config.getoption("benchmark_only"):
        # As the trainer does, here for all candidates alike: their outputs are not page-faulted
        # anew at each call.
        keep_freed_memory()


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def pytest_terminal_summary(terminalreporter, config):
    for comparison in harness.COMPARISONS:
        terminalreporter.write_line("")
        terminalreporter.write_line(comparison.table())
    path = config.getoption("--results")
    if path and harness.COMPARISONS:
        arguments = list(config.invocation_params.args)
        results = {
            **harness.environment(arguments),
            "comparisons": [asdict(comparison) for comparison in harness.COMPARISONS],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=1, default=str) + "\n")
        terminalreporter.write_line(f"\nwritten: {path}")
