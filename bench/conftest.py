"""pytest bench --benchmark-only [--allocator as-is|kept] [--results PREFIX] [--slow] [-k cpu]

NANOGPT=DIR names a checkout of nanoGPT, a peer of the training step.

`make bench` runs both allocator states, each in a process of its own: mallopt cannot be undone.
"""

import json
import os
import platform
import shlex
import subprocess
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import harness
import pytest
import torch

import fastlm
from fastlm import keep_freed_memory
from fastlm.extension import extension
from fastlm.hardware import device_name

ROOT = Path(__file__).resolve().parents[1]


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
    parser.addoption(
        "--results",
        metavar="PREFIX",
        help="write figures and circumstances to PREFIX-as-is.json or PREFIX-kept.json",
    )


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
            **circumstances(list(item.config.invocation_params.args)),
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


def circumstances(arguments: list[str]) -> dict[str, object]:
    """What a figure means nothing without."""
    cuda = torch.cuda.is_available()
    packages = ("torch", "numpy", "triton", "pytest-benchmark")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["pytest", *arguments]),
        "commit": _commit(),
        "cpu": device_name(torch.device("cpu")),
        "cpu_features": [name for name, has in extension().cpu_features().items() if has],
        "isa": extension().isa(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "system": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "load_average": os.getloadavg(),
        "versions": {
            "fastlm": fastlm.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
            "cuda": torch.version.cuda if cuda else None,
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit, with "+changes" where what is measured differs; "unknown" outside git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        changed = git("status", "--porcelain", "fastlm", "csrc", "kernels")
        return commit + ("+changes" if changed else "") or "unknown"
    except OSError:
        return "unknown"
