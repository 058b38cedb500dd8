"""One step of AdamW over many tensors in Triton, for CUDA and ROCm.

For every element, with t the row's step counter after this step and c = clip factor / grad_scale:

    m = beta1 m + (1 - beta1) c g        v = beta2 v + (1 - beta2) (c g)^2
    p = p (1 - lr weight_decay) - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

in fp32 for all dtypes of parameter and gradient (fp64 parameters: in fp64), with IEEE roots and
quotients, so that the interpreter's results are a GPU's. Constants are prepared in fp64. The
factors of m, v and p themselves (beta1, beta2, 1 - lr weight_decay) come as pairs, head + tail:
rounded to fp32, they would err in the same direction at every step. So m, v and p are rounded once;
16-bit parameters once more.

0/0 (eps = 0, v = 0, m = 0) is NaN, as in PyTorch; v = inf with a finite m leaves only the decay. A
gradient that is not finite makes its element NaN in p; m and v follow IEEE arithmetic.

`prepare_kernel` runs once a step (norm, clip factor, whether to skip, step counters, rows'
constants), `step_kernel` updates the elements, in one launch for each combination of dtypes.
Nothing waits for the device, and every launch can go into a CUDA graph.
n rows, G groups; rows, chunk_rows: device_table.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from . import device_table as tables
from .clip_grad_norm import scale_gradients as scale_gradients
from .clip_grad_norm import sum_squares as sum_squares
from .collect import StepOptions, TensorTable

# A row's constants, fp64, in the order of the formula, and the numbers of a group.
_BETA1, _C1, _BETA2, _C2, _C, _DECAY, _LR, _UNBIAS, _EPS, _CONSTANTS = (
    tl.constexpr(i) for i in range(10)
)
_HYPER = tl.constexpr(5)


@triton.jit(do_not_specialize=["n", "groups"])
def prepare_kernel(
    rows, pointers, hyper, square_sum, grad_scale, found_inf, constants, skip_out, norm_out,
    n, groups, BLOCK: tl.constexpr,
):  # fmt: skip
    """The constants of BLOCK rows, and their step counters, which advance.

    hyper: (G + 1, 5) fp64, of each group lr, beta1, beta2, eps, weight_decay, at the end
    max_grad_norm (inf: no clipping) and skip_nonfinite. square_sum: 0-d fp64; grad_scale,
    found_inf: (1,) fp32; None if there are none. constants: (n, 9) fp64. skip_out: (1,) fp64, not
    0 if nothing is to change.
    """
    program = tl.program_id(0)
    factor, scale = tl.full([], 1.0, tl.float64), tl.full([], 1.0, tl.float64)
    skip = tl.full([], 0.0, tl.float64)
    if grad_scale is not None:
        scale = tl.load(grad_scale).to(tl.float64)
    if found_inf is not None:
        skip = tl.load(found_inf).to(tl.float64)
    if square_sum is not None:
        norm = tl.sqrt(tl.load(square_sum)) / scale
        if norm < float("inf"):
            factor = tl.minimum(tl.load(hyper + groups * _HYPER) / (norm + 1e-6), 1.0)
        else:
            skip += tl.load(hyper + groups * _HYPER + 1)
        if program == 0:
            tl.store(norm_out, norm.to(norm_out.dtype.element_ty))
    if program == 0:
        tl.store(skip_out, skip)

    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < tl.where(skip == 0.0, n, 0)
    counter = tl.load(pointers + i * tables.POINTERS + tables.STEP, mask=here, other=0)
    counter = counter.to(tl.pointer_type(tl.float32))
    t = tl.load(counter, mask=here, other=0.0) + 1.0
    tl.store(counter, t, mask=here)
    group = tl.load(rows + i * tables.ROW_FIELDS + tables.GROUP, mask=here, other=0)
    numbers = hyper + group * _HYPER
    lr = tl.load(numbers, mask=here, other=0.0)
    beta1 = tl.load(numbers + 1, mask=here, other=0.0)
    beta2 = tl.load(numbers + 2, mask=here, other=0.0)
    eps = tl.load(numbers + 3, mask=here, other=0.0)
    decay = tl.load(numbers + 4, mask=here, other=0.0)
    power1 = tl.exp2(tl.log2(beta1) * t.to(tl.float64))
    power2 = tl.exp2(tl.log2(beta2) * t.to(tl.float64))
    c = factor / scale
    row = constants + i * _CONSTANTS
    tl.store(row + _BETA1, beta1, mask=here)
    tl.store(row + _C1, c * (1.0 - beta1), mask=here)
    tl.store(row + _BETA2, beta2, mask=here)
    tl.store(row + _C2, c * (1.0 - beta2), mask=here)
    tl.store(row + _C, c, mask=here)
    tl.store(row + _DECAY, 1.0 - lr * decay, mask=here)
    tl.store(row + _LR, lr / (1.0 - power1), mask=here)
    tl.store(row + _UNBIAS, 1.0 / tl.sqrt(1.0 - power2), mask=here)
    tl.store(row + _EPS, eps, mask=here)


@triton.jit
def _pair(pointer, T: tl.constexpr):
    """(head, tail): an fp64 number as two of type T. The head is a little nearer to 0, so that both
    have one sign: the product of infinity and the pair is infinite."""
    x = tl.load(pointer)
    head = (x * (1 - 2.0**-23)).to(tl.float32).to(tl.float64)
    return head.to(T), (x - head).to(T)


@triton.jit
def _step_chunk(
    addresses, constants, start, size, P: tl.constexpr, G: tl.constexpr, FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = tl.float64 if P.is_fp64() else tl.float32
    params = tables.pointer_to(tl.load(addresses + tables.PARAM), P, FULL) + start
    gradients = tables.pointer_to(tl.load(addresses + tables.GRAD), G, FULL) + start
    averages = tables.pointer_to(tl.load(addresses + tables.EXP_AVG), T, FULL) + start
    squares = tables.pointer_to(tl.load(addresses + tables.EXP_AVG_SQ), T, FULL) + start
    remainders = params  # without a split
    if P.is_int16():
        remainders = tables.pointer_to(tl.load(addresses + tables.REMAINDER), P, FULL) + start

    c, c1 = tl.load(constants + _C).to(T), tl.load(constants + _C1).to(T)
    c2 = tl.load(constants + _C2).to(T)
    beta1, beta1_tail = _pair(constants + _BETA1, T)
    beta2, beta2_tail = _pair(constants + _BETA2, T)
    decay, decay_tail = _pair(constants + _DECAY, T)
    lr = tl.load(constants + _LR).to(T)
    unbias = tl.load(constants + _UNBIAS).to(T)
    eps = tl.load(constants + _EPS).to(T)
    # Of all this the next forward reads the parameters alone: what a cache holds of them may stay.
    for offset in range(0, size, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        p = tables.load(params, at, size, FULL)
        if P.is_int16():
            rest = tables.load(remainders, at, size, FULL, True)
            bits = (p.to(tl.int32) << 16) + rest.to(tl.int32)
            p = bits.to(tl.float32, bitcast=True)
        p, g = p.to(T), tables.load(gradients, at, size, FULL, True).to(T)
        m = tables.load(averages, at, size, FULL, True)
        v = tables.load(squares, at, size, FULL, True)

        m = tl.fma(m, beta1, tl.fma(g, c1, m * beta1_tail))
        v = tl.fma(v, beta2, tl.fma(g * c2, g * c, v * beta2_tail))
        if T.is_fp64():
            u = m / tl.fma(tl.sqrt(v), unbias, eps)
        else:
            u = tl.div_rn(m, tl.fma(tl.sqrt_rn(v), unbias, eps))
        p = tl.fma(p, decay, tl.fma(u, -lr, p * decay_tail))

        tables.store(averages, at, size, m, FULL, True)
        tables.store(squares, at, size, v, FULL, True)
        if P.is_int16():
            # Any other NaN, rounded to 16 bits, could become a number.
            bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
            tables.store(remainders, at, size, bits, FULL, True)
            p = (bits + 0x8000) >> 16
        tables.store(params, at, size, p, FULL)


@triton.jit(do_not_specialize=["first"])
def step_kernel(
    rows, chunk_rows, pointers, constants, skip, first, P: tl.constexpr, G: tl.constexpr,
    BLOCK: tl.constexpr, TAIL_BLOCK: tl.constexpr,
):  # fmt: skip
    """The step of chunk first + program_id(0): parameters of type P (int16: split) and gradients
    of type G."""
    row, start, size = tables.find_chunk(rows, chunk_rows, first)
    addresses = pointers + row * tables.POINTERS
    constants += row * _CONSTANTS
    if tl.load(skip) == 0.0:
        places = tl.load(addresses + tables.PARAM) | tl.load(addresses + tables.GRAD)
        places |= tl.load(addresses + tables.EXP_AVG) | tl.load(addresses + tables.EXP_AVG_SQ)
        if P.is_int16():
            places |= tl.load(addresses + tables.REMAINDER)
        if (size == tables.CHUNK) & (places % 16 == 0):
            _step_chunk(addresses, constants, start, size, P, G, True, BLOCK)
        else:
            _step_chunk(addresses, constants, start, size, P, G, False, TAIL_BLOCK)


def step(table: TensorTable, options: StepOptions, square_sum: Tensor | None) -> Tensor | None:
    """One AdamW update of every row; returns the norm if the sum of squares is given.

    The norm, 0-d of table.norm_dtype, is that of the gradients divided by grad_scale, before
    clipping. If it is not finite (with skip_nonfinite) or found_inf is not 0, nothing is written
    but the norm.
    """
    if square_sum is None and (options.max_grad_norm is not None or options.skip_nonfinite):
        raise ValueError("max_grad_norm and skip_nonfinite need the sum of the gradients' squares")
    on, pointers = tables.on_device(table)
    n, groups, device = len(table.rows), len(options.hyper), table.device
    lrs = {i: lr for i, (lr, *_) in enumerate(options.hyper) if isinstance(lr, Tensor)}
    numbers = [[0.0 if i in lrs else lr, *rest] for i, (lr, *rest) in enumerate(options.hyper)]
    clip = float("inf") if options.max_grad_norm is None else options.max_grad_norm
    numbers.append([clip, float(options.skip_nonfinite), 0.0, 0.0, 0.0])
    mirror = table.cache.setdefault("hyper", tables.Mirror(device))
    hyper = mirror.on_device(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
    mirror.prepare_captures()
    on.pointers.prepare_captures()
    hyper = hyper.clone() if lrs else hyper
    for i, lr in lrs.items():
        if not lr.is_floating_point():
            raise TypeError(f"lr is a tensor of {lr.dtype}: it must be of a floating-point dtype")
        hyper[i, 0] = lr.reshape(())
    # For this step alone: a capture allocates it in its graph's own pool.
    state = torch.empty(n * _CONSTANTS.value + 1, dtype=torch.float64, device=device)
    norm = None if square_sum is None else torch.empty((), dtype=table.norm_dtype, device=device)
    config = configs.prepare_config(tables.ROCM)
    with torch.cuda.device_of(state):
        prepare_kernel[(max(triton.cdiv(n, config["BLOCK"]), 1),)](
            on.rows, pointers, hyper, square_sum, options.grad_scale, options.found_inf, state,
            state[-1:], norm, n, groups, **config,
        )  # fmt: skip
        for param, gradient, first, count in on.launches:
            step_kernel[(count,)](
                on.rows, on.chunk_rows, pointers, state, state[-1:], first,
                P=tables.ELEMENTS[param], G=tables.ELEMENTS[gradient],
                **configs.step_config(param, gradient, tables.ROCM),
            )  # fmt: skip
    return norm
