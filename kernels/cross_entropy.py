"""Cross-entropy over rows of logits in Triton, for CUDA and ROCm: launchers, and smaller kernels.

The formulas are those of cross_entropy_rows.py, whose kernels run one program a row.

Only check_labels waits for the device. No result depends on the order in which programs run, and
every launch can go into a CUDA graph. With TRITON_INTERPRET=1 all of it runs on CPU tensors.
Shapes: N rows, V vocabulary.
"""

import functools
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .cross_entropy_op import bad_label
from .cross_entropy_rows import row_gradients_kernel, row_losses_kernel
from .loss_options import Options

_ROCM = torch.version.hip is not None

# Of no use to specialize on: lengths come in units that tell what divides them.
_NUMBERS = ["units", "ignore_index", "N", "V", "kind", "programs"]


@triton.jit(do_not_specialize=_NUMBERS)
def denominator_scale_kernel(
    targets, num_items, scale, bad_label, N, V, ignore_index, kind, BLOCK: tl.constexpr
):
    """1 / what the losses' sum is divided by. kind 0: 1, kind 1: rows that count, 2: num_items.
    1 if no row counts: whatever num_items, the loss of none is 0 and not NaN."""
    counts = tl.zeros([BLOCK], tl.int64)
    none = 0x7FFFFFFFFFFFFFFF
    first = tl.full([BLOCK], none, tl.int64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        y = tl.load(targets + rows, mask=rows < N, other=ignore_index)
        counts += (y != ignore_index).to(tl.int64)
        bad = (y != ignore_index) & ((y < 0) | (y >= V))
        first = tl.minimum(first, tl.where(bad, rows.to(tl.int64), none))
    count = tl.sum(counts)
    items = count.to(tl.float64)
    if kind == 2:
        items = tl.load(num_items).to(tl.float64)
    items = tl.where((kind == 0) | (count == 0), 1.0, items)
    tl.store(scale, (1.0 / items).to(tl.float32))
    row = tl.min(first)
    if row < none and tl.load(bad_label) < 0:  # the first one stays until it is read
        tl.store(bad_label + 1, tl.load(targets + row))
        tl.store(bad_label + 2, V)
        tl.store(bad_label + 3, ignore_index)
        tl.store(bad_label, row)


@triton.jit(do_not_specialize=_NUMBERS)
def sum_rows_kernel(losses, scale, total, N, BLOCK: tl.constexpr):
    """scale * sum(losses), added up in fp64: no rounding of its own but the last."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, N, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        sums += tl.load(losses + rows, mask=rows < N, other=0.0)
    tl.store(total, (tl.sum(sums) * tl.load(scale).to(tl.float64)).to(tl.float32))


@triton.jit(do_not_specialize=_NUMBERS)
def scale_kernel(x, factor, units, programs, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """x *= factor, which is read on the device; 1 leaves x untouched."""
    f = tl.load(factor)
    if f != 1.0:
        WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
        numel = units.to(tl.int64) * UNIT
        block = tl.program_id(0).to(tl.int64)
        for _ in range(0, tl.cdiv(tl.cdiv(numel, BLOCK) - block, programs)):
            places = block * BLOCK + tl.arange(0, BLOCK)
            new = tl.load(x + places, mask=places < numel).to(WIDE) * f.to(WIDE)
            tl.store(x + places, new.to(x.dtype.element_ty), mask=places < numel)
            block += programs


# One int64[4] a device: the first bad label's row, or -1; its value; V; ignore_index. It is made at
# the first launch and kept: launches captured in a CUDA graph write to it, too.
_bad_labels: dict[torch.device, Tensor] = {}


def _bad_label_buffer(device: torch.device) -> Tensor:
    if device not in _bad_labels:
        with torch.cuda.device(device if device.type == "cuda" else -1):  # not the current device
            capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing:
            raise RuntimeError(
                f"the first loss on {device} cannot be captured in a CUDA graph: compute one "
                f"outside of a capture first"
            )

        def make() -> None:
            buffer = torch.full((4,), -1, dtype=torch.int64, device=device)
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # it is this thread's own stream
            _bad_labels[device] = buffer

        # In a thread of its own: torch.compile's warm-up of a CUDA graph takes what this one
        # allocates from the graph's pool, where it would not stay. Inference mode and modes that
        # change factories are this thread's, too.
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    return _bad_labels[device]


def check_labels() -> None:
    """Raise ValueError for the first label out of range, and forget it; waits for the devices."""
    for buffer in _bad_labels.values():
        row, value, V, ignore_index = buffer.tolist()
        if row >= 0:
            buffer.fill_(-1)
            raise bad_label(f" (flattened) [{row}]", value, V, ignore_index)


def empty_saved(N: int, device: torch.device) -> Tensor:
    """(N,) fp32: the lse."""
    return torch.empty((N,), dtype=torch.float32, device=device)


def denominator_scale(
    targets: Tensor,  # (...) int64
    V: int,
    ignore_index: int,
    num_items: Tensor | None,  # () of any dtype on the same device
    mean: bool,
) -> Tensor:
    """What the losses' sum is multiplied by, () fp32: 1, or for the mean 1 / num_items or, without
    that, 1 / (rows not ignored); 1 if no row counts. Notes labels out of range for check_labels."""
    scale = torch.empty((), dtype=torch.float32, device=targets.device)
    kind = 0 if not mean else 1 if num_items is None else 2
    items, bad_label = targets if kind < 2 else num_items, _bad_label_buffer(targets.device)
    with torch.cuda.device_of(targets):
        denominator_scale_kernel[(1,)](
            targets.contiguous(), items, scale, bad_label, targets.numel(), V, ignore_index, kind,
            **configs.labels_config(_ROCM),
        )  # fmt: skip
    return scale


def _unit(itemsize: int, addresses: int, *lengths: int) -> int:
    """Elements in 16 bytes, which the compiler then takes at once, or 1 where rows do not fit.
    addresses: those of all tensors, by bitwise or."""
    unit = 16 // itemsize
    return 1 if addresses % 16 or any(n % unit for n in lengths) else unit


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _row_arguments(logits: Tensor, out: Tensor, options: Options) -> dict[str, object]:
    if logits.dtype not in _DTYPES:
        raise TypeError(f"logits has dtype {logits.dtype}: it must be float32, bfloat16 or float16")
    for name, x in (("logits", logits), ("out", out)):
        if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] != 1 and x.numel()):
            raise ValueError(f"{name} has strides {x.stride()}: it must be (N, V), rows dense")
    if out is not logits and (out.shape != logits.shape or out.dtype != logits.dtype):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)}, logits {logits.dtype} {tuple(logits.shape)}"
        )
    addresses = logits.data_ptr() | out.data_ptr()
    strides = logits.stride(0), out.stride(0)
    return _launch_arguments(logits.shape[1], logits.dtype, *strides, addresses % 16, options)


@functools.lru_cache  # it takes the host as long as the launch itself
def _launch_arguments(
    V: int, dtype: torch.dtype, stride: int, out_stride: int, addresses: int, options: Options
) -> dict[str, object]:
    softcap, itemsize = float(options.softcap or 0.0), dtype.itemsize
    unit = _unit(itemsize, addresses, V, stride, out_stride)
    config = configs.row_config(V, itemsize, _ROCM, softcap=softcap > 0.0, aligned=unit > 1)
    return {
        "row_units": stride // unit, "out_units": out_stride // unit, "units": V // unit,
        "UNIT": unit, "ignore_index": options.ignore_index,
        "smoothing": float(options.label_smoothing), "z_loss": float(options.z_loss),
        "softcap": softcap,
        "SOFTCAP": 0 if not softcap else 2 if softcap <= 1000.0 and itemsize == 2 else 1,
        **config.launch,
    }  # fmt: skip


def row_losses(
    logits: Tensor,  # (N, V) fp32, bf16 or fp16, any row stride
    targets: Tensor,  # (N,) int64
    options: Options,
    *,
    all_lse: bool = False,  # else the lse of ignored rows is 0, and their logits are not read
    gradient_scale: Tensor | None = None,  # () fp32 on the same device
    out: Tensor | None = None,  # like logits; may be logits
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(losses (N,) fp32, lse (N,) fp32, the same for row_gradients, gradient of gradient_scale *
    losses.sum() or None).

    The gradient goes to `out` or a new (N, V) tensor. Raises where logits and out do not fit.
    """
    N = logits.shape[0]
    losses = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    wanted = gradient_scale is not None
    if wanted and out is None:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    written, scale = (out, gradient_scale) if wanted else (logits, losses)  # else neither is used
    arguments = _row_arguments(logits, written, options)
    if N:
        with torch.cuda.device_of(logits):
            row_losses_kernel[(N,)](
                logits, targets.contiguous(), losses, lse, written, scale,
                all_lse=int(all_lse), GRADIENT=wanted, **arguments,
            )  # fmt: skip
    # Two tensors if both leave the op, whose results must not share memory.
    return losses, lse.clone() if all_lse else lse, lse, out if wanted else None


def row_gradients(
    logits: Tensor,  # (N, V) as in row_losses
    targets: Tensor,  # (N,) int64
    saved: Tensor,  # (N,) fp32, contiguous, from row_losses: the lse
    grad_losses: Tensor | None,  # (N,) or () fp32; None: 0
    grad_lse: Tensor | None,  # (N,) or () fp32; None: 0
    options: Options,
    out: Tensor,  # like logits; may be logits
) -> None:
    """The gradient of sum(grad_losses * losses) + sum(grad_lse * lse) for the logits, to `out`."""
    arguments = _row_arguments(logits, out, options)
    if out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out has strides {out.stride()}: its rows overlap, as of expanded logits")
    given = [saved if g is None else g for g in (grad_losses, grad_lse)]
    strides = [-1 if g is None else g.stride(0) if g.dim() else 0 for g in (grad_losses, grad_lse)]
    if logits.shape[0]:
        with torch.cuda.device_of(logits):
            row_gradients_kernel[(logits.shape[0],)](
                logits, targets.contiguous(), saved, *given, out,
                loss_stride=strides[0], lse_stride=strides[1], **arguments,
            )  # fmt: skip


def sum_rows(losses: Tensor, scale: Tensor) -> Tensor:
    """scale * sum(losses), () fp32, of losses (N,) fp32 and scale () fp32; in a fixed order."""
    total, config = torch.empty_like(scale), configs.labels_config(_ROCM)
    with torch.cuda.device_of(losses):
        sum_rows_kernel[(1,)](losses.contiguous(), scale, total, losses.numel(), **config)
    return total


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor for a contiguous `x` of any float dtype and a () `factor` on the same device.

    The device decides: a factor of 1 leaves every bit of x as it is, and costs no pass over it.
    """
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}: it must be contiguous")
    unit = _unit(x.element_size(), x.data_ptr(), x.numel())
    config, most = configs.scale_config(_ROCM)
    if programs := min(triton.cdiv(x.numel(), config["BLOCK"]), most):
        with torch.cuda.device_of(x):
            scale_kernel[(programs,)](x, factor, x.numel() // unit, programs, UNIT=unit, **config)
