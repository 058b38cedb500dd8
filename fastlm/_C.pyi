"""Signatures of the compiled extension (csrc/bindings.cpp)."""

import numpy as np
import numpy.typing as npt

SOURCE_HASH: str
VERSION: str
PARALLEL_BACKEND: str  # "openmp" or "std::thread"

def gather_batch(
    segments: list[np.ndarray],  # (n_i,) each, one dtype: uint8, uint16, uint32, int32 or int64
    starts: npt.NDArray[np.int64],  # (B,)
    x: np.ndarray,  # (B, T) int32 or int64, written
    y: np.ndarray,  # (B, T), written
) -> None: ...
def first_out_of_range(tokens: np.ndarray, vocab_size: int) -> int: ...
def max_threads() -> int: ...
def isa() -> str: ...
def force_isa(name: str | None) -> None: ...
def cpu_features() -> dict[str, bool]: ...
