"""Cross-entropy over rows of logits in Triton: one program a row, for CUDA and ROCm.

With x = softcap(logits) in fp32, lse = log(sum_v exp(x_v)) and s = label_smoothing, a row with
label y has

    loss       = (1 - s) (lse - x_y) + s (lse - mean_v x_v) + z_loss lse^2
    dloss/dx_v = (1 + 2 z_loss lse) p_v - (1 - s) [v = y] - s / V      p_v = exp(x_v - lse)

and dx_v/dlogit_v = 1 - (x_v / softcap)^2. Rows labelled ignore_index have loss 0 and gradient 0; a
label outside [0, V) makes loss and gradient of its row NaN, and nothing is read or written there.

Only check_labels waits for the device. No result depends on the order in which programs run, and
every launch can go into a CUDA graph. With TRITON_INTERPRET=1 all of it runs on CPU tensors.
Shapes: N rows, V vocabulary.
"""

import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .cross_entropy_op import Options, bad_label

_ROCM = torch.version.hip is not None

# Where maxima start: finite, so that a block that is all -inf gives no NaN by -inf - -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)

# Of no use to specialize on: lengths come in units that tell what divides them.
_NUMBERS = ["row_units", "out_units", "units", "loss_stride", "lse_stride", "ignore_index"]
_NUMBERS += ["N", "V", "kind", "programs"]


@triton.jit
def _tanh(z):
    # Each form where it does not cancel, 1.2 ULP at most. The polynomial is a minimax fit of
    # (tanh z - z) / z^3 in z^2 on [0, 1], relative error 5e-9.
    e = tl.exp(-2.0 * tl.abs(z))
    far = 1.0 - (e + e) / (1.0 + e)
    u = z * z
    p = (-3.5845194361172616e-4 * u + 2.3013644386082888e-3) * u - 7.946105673909187e-3
    p = (p * u + 2.1486656740307808e-2) * u - 5.387980118393898e-2
    p = (p * u + 0.13332344591617584) * u - 0.33333295583724976
    near = z + z * u * p
    return tl.where(tl.abs(z) < 1.0, near, tl.where(z < 0.0, -far, far))


@triton.jit
def _softcap(x, softcap, SOFTCAP: tl.constexpr):
    """(softcap * t, t = tanh(x / softcap)), or x twice."""
    t = _tanh(x / softcap) if SOFTCAP else x
    return (softcap * t if SOFTCAP else x), t


@triton.jit
def _load_logits(row, columns, V, softcap, SOFTCAP: tl.constexpr):
    # Lanes past the end are -inf, also after the softcap, which would make them -softcap.
    x = tl.load(row + columns, mask=columns < V, other=-float("inf")).to(tl.float32)
    x, t = _softcap(x, softcap, SOFTCAP)
    return (tl.where(columns < V, x, -float("inf")) if SOFTCAP else x), t


@triton.jit
def _load_label(row, targets, i, V, ignore_index, softcap, SOFTCAP: tl.constexpr):
    """Of row i (label y or -1, whether it is ignored, whether in [0, V), x_y or 0, its t)."""
    y = tl.load(targets + i)
    ignored = y == ignore_index
    known = (y >= 0) & (y < V)
    y = tl.where(known, y, -1).to(tl.int32)  # 64-bit comparisons would cost registers
    x_y = tl.load(row + y, mask=known, other=0.0).to(tl.float32)
    x_y, t_y = _softcap(x_y, softcap, SOFTCAP)
    return y, ignored, known, x_y, t_y


