"""One step of AdamW over many tensors in Triton, for CUDA and ROCm.

For every element, with t the row's step counter after this step, c = clip factor / grad_scale and
every operation exact until p, m and v are rounded, once each:

    m = beta1 m + (1 - beta1) c g        v = beta2 v + (1 - beta2) (c g)^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

Here "exact" is some 45 bits: 24-bit numbers are kept as pairs, head + tail, because float64 is 64
times slower on many GPUs, and a memory-bound kernel has time for a hundred operations an element.
p gets m and v before their rounding. Rows of float64 are plain float64 arithmetic.

0/0 (eps = 0, v = 0, m = 0) is NaN, as in PyTorch; v = inf with a finite m leaves only the decay. An
element whose gradient is not finite becomes NaN in p, and what IEEE arithmetic gives in m and v.

Launches do not depend on the number of tensors: `prepare_kernel` for what a step needs once (norm,
clip factor, whether it is skipped, step counters, a row's constants), `step_kernel` for the
elements, once for each combination of dtypes. Nothing waits for the device, and every launch can go
into a CUDA graph. With TRITON_INTERPRET=1 all of it runs on CPU tensors. n rows, G groups, k sums.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, device_table
from . import tensor_table as codes
from .clip_grad_norm import ROCM, ChunkSums, add_up, find_chunk, on_device, round_to_odd
from .clip_grad_norm import scale_gradients as scale_gradients
from .clip_grad_norm import square_sums as square_sums
from .clip_grad_norm import typed_pointer as typed
from .tensor_table import GradientSums, StepOptions, TensorTable

takes_tensors = False  # with this the module is what optimizer.StepKernels says

_FLOAT32, _BFLOAT16 = tl.constexpr(codes.FLOAT32), tl.constexpr(codes.BFLOAT16)
_FLOAT16, _FLOAT64 = tl.constexpr(codes.FLOAT16), tl.constexpr(codes.FLOAT64)
_SPLIT, _REMAINDER = tl.constexpr(codes.SPLIT), tl.constexpr(codes.REMAINDER)
_PARAM, _GRAD, _STEP = (tl.constexpr(x) for x in (codes.PARAM, codes.GRAD, codes.STEP))
_EXP_AVG, _EXP_AVG_SQ = tl.constexpr(codes.EXP_AVG), tl.constexpr(codes.EXP_AVG_SQ)
_COLUMNS = tl.constexpr(6)  # of TensorTable.pointers
_ROW_FIELDS = tl.constexpr(device_table.ROW_FIELDS)
_GROUP, _GRADIENT_CODE = (tl.constexpr(x) for x in (device_table.GROUP, device_table.GRADIENT_CODE))

# A row's constants: slots of 8 bytes with one float64, or two float32, head and tail.
CONSTANTS = 10
_CONSTANTS = tl.constexpr(CONSTANTS)

# A group's hyperparameters: float64 and, for a learning rate on the device, pointer and dtype.
_HYPER = 6
_HYPER_FIELDS = tl.constexpr(_HYPER)

# The bits of `flags`.
_CLIP, _SKIP_NONFINITE, _HAS_SCALE, _HAS_FOUND, _HAS_SUMS, _FIND_BAD = (
    tl.constexpr(1 << i) for i in range(6)
)


@triton.jit
def _powers(beta1, beta2, steps):
    """beta1^steps and beta2^steps in fp64, for int64 steps >= 0: as good as the host's."""
    power1, power2 = beta1 * 0.0 + 1.0, beta2 * 0.0 + 1.0
    most = tl.max(steps, axis=0)
    while most > 0:
        odd = (steps & 1) == 1
        power1 = tl.where(odd, power1 * beta1, power1)
        power2 = tl.where(odd, power2 * beta2, power2)
        beta1, beta2, steps, most = beta1 * beta1, beta2 * beta2, steps >> 1, most >> 1
    return power1, power2


@triton.jit
def _device_lr(lr, pointers, dtypes, here):
    """The learning rates, of which those with a code are on the device."""
    for code in tl.static_range(4):
        wanted = here & (dtypes == code)
        pointer = typed(pointers, code, False)
        lr = tl.where(wanted, tl.load(pointer, mask=wanted, other=0.0).to(tl.float64), lr)
    return lr


