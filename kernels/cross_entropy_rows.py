"""Cross-entropy over rows of logits in Triton, the kernels: one program a row, on CUDA and ROCm.

With x = softcap(logits) in fp32, lse = log(sum_v exp(x_v)) and s = smoothing, a row with
label y has

    loss       = (1 - s) (lse - x_y) + s (lse - mean_v x_v) + z_loss lse^2
    dloss/dx_v = (1 + 2 z_loss lse) p_v - (1 - s) [v = y] - s / V      p_v = exp(x_v - lse)

and dx_v/dlogit_v = 1 - (x_v / softcap)^2. Rows labelled ignore_index have loss 0 and gradient 0; a
label outside [0, V) makes loss and gradient of its row NaN, and nothing is read or written there.

The label costs no instruction an element: its terms are put right after the loops over a row.
SOFTCAP: 0 none; 1; 2 one of at most 1,000 over 16-bit logits, for whose gradient a tanh will do
that errs by 1.2e-7. UNIT: elements in 16 bytes, or 1. Shapes: V vocabulary.
"""

import triton
import triton.language as tl

# Where maxima start: finite, so that a block that is all -inf gives no NaN by -inf - -inf.
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_LOG2E = tl.constexpr(1.4426950408889634)

# Of no use to specialize on: lengths come in units that tell what divides them.
_NUMBERS = ["row_units", "out_units", "units", "loss_stride", "lse_stride", "ignore_index"]
_NUMBERS += ["all_lse"]


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """exp(x) for x <= 0, 0 below 2^-126: relative error (2 + |x|) 2^-23, with EXACT 2^-22."""
    if EXACT:
        # x = k ln 2 + r with |r| <= 0.35; adding 1.5 * 2^23 rounds to integers. k times the first
        # 15 bits of ln 2 is exact. The bound is for -inf, which is no multiple of ln 2.
        k = tl.maximum((x * _LOG2E + 12582912.0) - 12582912.0, -200.0)
        r = (x - k * 0.693145751953125) - k * 1.4286068203094172e-06
        return tl.exp2(r * _LOG2E) * tl.exp2(k)
    # Not tl.exp, which takes three instructions more for denormal results: beside the largest, 1,
    # they are nothing.
    return tl.exp2(x * _LOG2E)


@triton.jit
def _tanh(z):
    # Each form where it does not cancel, 2 ULP at most. The polynomial is a minimax fit of
    # (tanh z - z) / z^3 in z^2 on [0, 1], relative error 5e-9.
    e = tl.exp2(tl.abs(z) * (-2.0 * _LOG2E))
    root = tl.rsqrt(1.0 + e)
    r = root * root
    r += r * (1.0 - (1.0 + e) * r)  # 1 / (1 + e) by Newton's step, in half of a division
    far = 1.0 - (e + e) * r
    u = z * z
    p = (-3.5845194361172616e-4 * u + 2.3013644386082888e-3) * u - 7.946105673909187e-3
    p = (p * u + 2.1486656740307808e-2) * u - 5.387980118393898e-2
    p = (p * u + 0.13332344591617584) * u - 0.33333295583724976
    near = z + z * u * p
    return tl.where(tl.abs(z) < 1.0, near, tl.where(z < 0.0, -far, far))


@triton.jit
def _softcap(x, softcap, SOFTCAP: tl.constexpr):
    """(softcap * t, t = tanh(x / softcap)), or x twice, in fp32."""
    x = x.to(tl.float32)
    if SOFTCAP:
        t = _tanh(x * (1.0 / softcap))
        return softcap * t, t
    return x, x


@triton.jit
def _rough_softcap(x, softcap):
    """(softcap * t, 1 - t^2): t errs by 1.2e-7, 1 - t^2 by some 2^-22 of itself."""
    z = x.to(tl.float32) * (1.0 / softcap)
    e = tl.exp2(tl.abs(z) * (-2.0 * _LOG2E))
    root = tl.rsqrt(1.0 + e)
    r = root * root
    x = softcap * ((1.0 - e) * r)
    return tl.where(z < 0.0, -x, x), 4.0 * e * (r * r)