@triton.jit
def _read_row(
    row, V, y, center, smoothing, softcap,
    BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_READ: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(largest x, sum of exp(x_v - largest) over v != y, mean of largest - x if smoothing > 0;
    with ONE_READ t and exp(x - largest)). `center` is any finite number, best one near the x."""
    deviation = 0.0
    if ONE_READ:
        columns = tl.arange(0, BLOCK)
        x, t = _load_logits(row, columns, V, softcap, SOFTCAP)
        m = tl.maximum(tl.max(x), _LOWEST)
        if smoothing > 0.0:  # before e, which needs the registers of x
            deviation += tl.sum(tl.where(columns < V, m - x, 0.0)) / V
        e = tl.exp(x - m)
        return m, tl.sum(tl.where(columns == y, 0.0, e)), deviation, t, e
    else:
        # Every lane has a maximum and a sum of its own, so that no barrier holds the loads up.
        tile = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
        largest = tl.full([LANES], _LOWEST, tl.float32)
        others = tl.zeros([LANES], tl.float32)
        for start in range(0, V, BLOCK):
            x, _ = _load_logits(row + start, tile, V - start, softcap, SOFTCAP)
            if smoothing > 0.0:
                deviation += tl.sum(tl.where(tile < V - start, center - x, 0.0))
            before = largest
            largest = tl.maximum(before, tl.max(x, axis=0))
            e = tl.where(tile == y - start, 0.0, tl.exp(x - largest[None, :]))
            others = others * tl.exp(before - largest) + tl.sum(e, axis=0)
        m = tl.max(largest)
        return m, tl.sum(others * tl.exp(largest - m)), (m - center) + deviation / V, m, m


@triton.jit
def _write_gradient(
    row, out, V, y, m, others, e_y, t_y, t, e, g, g_lse, smoothing, dead, softcap,
    BLOCK: tl.constexpr, ONE_READ: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of g * (loss without z_loss) + g_lse * lse, or 0 if `dead`; e = exp(x - m)."""
    total = others + e_y
    factor = (g + g_lse) / total
    everywhere = g * smoothing / V
    # 1 - p_y is the sum of the other p: it does not cancel where p_y is near 1.
    d_y = (g_lse * e_y - g * (1.0 - smoothing) * others) / total
    d_y += everywhere * (V * (e_y / total) - 1.0)
    if SOFTCAP:
        d_y *= (1.0 - t_y) * (1.0 + t_y)
    blocks = 1 if ONE_READ else tl.cdiv(V, BLOCK)
    for i in range(0, blocks):  # from the end: what was read last is what L2 still has
        start = (blocks - 1 - i) * BLOCK
        columns = tl.arange(0, BLOCK)
        if ONE_READ:
            t_v, e_v = t, e
        else:
            x_v, t_v = _load_logits(row + start, columns, V - start, softcap, SOFTCAP)
            e_v = tl.exp(x_v - m)
        d = factor * e_v - everywhere
        if SOFTCAP:
            d *= (1.0 - t_v) * (1.0 + t_v)
        d = tl.where(dead, 0.0, tl.where(columns == y - start, d_y, d))
        tl.store(out + start + columns, d.to(out.dtype.element_ty), mask=columns < V - start)


@triton.jit(do_not_specialize=_NUMBERS)
def row_losses_kernel(
    logits, targets, losses, lse_out, out, gradient_scale,
    row_units, out_units, units, ignore_index, smoothing, z_loss, softcap,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_READ: tl.constexpr,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Loss and lse of row program_id(0) and, with GRADIENT, its gradient. Lengths in UNITs."""
    i = tl.program_id(0).to(tl.int64)
    V = units * UNIT
    row = logits + i * row_units * UNIT
    y, ignored, known, x_y, t_y = _load_label(row, targets, i, V, ignore_index, softcap, SOFTCAP)
    center = tl.where(tl.abs(x_y) < float("inf"), x_y, 0.0)
    m, others, deviation, t, e = _read_row(
        row, V, y, center, smoothing, softcap, BLOCK, LANES, ONE_READ, SOFTCAP
    )
    e_y = tl.where(known, tl.exp(x_y - m), 0.0)
    log_sum = tl.log(others + e_y)
    lse = m + log_sum
    # Differences of logits first: exact where the logits are large and near to each other.
    loss = (1.0 - smoothing) * ((m - x_y) + log_sum)
    if smoothing > 0.0:  # not 0 times it, which may be infinite or NaN
        loss += smoothing * (log_sum + deviation)
    if z_loss > 0.0:
        loss += z_loss * lse * lse
    tl.store(losses + i, tl.where(ignored, 0.0, tl.where(known, loss, float("nan"))))
    tl.store(lse_out + i, lse)
    if GRADIENT:
        g = tl.where(known, tl.load(gradient_scale), float("nan"))
        _write_gradient(
            row, out + i * out_units * UNIT, V, y, m, others, e_y, t_y, t, e,
            g, g * (2.0 * z_loss * lse), smoothing, ignored, softcap, BLOCK, ONE_READ, SOFTCAP,
        )  # fmt: skip


@triton.jit(do_not_specialize=_NUMBERS)
def row_gradients_kernel(
    logits, targets, lse_in, grad_losses, grad_lse, out,
    row_units, out_units, units, loss_stride, lse_stride, ignore_index, smoothing, z_loss, softcap,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_READ: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient of row program_id(0), given lse. A stride below 0 says that there is no gradient."""
    i = tl.program_id(0).to(tl.int64)
    V = units * UNIT
    row = logits + i * row_units * UNIT
    y, ignored, known, x_y, t_y = _load_label(row, targets, i, V, ignore_index, softcap, SOFTCAP)
    lse = tl.load(lse_in + i)
    if ONE_READ:
        # Not exp(x - lse): the rounding of lse would be in every element.
        m, others, _, t, e = _read_row(row, V, y, 0.0, 0.0, softcap, BLOCK, LANES, True, SOFTCAP)
    else:
        # If lse's rounding error is small beside the 16-bit output's, reuse lse and save a pass:
        # not for a large lse, and not for 1 - p_y near 0.
        m, t, e = lse, lse, lse
        others = 1.0 - tl.where(known, tl.exp(x_y - m), 0.0)
        if (logits.dtype.element_ty == tl.float32) | (tl.abs(lse) > 64.0) | (others < 0.015625):
            m, others, _, t, e = _read_row(
                row, V, y, 0.0, 0.0, softcap, BLOCK, LANES, False, SOFTCAP
            )
        tl.debug_barrier()  # all threads have read x_y: the gradient may go over it
    e_y = tl.where(known, tl.exp(x_y - m), 0.0)
    g = tl.load(grad_losses + i * loss_stride, mask=loss_stride >= 0, other=0.0)
    g_lse = tl.load(grad_lse + i * lse_stride, mask=lse_stride >= 0, other=0.0)
    # Of an ignored row only lse's gradient is left, and if that is 0 the row may hold anything.
    dead = ignored & (g_lse == 0.0)
    g = tl.where(ignored, 0.0, tl.where(known, g, float("nan")))
    g_lse += tl.where(ignored, 0.0, g * (2.0 * z_loss * lse))
    _write_gradient(
        row, out + i * out_units * UNIT, V, y, m, others, e_y, t_y, t, e,
        g, g_lse, smoothing, dead, softcap, BLOCK, ONE_READ, SOFTCAP,
    )  # fmt: skip


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


def _unit(*tensors: Tensor, lengths: tuple[int, ...]) -> int:
    """Elements in 16 bytes, which the compiler then takes at once, or 1 where rows do not fit."""
    unit = 16 // tensors[0].element_size()
    return 1 if any(x.data_ptr() % 16 for x in tensors) or any(n % unit for n in lengths) else unit


def _row_arguments(logits: Tensor, out: Tensor, options: Options) -> dict[str, object]:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"logits has dtype {logits.dtype}: it must be float32, bfloat16 or float16")
    for name, x in (("logits", logits), ("out", out)):
        if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] != 1):
            raise ValueError(f"{name} has strides {x.stride()}: it must be (N, V), rows dense")
        if x.shape != logits.shape or x.dtype != logits.dtype:
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, logits {tuple(logits.shape)}")
    V, softcap = logits.shape[1], options.softcap is not None
    unit = _unit(logits, out, lengths=(V, logits.stride(0), out.stride(0)))
    config = configs.row_config(V, logits.element_size(), _ROCM, softcap=softcap, aligned=unit > 1)
    return {
        "row_units": logits.stride(0) // unit, "out_units": out.stride(0) // unit,
        "units": V // unit, "UNIT": unit, "ignore_index": options.ignore_index, "SOFTCAP": softcap,
        "smoothing": float(options.label_smoothing), "z_loss": float(options.z_loss),
        "softcap": float(options.softcap or 0.0), "num_warps": config.num_warps,
        "BLOCK": config.block, "LANES": config.lanes, "ONE_READ": config.one_read,
    }  # fmt: skip