@triton.jit
def _store_constant(constants, slot: tl.constexpr, value, is_fp64, here):
    head = value.to(tl.float32)
    tail = (value - head.to(tl.float64)).to(tl.float32)
    low = head.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    pair = (tail.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low
    slots = tl.where(is_fp64, value.to(tl.int64, bitcast=True), pair)
    tl.store(constants + slot, slots, mask=here)


@triton.jit(do_not_specialize=["n", "count", "groups", "flags"])
def prepare_kernel(
    rows, chunk_rows, pointers, hyper, lrs, sums, bad_rows, grad_scale, found_inf,
    constants, skip_out, norm_out, bad_out, n, count, groups, flags,
    BLOCK: tl.constexpr, SUM_BLOCK: tl.constexpr,
):  # fmt: skip
    """The constants of BLOCK rows, and their step counters, which advance; program 0 the rest.

    Every program adds up all sums by itself, in the same order: to the same bits.
    """
    program = tl.program_id(0)
    factor, scale = tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0, tl.int32)
    if (flags & _HAS_SCALE) != 0:
        scale = tl.load(grad_scale).to(tl.float64)
    if (flags & _HAS_SUMS) != 0:
        find_bad = ((flags & _FIND_BAD) != 0) & (program == 0)
        total, bad = add_up(sums, bad_rows, chunk_rows, rows, count, -1, find_bad, SUM_BLOCK)
        norm = tl.sqrt(total) / scale
        finite = norm < float("inf")
        if ((flags & _CLIP) != 0) & finite:
            factor = tl.load(hyper + groups * _HYPER_FIELDS) / (norm + 1e-6)
            factor = tl.where(factor < 1.0, factor, 1.0)
        skip = tl.where(((flags & _SKIP_NONFINITE) != 0) & (finite == 0), 1, 0)
        if program == 0:
            tl.store(norm_out, norm.to(norm_out.dtype.element_ty))
            if find_bad:
                tl.store(bad_out, bad)
    if (flags & _HAS_FOUND) != 0:
        skip = tl.where(tl.load(found_inf) != 0.0, 1, skip)
    if program == 0:
        tl.store(skip_out, skip)

    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < tl.where(skip == 0, n, 0)
    address = tl.load(pointers + i * _COLUMNS + _STEP, mask=here, other=0)
    counter = address.to(tl.pointer_type(tl.float32))
    step = tl.load(counter, mask=here, other=0.0) + 1.0
    group = tl.load(rows + i * _ROW_FIELDS + _GROUP, mask=here, other=0)
    numbers = hyper + group * _HYPER_FIELDS
    lr = tl.load(numbers, mask=here, other=0.0)
    beta1 = tl.load(numbers + 1, mask=here, other=0.0)
    beta2 = tl.load(numbers + 2, mask=here, other=0.0)
    eps = tl.load(numbers + 3, mask=here, other=0.0)
    decay = tl.load(numbers + 4, mask=here, other=0.0)
    lr_code = tl.load(lrs + group * 2 + 1, mask=here, other=-1)
    lr = _device_lr(lr, tl.load(lrs + group * 2, mask=here, other=0), lr_code, here)
    power1, power2 = _powers(beta1, beta2, step.to(tl.int64))
    tl.store(counter, step, mask=here)

    is_fp64 = tl.load(rows + i * _ROW_FIELDS + _GRADIENT_CODE, mask=here, other=0) == _FLOAT64
    c = tl.zeros([BLOCK], tl.float64) + factor / scale
    # A factor below fp32's range (norms near 1e38) goes in two steps: 2^-64 first.
    two_steps = (c < 2.0**-62) & (is_fp64 == 0)
    constant = constants + i * _CONSTANTS
    _store_constant(constant, 0, tl.where(two_steps, 2.0**-64, 1.0).to(tl.float64), is_fp64, here)
    _store_constant(constant, 1, tl.where(two_steps, c * 2.0**64, c), is_fp64, here)
    _store_constant(constant, 2, beta1, is_fp64, here)
    _store_constant(constant, 3, 1.0 - beta1, is_fp64, here)
    _store_constant(constant, 4, beta2, is_fp64, here)
    _store_constant(constant, 5, 1.0 - beta2, is_fp64, here)
    _store_constant(constant, 6, 1.0 - lr * decay, is_fp64, here)
    _store_constant(constant, 7, lr / (1.0 - power1), is_fp64, here)
    _store_constant(constant, 8, 1.0 / tl.sqrt(1.0 - power2), is_fp64, here)
    _store_constant(constant, 9, eps, is_fp64, here)