@triton.jit
def _tile(BLOCK: tl.constexpr, LANES: tl.constexpr, UNIT: tl.constexpr):
    """The columns of a block, (steps, threads, UNIT): a thread's loads of UNIT stand together."""
    steps = tl.arange(0, BLOCK // (LANES * UNIT))[:, None, None]
    lanes = tl.arange(0, LANES)[None, :, None]
    return (steps * LANES + lanes) * UNIT + tl.arange(0, UNIT)[None, None, :]


@triton.jit
def _read_row(
    row, V, y, x_y, known, smoothing, softcap,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_READ: tl.constexpr,
    SOFTCAP: tl.constexpr, EXACT: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """(m, largest x or near it; sum of exp(x_v - m); the same over v != y; exp(x_y - m); mean of
    m - x if smoothing > 0; with ONE_READ what _write_gradient needs of the row). AGAIN: the row
    will be read again."""
    if ONE_READ:
        columns = tl.arange(0, BLOCK)
        here = columns < V
        x = tl.load(row + columns, mask=here, other=-float("inf"), eviction_policy="evict_first")
        x, t = _softcap(x, softcap, SOFTCAP)
        if SOFTCAP:  # lanes past the end stay -inf
            x = tl.where(here, x, -float("inf"))
        m = tl.maximum(tl.max(x), _LOWEST)
        deviation = 0.0
        if smoothing > 0.0:  # before e, which needs the registers of x
            deviation += tl.sum(tl.where(here, m - x, 0.0)) / V
        e = _exp(x - m, EXACT)
        total = tl.sum(e)
        e_y = tl.where(known, _exp(x_y - m, EXACT), 0.0)
        others = total - e_y
        if e_y > others:  # the difference cancels: once more, without e_y
            others = tl.sum(tl.where(columns == y, 0.0, e))
        return m, total, others, e_y, deviation, t if SOFTCAP else e
    else:
        # Every thread has a maximum and a sum of its own, so that no barrier holds the loads up.
        tile = _tile(BLOCK, LANES, UNIT)
        center = tl.where(tl.abs(x_y) < float("inf"), x_y, 0.0)
        largest = tl.full([LANES], _LOWEST, tl.float32)
        largest = tl.where(known, tl.maximum(largest, x_y), largest)
        sums = tl.zeros([LANES], tl.float32)
        deviations = tl.zeros([LANES], tl.float32)
        POLICY: tl.constexpr = "evict_last" if AGAIN else "evict_first"
        ahead = tl.load(row + tile, mask=tile < V, other=-float("inf"), eviction_policy=POLICY)
        for start in range(0, V, BLOCK):
            raw = ahead
            left = V - start - BLOCK
            ahead = tl.load(
                row + start + BLOCK + tile, mask=tile < left, other=-float("inf"),
                eviction_policy=POLICY,
            )  # fmt: skip
            x, _ = _softcap(raw, softcap, SOFTCAP)
            if SOFTCAP:
                x = tl.where(tile < V - start, x, -float("inf"))
            if smoothing > 0.0:
                terms = tl.where(tile < V - start, center - x, 0.0)
                deviations += tl.sum(tl.sum(terms, axis=2), axis=0)
            if (y >= start) & (y < start + BLOCK):  # in one block; its maximum has been counted
                x = tl.where(tile == y - start, -float("inf"), x)
            before = largest
            largest = tl.maximum(before, tl.max(tl.max(x, axis=2), axis=0))
            e = _exp(x - largest[None, :, None], False)
            sums = sums * _exp(before - largest, False) + tl.sum(tl.sum(e, axis=2), axis=0)
        m = tl.max(largest)
        others = tl.sum(sums * _exp(largest - m, False))
        e_y = tl.where(known, _exp(x_y - m, EXACT), 0.0)
        return m, others + e_y, others, e_y, (m - center) + tl.sum(deviations) / V, m


@triton.jit
def _write_zeros(out, V, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    zeros = tl.zeros([BLOCK], out.dtype.element_ty)
    for start in range(0, V, BLOCK):
        tl.store(out + start + columns, zeros, mask=columns < V - start, cache_modifier=".cs")


@triton.jit
def _write_gradient(
    row, out, V, y, known, m, total, others, e_y, t_y, kept, g, g_lse, smoothing, softcap,
    BLOCK: tl.constexpr, ONE_READ: tl.constexpr, SOFTCAP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The gradient of g * (loss without z_loss) + g_lse * lse; e = exp(x - m)."""
    factor = (g + g_lse) / total
    everywhere = g * smoothing / V
    blocks = 1 if ONE_READ else tl.cdiv(V, BLOCK)
    columns = tl.arange(0, BLOCK)
    for i in range(0, blocks):  # from the end: what was read last is what L2 still has
        start = (blocks - 1 - i) * BLOCK
        slope = 1.0
        if ONE_READ:
            e, t = kept, kept
            if SOFTCAP:  # of t and e together only one has registers
                e = _exp(softcap * t - m, EXACT)
        else:
            here = columns < V - start
            x = tl.load(row + start + columns, mask=here, eviction_policy="evict_first")
            if SOFTCAP == 2:
                x, slope = _rough_softcap(x, softcap)
            else:
                x, t = _softcap(x, softcap, SOFTCAP)
            e = _exp(x - m, EXACT)
        d = factor * e - everywhere
        if SOFTCAP == 2 and not ONE_READ:
            d *= slope
        elif SOFTCAP:
            d *= (1.0 - t) * (1.0 + t)
        tl.store(
            out + start + columns, d.to(out.dtype.element_ty), mask=columns < V - start,
            cache_modifier=".cs",
        )  # fmt: skip
    # 1 - p_y is the sum of the other p: it does not cancel where p_y is near 1.
    d_y = (g_lse * e_y - g * (1.0 - smoothing) * others) / total
    d_y += everywhere * (V * (e_y / total) - 1.0)
    if SOFTCAP:
        d_y *= (1.0 - t_y) * (1.0 + t_y)
    tl.debug_barrier()  # another thread's store of this element goes first
    tl.store(out + y, d_y.to(out.dtype.element_ty), mask=known)


@triton.jit
def _load_label(targets, i, V, ignore_index):
    """Of row i (label y or -1, whether it is ignored, whether in [0, V))."""
    y = tl.load(targets + i)
    known = (y >= 0) & (y < V)
    return tl.where(known, y, -1).to(tl.int32), y == ignore_index, known  # 64 bits cost registers


@triton.jit
def _load_one(row, y, known, softcap, SOFTCAP: tl.constexpr):
    """(x_y, its t), or 0."""
    x_y = tl.load(row + y, mask=known, other=0.0)
    return _softcap(x_y, softcap, SOFTCAP)


@triton.jit(do_not_specialize=_NUMBERS)
def row_losses_kernel(
    logits, targets, losses, lse_out, out, gradient_scale,
    row_units, out_units, units, ignore_index, all_lse, smoothing, z_loss, softcap,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, ONE_READ: tl.constexpr,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """Loss and lse of row program_id(0) and, with GRADIENT, its gradient. Lengths in UNITs. Of an
    ignored row lse is 0 and logits are not read, unless all_lse is not 0."""
    i = tl.program_id(0).to(tl.int64)
    V = units * UNIT
    row, to = logits + i * row_units * UNIT, out + i * out_units * UNIT
    EXACT: tl.constexpr = logits.dtype.element_ty == tl.float32
    y, ignored, known = _load_label(targets, i, V, ignore_index)
    if ignored & (all_lse == 0):
        tl.store(losses + i, 0.0)
        tl.store(lse_out + i, 0.0)
        if GRADIENT:
            _write_zeros(to, V, BLOCK)
        return
    x_y, t_y = _load_one(row, y, known, softcap, SOFTCAP)
    m, total, others, e_y, deviation, kept = _read_row(
        row, V, y, x_y, known, smoothing, softcap, UNIT, BLOCK, LANES, ONE_READ, SOFTCAP,
        EXACT, GRADIENT,
    )  # fmt: skip
    log_sum = tl.log(total)
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
        if ignored:
            _write_zeros(to, V, BLOCK)
        else:
            g = tl.where(known, tl.load(gradient_scale), float("nan"))
            _write_gradient(
                row, to, V, y, known, m, total, others, e_y, t_y, kept, g,
                g * (2.0 * z_loss * lse), smoothing, softcap, BLOCK, ONE_READ, SOFTCAP, EXACT,
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
    row, to = logits + i * row_units * UNIT, out + i * out_units * UNIT
    EXACT: tl.constexpr = logits.dtype.element_ty == tl.float32
    y, ignored, known = _load_label(targets, i, V, ignore_index)
    g = tl.load(grad_losses + i * loss_stride, mask=loss_stride >= 0, other=0.0)
    g_lse = tl.load(grad_lse + i * lse_stride, mask=lse_stride >= 0, other=0.0)
    # Of an ignored row only lse's gradient is left, and if that is 0 the row may hold anything.
    if ignored & (g_lse == 0.0):
        _write_zeros(to, V, BLOCK)
        return
    lse = tl.load(lse_in + i)
    x_y, t_y = _load_one(row, y, known, softcap, SOFTCAP)
    if ONE_READ:
        # Not exp(x - lse): the rounding of lse would be in every element.
        m, total, others, e_y, _, kept = _read_row(
            row, V, y, x_y, known, 0.0, softcap, UNIT, BLOCK, LANES, True, SOFTCAP, EXACT, False
        )
    else:
        # If lse's rounding error is small beside the 16-bit output's, reuse lse and save a pass:
        # not for a large lse, and not for 1 - p_y near 0.
        m, total, kept = lse, 1.0, lse
        e_y = tl.where(known, _exp(x_y - m, EXACT), 0.0)
        others = 1.0 - e_y
        if EXACT | (tl.abs(lse) > 64.0) | (others < 0.015625):
            m, total, others, e_y, _, kept = _read_row(
                row, V, y, x_y, known, 0.0, softcap, UNIT, BLOCK, LANES, False, SOFTCAP, EXACT, True
            )
        tl.debug_barrier()  # all threads have read x_y: the gradient may go over it
    g = tl.where(ignored, 0.0, tl.where(known, g, float("nan")))
    g_lse += tl.where(ignored, 0.0, g * (2.0 * z_loss * lse))
    _write_gradient(
        row, to, V, y, known, m, total, others, e_y, t_y, kept, g, g_lse, smoothing, softcap,
        BLOCK, ONE_READ, SOFTCAP, EXACT,
    )  # fmt: skip