def row_losses(
    logits: Tensor,  # (N, V) fp32, bf16 or fp16, any row stride
    targets: Tensor,  # (N,) int64
    options: Options,
    *,
    all_lse: bool = False,  # the lse is computed of ignored rows, too, whether asked for or not
    gradient_scale: Tensor | None = None,  # () fp32 on the same device
    out: Tensor | None = None,  # like logits; may be logits
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """(losses (N,) fp32, lse (N,) fp32, the same for row_gradients, gradient of gradient_scale *
    losses.sum() or None).

    The gradient goes to `out` or a new (N, V) tensor. Raises where logits and out do not fit.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    lse = torch.empty_like(losses)
    wanted = gradient_scale is not None
    if wanted and out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    written, scale = (out, gradient_scale) if wanted else (logits, losses)  # else neither is used
    arguments = _row_arguments(logits, written, options)
    if len(losses):
        with torch.cuda.device_of(logits):
            row_losses_kernel[(len(losses),)](
                logits, targets.contiguous(), losses, lse, written, scale,
                GRADIENT=wanted, **arguments,
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
        sum_rows_kernel[(1,)](losses.contiguous(), scale, total, len(losses), **config)
    return total


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor for a contiguous `x` of any float dtype and a () `factor` on the same device.

    The device decides: a factor of 1 leaves every bit of x as it is, and costs no pass over it.
    """
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}: it must be contiguous")
    unit = _unit(x, lengths=(x.numel(),))
    config, most = configs.scale_config(_ROCM)
    if programs := min(triton.cdiv(x.numel(), config["BLOCK"]), most):
        with torch.cuda.device_of(x):
            scale_kernel[(programs,)](x, factor, x.numel() // unit, programs, UNIT=unit, **config)
