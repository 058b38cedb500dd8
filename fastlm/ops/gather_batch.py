"""Batches of token windows out of (memory-mapped) token arrays.

Not a torch.library op as the others are: its input is host memory outside any graph, and batches
are made between the compiled steps.

B batch, T context length.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastlm.errors import DataError
from fastlm.extension import extension
from fastlm.hardware import select_device

# A 1-D array or CPU tensor of tokens, or a sequence of arrays seen end to end.
TokenSource = np.ndarray | Tensor | Iterable[np.ndarray]


def gather_batch(
    data: TokenSource,  # (n,) tokens
    starts: np.ndarray | Sequence[int],  # (B,) first position of each window
    context_len: int,
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """x[b] = data[starts[b] : starts[b] + T] and y[b], the same one token later: (B, T) each.

    `data` holds uint8, uint16, uint32, int32 or int64 tokens; x and y are `dtype` (int64 or int32)
    on `device`. Windows are copied by the C++ kernel, in parallel, the GIL released; for a CUDA
    device through pinned memory, without waiting for the copy. Raises ValueError where a window
    does not lie inside the data.
    """
    if dtype not in (torch.int64, torch.int32):
        raise TypeError(f"dtype={dtype}: batches are torch.int64 or torch.int32")
    if context_len < 1:
        raise ValueError(f"context_len={context_len}: it must be at least 1")
    starts = np.asarray(starts)
    if starts.ndim != 1 or (starts.size and starts.dtype.kind not in "iu"):
        raise TypeError(
            f"starts must be a 1-D array of integers, got {starts.dtype} of shape {starts.shape}"
        )
    starts = np.ascontiguousarray(starts, dtype=np.int64)
    return _gathered(token_segments(data), starts, context_len, device, dtype)


def _gathered(
    segments: list[np.ndarray],
    starts: np.ndarray,  # (B,) int64
    context_len: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    device = device if isinstance(device, torch.device) else select_device(device)
    shape = (len(starts), context_len)
    pinned = device.type == "cuda"
    # On the CPU whatever torch's default device is.
    x = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
    y = torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned)
    extension().gather_batch(segments, starts, x.numpy(), y.numpy())
    if device.type == "cpu":
        return x, y
    # Pinned blocks go back to the allocator, which reuses them only when the copy has ended.
    return x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned)


def gather_batch_reference(
    data: np.ndarray,  # (n,)
    starts: Sequence[int],  # (B,)
    context_len: int,
) -> tuple[Tensor, Tensor]:
    """The definition above in NumPy slices: what the kernel is tested against."""
    x = np.stack([data[i : i + context_len].astype(np.int64) for i in starts])
    y = np.stack([data[i + 1 : i + 1 + context_len].astype(np.int64) for i in starts])
    return torch.from_numpy(x), torch.from_numpy(y)


def get_batch(
    data: TokenSource,  # (n,) tokens
    batch_size: int,
    context_len: int,
    device: torch.device | str = "auto",
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """`batch_size` windows at uniformly random positions: (x, y), int64, (B, T) each, on `device`.

    Every valid start is drawn, 0 to n - T - 1 inclusive. The draws come from `generator` (a CPU
    one), else from torch's global generator. Raises ValueError where the data is shorter than
    T + 1 tokens, DeviceError for a device that is not there.
    """
    if batch_size < 1 or context_len < 1:
        raise ValueError(
            f"batch_size={batch_size}, context_len={context_len}: both must be at least 1"
        )
    segments = token_segments(data)
    tokens = sum(len(segment) for segment in segments)
    check_window_fits(tokens, context_len)
    starts = torch.randint(tokens - context_len, (batch_size,), generator=generator, device="cpu")
    return _gathered(segments, starts.numpy(), context_len, device, torch.int64)


def token_segments(data: TokenSource) -> list[np.ndarray]:
    """The 1-D arrays that `data` consists of; arrays and CPU tensors are not copied."""
    if isinstance(data, Tensor):
        return [np.ascontiguousarray(data.detach().cpu().numpy())]
    if isinstance(data, np.ndarray):
        return [np.ascontiguousarray(data)]
    segments = list(data)
    if not all(isinstance(segment, np.ndarray) for segment in segments):
        raise TypeError("data must be an array of token ids or a list of arrays: np.array(data)")
    return segments


def check_window_fits(tokens: int, context_len: int, what: str = "data") -> None:
    """DataError if `tokens` tokens are too few for one window and the token behind it."""
    if tokens < context_len + 1:
        raise DataError(
            f"{what} holds {tokens} tokens; context_len={context_len} needs at least "
            f"{context_len + 1}"
        )
