"""Signatures of the compiled extension (csrc/bindings*.cpp)."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

SOURCE_HASH: str
VERSION: str
THREADS_ARE_OPENMPS: bool  # torch.set_num_threads sets how many; else all cores

def gather_batch(
    segments: list[np.ndarray],  # (n_i,) each, one dtype: uint8, uint16, uint32, int32 or int64
    starts: npt.NDArray[np.int64],  # (B,)
    x: np.ndarray,  # (B, T) int32 or int64, written
    y: np.ndarray,  # (B, T), written
) -> None: ...
def first_out_of_range(tokens: np.ndarray, vocab_size: int) -> int: ...

# Floats are arrays of float32, or int16 that hold the bits of `kind` "bfloat16" or "float16".
def causal_attention(
    q: np.ndarray,  # (B, H, Tq, d), any strides with adjacent elements in the last dimension
    k: np.ndarray,  # (B, H_kv, Tk, d), so, too, as all that follow
    v: np.ndarray,  # (B, H_kv, Tk, d)
    kind: str,
    scale: float,
    cos: npt.NDArray[np.float32] | None,  # (Tk, d / 2), contiguous: rotary positions
    sin: npt.NDArray[np.float32] | None,  # (Tk, d / 2)
    out: np.ndarray,  # (B, H, Tq, d), written
    stats: npt.NDArray[np.float32],  # (B, H, Tq, 2), contiguous, written: what backward wants
) -> None: ...
def causal_attention_backward(
    grad_out: np.ndarray,  # (B, H, Tq, d)
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    kind: str,
    scale: float,
    cos: npt.NDArray[np.float32] | None,
    sin: npt.NDArray[np.float32] | None,
    out: np.ndarray,
    stats: npt.NDArray[np.float32],
    dq: np.ndarray,  # (B, H, Tq, d), written
    dk: np.ndarray,  # (B, H_kv, Tk, d), written
    dv: np.ndarray,  # (B, H_kv, Tk, d), written
) -> None: ...
def check_labels(
    targets: npt.NDArray[np.int64], vocab_size: int, ignore_index: int
) -> tuple[int, int]: ...  # (first row out of range or -1, labels that are not ignore_index)
def cross_entropy_losses(
    logits: np.ndarray,  # (N, V)
    kind: str,
    targets: npt.NDArray[np.int64],  # (N,)
    ignore_index: int,
    numbers: list[float],  # the options after it, in the order of Options; None is 0
    all_lse: bool,
    losses: npt.NDArray[np.float32],  # (N,), written
    lse: npt.NDArray[np.float32],  # (N,), written
    stats: npt.NDArray[np.float64],  # (N, 2), written
    gradient: np.ndarray | None,  # (N, V), written; may be logits
    gradient_scale: float,
) -> None: ...
def cross_entropy_gradients(
    logits: np.ndarray,  # (N, V)
    kind: str,
    targets: npt.NDArray[np.int64],  # (N,)
    stats: npt.NDArray[np.float64],  # (N, 2)
    ignore_index: int,
    numbers: list[float],
    grad_losses: npt.NDArray[np.float32],  # (N,) or ()
    grad_lse: npt.NDArray[np.float32] | None,  # (N,)
    gradient: np.ndarray,  # (N, V), written; may be logits
) -> None: ...
def ordered_sum(values: npt.NDArray[np.float32]) -> float: ...
def scale_in_place(x: np.ndarray, kind: str, factor: float) -> None: ...
def accumulate(
    sum: npt.NDArray[np.float32],  # (rows, columns), written
    part: np.ndarray,  # (rows, columns)
    kind: str,
    first: bool,  # sum = part, else sum += part
) -> None: ...

# rows: (n, 11), fastlm.kernels.collect.TensorTable.rows.
def sum_squares(
    rows: npt.NDArray[np.int64],
) -> tuple[float, int]: ...  # (sum, first row with a gradient that is not finite, or -1)
def scale_gradients(rows: npt.NDArray[np.int64], factor: float) -> None: ...
def adamw(
    rows: npt.NDArray[np.int64],
    options: npt.NDArray[np.float64],  # (groups, 5): lr, beta1, beta2, eps, weight_decay
    factor: float,  # of the gradients
) -> None: ...
def read_table(
    tensor_class: type[Tensor],
    parameter_class: type[Tensor],
    param_groups: list[dict],
    state: dict[Tensor, Any],
    split: bool,
) -> Any: ...  # (rows, tensors by column) or None
def max_threads() -> int: ...
def isa() -> str: ...
def force_isa(name: str | None) -> None: ...
def cpu_features() -> dict[str, bool]: ...