# Sums and products of pairs, head + tail with |tail| at most about an ULP of the head. Where a head
# is infinite its tail is NaN, which _rounded drops.


@triton.jit
def _plus(a, a_tail, b, b_tail):
    head = a + b
    c = head - a
    return head, ((a - (head - c)) + (b - c)) + (a_tail + b_tail)


@triton.jit
def _times(a, b, b_tail):
    head = a * b
    return head, tl.fma(a, b_tail, tl.fma(a, b, -head))


@triton.jit
def _times_pair(a, a_tail, b, b_tail):
    head = a * b
    return head, tl.fma(a_tail, b, tl.fma(a, b_tail, tl.fma(a, b, -head)))


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _rounded(head, tail):
    x = head + tail
    return tl.where(x == x, x, head)


@triton.jit
def _constant(constants, SLOT: tl.constexpr):
    slot = tl.load(constants + SLOT)
    head = slot.to(tl.int32).to(tl.float32, bitcast=True)
    return head, (slot >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _constant64(constants, SLOT: tl.constexpr):
    return tl.load(constants + SLOT).to(tl.float64, bitcast=True)


@triton.jit
def _step_float32(p, g, m, v, constants):
    """(p as (head + tail) * scale, m, v) after a step, all fp32."""
    unit, _ = _constant(constants, 0)
    c, c_tail = _constant(constants, 1)
    # Powers of two keep every head so far from both ends of fp32's range that the tails are in it,
    # too: squares of 1e-22 and 1e20, first moments and parameters of 1e-38.
    size = tl.abs(g * unit * c)
    tiny = tl.maximum(size, tl.abs(g) * 2.0**-61)  # where g * 2^64 is in the range
    tiny_m = tl.maximum(tiny, tl.abs(m)) < 2.0**-60
    up_m, down_m = tl.where(tiny_m, 2.0**64, 1.0), tl.where(tiny_m, 2.0**-64, 1.0)
    tiny_v = (tiny < 0.5) & (v < 0.25)
    usual_v = (size < 2.0**60) & (v < 2.0**120)
    up_v = tl.where(tiny_v, 2.0**64, tl.where(usual_v, 1.0, 2.0**-64))
    down_v = tl.where(tiny_v, 2.0**-64, tl.where(usual_v, 1.0, 2.0**64))

    a, a_tail = _times(g * up_m * unit, c, c_tail)
    beta1, beta1_tail = _constant(constants, 2)
    other1, other1_tail = _constant(constants, 3)
    a, a_tail = _times_pair(a, a_tail, other1, other1_tail)
    b, b_tail = _times(m * up_m, beta1, beta1_tail)
    m, m_tail = _plus(a, a_tail, b, b_tail)
    m_new = _rounded(m, m_tail) * down_m

    a, a_tail = _times(g * up_v * unit, c, c_tail)
    a, a_tail = _times_pair(a, a_tail, a, a_tail)
    beta2, beta2_tail = _constant(constants, 4)
    other2, other2_tail = _constant(constants, 5)
    a, a_tail = _times_pair(a, a_tail, other2, other2_tail)
    b, b_tail = _times(v * up_v * up_v, beta2, beta2_tail)
    v, v_tail = _plus(a, a_tail, b, b_tail)
    v_new = _rounded(v, v_tail) * down_v * down_v

    # Square root and quotient need not be the last bit's: the tail corrects what they lack.
    root = tl.sqrt(v)
    root_tail = _finite((tl.fma(-root, root, v) + v_tail) / (root + root)) * down_v
    root *= down_v
    unbias, unbias_tail = _constant(constants, 8)
    root, root_tail = _times_pair(root, root_tail, unbias, unbias_tail)
    eps, eps_tail = _constant(constants, 9)
    root, root_tail = _plus(root, root_tail, eps, eps_tail)
    lr, lr_tail = _constant(constants, 7)
    m, m_tail = _times_pair(m, m_tail, lr, lr_tail)
    inverse = 1.0 / root
    u = m * inverse
    u_tail = _finite((tl.fma(-u, root, m) + tl.fma(-u, root_tail, m_tail)) * inverse)
    decay, decay_tail = _constant(constants, 6)
    tiny_p = tl.maximum(tl.abs(p), tl.abs(u) * down_m) < 2.0**-60
    up_p, down_p = tl.where(tiny_p, 2.0**64, 1.0), tl.where(tiny_p, 2.0**-64, 1.0)
    p, p_tail = _times(p * up_p, decay, decay_tail)
    p, p_tail = _plus(p, p_tail, -u * up_p * down_m, -u_tail * up_p * down_m)
    return p, p_tail, down_p, m_new, v_new


@triton.jit
def _step_float64(p, g, m, v, constants):
    g *= _constant64(constants, 1)
    m = _constant64(constants, 2) * m + _constant64(constants, 3) * g
    v = _constant64(constants, 4) * v + _constant64(constants, 5) * g * g
    root = tl.sqrt(v) * _constant64(constants, 8) + _constant64(constants, 9)
    p = p * _constant64(constants, 6) - _constant64(constants, 7) * m / root
    return p, m, v


@triton.jit
def _load(pointer, at, left, FULL: tl.constexpr):
    return tl.load(pointer + at) if FULL else tl.load(pointer + at, mask=at < left, other=0.0)


@triton.jit
def _store(pointer, at, left, x, FULL: tl.constexpr):
    if FULL:
        tl.store(pointer + at, x)
    else:
        tl.store(pointer + at, x, mask=at < left)


@triton.jit
def _step_chunk(
    addresses, constants, start, left, P: tl.constexpr, G: tl.constexpr, FULL: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    STATE: tl.constexpr = _FLOAT64 if P == _FLOAT64 else _FLOAT32
    HALF: tl.constexpr = (P == _BFLOAT16) | (P == _FLOAT16)
    params = typed(tl.load(addresses + _PARAM), P, FULL) + start
    gradients = typed(tl.load(addresses + _GRAD), G, FULL) + start
    averages = typed(tl.load(addresses + _EXP_AVG), STATE, FULL) + start
    squares = typed(tl.load(addresses + _EXP_AVG_SQ), STATE, FULL) + start
    remainders = params  # of SPLIT; else not used
    if P == _SPLIT:
        remainders = typed(tl.load(addresses + _REMAINDER), P, FULL) + start
    for offset in range(0, CHUNK if FULL else tl.minimum(left, CHUNK).to(tl.int32), BLOCK):
        at = offset + tl.arange(0, BLOCK)
        p = _load(params, at, left, FULL)
        g = _load(gradients, at, left, FULL)
        m = _load(averages, at, left, FULL)
        v = _load(squares, at, left, FULL)
        if P == _FLOAT64:
            p, m, v = _step_float64(p, g, m, v, constants)
            _store(params, at, left, p, FULL)
        else:
            if P == _SPLIT:
                low = _load(remainders, at, left, FULL).to(tl.int32)
                p = ((p.to(tl.int32) << 16) + low).to(tl.float32, bitcast=True)
            p, g = p.to(tl.float32), g.to(tl.float32)
            p, tail, scale, m, v = _step_float32(p, g, m, v, constants)
            new = _rounded(p, tail)
            if HALF:
                new = round_to_odd(new, (p - new) + tail)
            new *= scale
            if P == _SPLIT:
                bits = new.to(tl.int32, bitcast=True)
                # Any other NaN, rounded to 16 bits, could become a number.
                nan = new != new
                high = tl.where(nan, 0x7FC0, (bits + 0x8000) >> 16).to(tl.int16)
                _store(params, at, left, high, FULL)
                _store(remainders, at, left, tl.where(nan, 0, bits).to(tl.int16), FULL)
            else:
                _store(params, at, left, new.to(params.dtype.element_ty), FULL)
        _store(averages, at, left, m, FULL)
        _store(squares, at, left, v, FULL)


@triton.jit(do_not_specialize=["first"])
def step_kernel(
    rows, chunk_rows, pointers, constants, skip, first,
    P: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    TAIL_BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of chunk first + program_id(0): parameters of code P and gradients of code G."""
    row, start, left = find_chunk(rows, chunk_rows, first + tl.program_id(0).to(tl.int64), CHUNK)
    addresses = pointers + row * _COLUMNS
    constants += row * _CONSTANTS
    if tl.load(skip) == 0:
        places = tl.load(addresses + _PARAM) | tl.load(addresses + _GRAD)
        places |= tl.load(addresses + _EXP_AVG) | tl.load(addresses + _EXP_AVG_SQ)
        if P == _SPLIT:
            places |= tl.load(addresses + _REMAINDER)
        if (left >= CHUNK) & (places % 16 == 0):
            _step_chunk(addresses, constants, start, left, P, G, True, CHUNK, BLOCK)
        else:
            _step_chunk(addresses, constants, start, left, P, G, False, CHUNK, TAIL_BLOCK)


def _hyper(options: StepOptions) -> Tensor:
    """int64 ((G + 1) * _HYPER + G * 2,): bits of float64, then pointer and code of each lr."""
    numbers, lrs = [], []
    for lr, *others in options.hyper:
        if isinstance(lr, Tensor) and lr.dtype not in codes.CODE:
            raise TypeError(f"lr is a tensor of {lr.dtype}: it must be of a floating-point dtype")
        on_device = isinstance(lr, Tensor)
        numbers.append([0.0 if on_device else lr, *others, 0.0])
        lrs += [lr.data_ptr(), codes.CODE[lr.dtype]] if on_device else [0, -1]
    numbers.append([options.max_grad_norm or 0.0] + [0.0] * (_HYPER - 1))
    values = torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64).flatten()
    return torch.cat([values, torch.tensor(lrs, dtype=torch.int64, device="cpu")])


def step(table: TensorTable, options: StepOptions, sums: GradientSums | None) -> Tensor | None:
    """One AdamW update of every row; returns the norm of the sums if there are any.

    The norm, 0-d of table.norm_dtype, is that of the gradients divided by grad_scale, before
    clipping. Where it is not finite (with skip_nonfinite) or found_inf is not 0, nothing is written
    but the norm and `bad`.
    """
    clip = options.max_grad_norm is not None
    if sums is None and (clip or options.skip_nonfinite):
        raise ValueError("max_grad_norm and skip_nonfinite need the sums of the gradients' squares")
    on, pointers = on_device(table)
    hyper = on.hyper.on_device(_hyper(options))
    n, groups, device = len(table.numel), len(options.hyper), table.device
    split = (groups + 1) * _HYPER
    numbers, lrs = hyper[:split].view(torch.float64), hyper[split:]
    # Of this step alone: allocated anew, from a graph's own pool where one is captured.
    state = torch.empty(n * CONSTANTS + 2, dtype=torch.int64, device=device)
    constants, skip = state[: n * CONSTANTS], state[n * CONSTANTS :].view(torch.int32)
    norm = None if sums is None else torch.empty((), dtype=table.norm_dtype, device=device)
    scale, found, find_bad = options.grad_scale, options.found_inf, isinstance(sums, ChunkSums)
    present = (clip, options.skip_nonfinite, scale is not None, found is not None)
    present += (sums is not None, find_bad)
    config = configs.prepare_config(ROCM)
    with torch.cuda.device_of(state):
        prepare_kernel[(max(triton.cdiv(n, config["BLOCK"]), 1),)](
            on.rows, on.chunk_rows, pointers, numbers, lrs,
            numbers if sums is None else sums.values, sums.bad_rows if find_bad else state,
            on.nothing if scale is None else scale, on.nothing if found is None else found,
            constants, skip, on.nothing if norm is None else norm,
            state if sums is None else sums.bad,
            n, 0 if sums is None else sums.values.numel(), groups,
            sum(1 << i for i, flag in enumerate(present) if flag), **config,
        )  # fmt: skip
        for param, gradient, first, count in on.launches:
            step_kernel[(count,)](
                on.rows, on.chunk_rows, pointers, constants, skip, first,
                P=param, G=gradient, CHUNK=on.chunk,
                **configs.step_config(param, gradient, ROCM),
            )  # fmt: skip
    return norm
