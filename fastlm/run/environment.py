"""What a run's bits depend on beside its settings and data.

On a CPU a run gives the same bits again, resumed or not, on the same kind of processor with the
same number of threads, dtype, versions and compilation; not with compile_mode max-autotune, which
chooses kernels by their time. On CUDA that holds where torch's operations do: attention's backward
and some reductions may add in another order each time. There `deterministic` lets torch choose the
operations that do not, and stops with an error at one that has no such form; fastlm's own kernels
add in a fixed order. On MPS nothing is promised beyond the order of the data.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fastlm import __version__
from fastlm.errors import shown
from fastlm.extension import extension
from fastlm.hardware import device_name, matmul_precision


def environment(
    device: torch.device, dtype: torch.dtype, *, compiled: bool, processes: int = 1
) -> dict[str, Any]:
    """Name -> plain value, for a checkpoint."""
    threads = torch.get_num_threads()
    return {
        "device": f"{device.type} ({device_name(device).removesuffix(f', {threads} threads')})",
        "dtype": str(dtype).removeprefix("torch."),
        "threads": threads,
        "processes": processes,
        "compile": compiled,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": matmul_precision(),
        "torch": str(torch.__version__),
        "numpy": _version("numpy"),
        "triton": _version("triton"),
        "fastlm": __version__,
        "kernels": _kernels(device),
    }


def differences(stored: Any, now: Mapping[str, Any]) -> list[str]:
    """A line for each thing that differs from a checkpoint's environment."""
    if not isinstance(stored, Mapping):
        return []  # another program's
    return [
        f"{name}: {shown(stored[name])} -> {shown(value)}"
        for name, value in now.items()
        if name in stored and stored[name] != value
    ]


@contextlib.contextmanager
def deterministic_algorithms(*, warn_only: bool = False) -> Iterator[None]:
    """torch.use_deterministic_algorithms inside; as before behind it."""
    if not warn_only:
        # cuBLAS reads it when it is first used in the process, and without it adds in any order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    # A caller who wants errors gets them.
    torch.use_deterministic_algorithms(True, warn_only=warn_only and (warns or not before))
    torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _kernels(device: torch.device) -> str:
    """A hash of the sources of the kernels that run on `device`."""
    if device.type == "cpu":
        return extension().SOURCE_HASH[:16]
    from fastlm import kernels

    sha256 = hashlib.sha256()
    for path in sorted(file for folder in kernels.__path__ for file in Path(folder).glob("*.py")):
        sha256.update(path.name.encode() + path.read_bytes())
    return sha256.hexdigest()[:16]
