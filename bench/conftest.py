"""pytest bench --benchmark-only [--results FILE.json] [-k cpu]"""

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
from fastlm.extension import extension
from fastlm.hardware import device_name, keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]


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
            **circumstances(arguments),
            "comparisons": [asdict(comparison) for comparison in harness.COMPARISONS],
        }
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(results, indent=1, default=str) + "\n")
        terminalreporter.write_line(f"\nwritten: {path}")


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
        "parallel": extension().PARALLEL_BACKEND,
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
