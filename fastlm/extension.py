"""Loads the compiled extension `fastlm._C`, and checks that it belongs to the sources beside it."""

import functools
import hashlib
import importlib
from pathlib import Path
from types import ModuleType

import torch  # noqa: F401  (loaded first, so that its OpenMP runtime is the one that is shared)

from fastlm.errors import ExtensionError

_HOW_TO_BUILD = "build it with `pip install -e .` in the repository (or reinstall fastlm)"


@functools.cache
def extension() -> ModuleType:
    """`fastlm._C`, checked to be built from the sources beside it.

    Raises ExtensionError, which says how to build it, if it is missing or stale. Loaded when
    first needed: `import fastlm` works without it.
    """
    try:
        module = importlib.import_module("fastlm._C")
    except ImportError as error:
        raise ExtensionError(
            f"the compiled extension fastlm._C cannot be loaded ({error}); {_HOW_TO_BUILD}"
        ) from error
    from fastlm import __version__

    if __version__ != module.VERSION:
        raise ExtensionError(
            f"the compiled extension fastlm._C is of version {module.VERSION}, fastlm of "
            f"{__version__}; {_HOW_TO_BUILD}"
        )
    # In a checkout the sources may have changed since the build; an installed wheel has none.
    root = Path(__file__).resolve().parents[1]
    if (root / "csrc" / "bindings.cpp").exists() and source_hash(root) != module.SOURCE_HASH:
        raise ExtensionError(
            f"the compiled extension fastlm._C is older than csrc/; {_HOW_TO_BUILD}"
        )
    return module


def source_hash(root: Path) -> str:
    """SHA-256 over csrc/, as CMakeLists.txt computes it for the binary."""
    sources = sorted(
        path.relative_to(root).as_posix()
        for path in (root / "csrc").iterdir()
        if path.suffix in (".h", ".inc", ".cpp")
    )
    lines = "".join(
        f"{source} {hashlib.sha256((root / source).read_bytes()).hexdigest()}\n"
        for source in sources
    )
    return hashlib.sha256(lines.encode()).hexdigest()
