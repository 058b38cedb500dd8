"""Rows for the tests of the optimizer's kernels: their tables, fp64 truth, exact arithmetic."""

from dataclasses import dataclass, fields, replace

import pytest
import torch
from fastlm.kernels.collect import CODE, COLUMNS, SPLIT, StepOptions, TensorTable
from interpreter import DEVICE, INTERPRETED
from tolerance import assert_bitwise_equal
from torch import Tensor

HYPER = (1e-3, 0.9, 0.95, 1e-8, 0.1)  # lr, beta1, beta2, eps, weight_decay
DTYPES = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
    "split": torch.bfloat16,
}  # fmt: skip
KINDS = [f"{p} {g}" for p in ("fp32", "bf16", "fp16", "split") for g in ("fp32", "bf16", "fp16")]
KINDS.append("fp64 fp64")


@dataclass(eq=False)
class Row:
    """A parameter (n,), its gradient and state; kind: dtypes of parameter and gradient."""

    kind: str
    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    step: Tensor = None
    remainder: Tensor | None = None
    group: int = 0

    def __post_init__(self):
        if self.step is None:
            self.step = torch.zeros(1)

    @property
    def p_dtype(self) -> torch.dtype:
        return torch.float32 if self.kind.startswith("split") else self.p.dtype

    def master(self) -> Tensor:
        """What p and remainder hold together, fp32."""
        bits = (self.p.view(torch.int16).int() << 16) + self.remainder.int()
        return bits.view(torch.float32)

    def value(self) -> Tensor:
        return (self.p if self.remainder is None else self.master()).double()

    def tensors(self) -> list[Tensor]:
        values = (getattr(self, field.name) for field in fields(self))
        return [x for x in values if isinstance(x, Tensor)]

    def copy(self, *, split: bool = False) -> "Row":
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        row = replace(self, **{k: x.clone() for k, x in own.items() if isinstance(x, Tensor)})
        if split:
            bits = row.p.view(torch.int32)
            row.kind = row.kind.replace("fp32", "split", 1)
            row.remainder = bits.to(torch.int16)
            row.p = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
        return row


def snapshot(rows: list[Row]) -> list[Row]:
    return [row.copy() for row in rows]


def assert_unchanged(rows: list[Row], before: list[Row]) -> None:
    """Every bit is what it was."""
    for row, old in zip(rows, before, strict=True):
        for x, y in zip(row.tensors(), old.tensors(), strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), row.kind


def make_row(
    kind: str, n: int, *, step: int = 0, magnitudes: str = "usual", seed: int = 0, group: int = 0
) -> Row:
    """A random row before step `step` + 1; "wide": numbers of every size, zeros and subnormals.
    The same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def random(low: float, high: float) -> Tensor:
        drawn = dict(generator=generator, dtype=torch.float64, device="cpu")
        x = torch.randn(n, **drawn)
        if magnitudes == "wide":
            x *= 10 ** (torch.rand(n, **drawn) * (high - low) + low)
            x[torch.rand(n, generator=generator, device="cpu") < 0.05] = 0
        return x.to(DEVICE)

    p_dtype, g_dtype = (DTYPES[name] for name in kind.split())
    state = torch.float64 if p_dtype == torch.float64 else torch.float32
    split = kind.startswith("split")
    highest = 3 if p_dtype == torch.float16 else 6
    p = random(-42, highest).to(torch.float32 if split else p_dtype)
    g = random(-44, 3 if g_dtype == torch.float16 else 18).to(g_dtype)
    m, v = random(-44, 18).to(state), random(-44, 36).abs().to(state)
    if magnitudes == "usual":
        m, v = m * 0.1, v * 0.01
    if step == 0:
        m, v = torch.zeros_like(m), torch.zeros_like(v)
    row = Row(kind, p, g, m, v, torch.full((1,), float(step)), group=group)
    if split:
        row = replace(row, kind=kind.replace("split", "fp32", 1)).copy(split=True)
    return row


def make_table(rows: list[Row]):
    def pointer(x: Tensor | None) -> int:
        return 0 if x is None else x.data_ptr()

    def codes(row: Row) -> list[int]:
        return [SPLIT if row.remainder is not None else CODE[row.p.dtype], CODE[row.g.dtype]]

    tensors = [[r.p, r.g, r.m, r.v, r.remainder, r.step] for r in rows]
    table = [
        [*map(pointer, of_row), row.p.numel(), *codes(row), row.group, 0]
        for row, of_row in zip(rows, tensors, strict=True)
    ]
    values = torch.tensor(table, dtype=torch.int64, device="cpu").reshape(-1, COLUMNS)
    device = rows[0].p.device if rows else torch.device(DEVICE)
    return TensorTable(device, None, values, {})


def oracle(row: Row, factor, lr, beta1, beta2, eps, weight_decay):
    """(p, m, v, what is subtracted from p) in fp64, of the row before the step."""
    t = row.step.double() + 1
    g = row.g.double() * factor
    m = beta1 * row.m.double() + (1 - beta1) * g
    v = beta2 * row.v.double() + (1 - beta2) * g * g
    root = (v / (1 - beta2**t)).sqrt() + eps
    update = lr * (m / (1 - beta1**t)) / root
    return row.value() * (1 - lr * weight_decay) - update, m, v, update


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at a magnitude, fp64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.double().abs().clamp(min=info.tiny)).exponent - 1
    return info.eps * torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def run(rows, hyper=(HYPER,), *, normed=False, **options):
    """One step by the Triton kernels; (norm, SquareSum)."""
    from fastlm.kernels.adamw import step
    from fastlm.kernels.clip_grad_norm import sum_squares

    table = make_table(rows)
    squares = sum_squares(table) if normed or options.get("max_grad_norm") else None
    total = None if squares is None else squares.sum
    return step(table, StepOptions(list(hyper), **options), total), squares


# In ULP: half of one for each of fp32's few roundings; 16-bit parameters are rounded once.
LIMITS = {torch.float32: 4.0, torch.bfloat16: 0.51, torch.float16: 0.51}


def assert_step(rows, before, factor=1.0, hyper=(HYPER,)):
    """p, m and v after one step: within LIMITS of fp64's; gradients as they were."""
    for row, old in zip(rows, before, strict=True):
        lr, beta1, beta2, eps, weight_decay = (float(x) for x in hyper[row.group])
        p, m, v, update = oracle(old, factor, lr, beta1, beta2, eps, weight_decay)
        g = factor * old.g.double()
        state = row.m.dtype
        # The terms of m may cancel: its error is theirs.
        m_ulp = ulp(torch.stack([(beta1 * old.m).abs(), ((1 - beta1) * g).abs()]).amax(0), state)
        v_ulp = ulp(v, state)
        # What the update makes of the errors of m and v, and its own.
        update_error = update.abs() * (m_ulp / m.abs() + v_ulp / v) + ulp(update, state)
        update_error = LIMITS.get(state, 1.0) * update_error.nan_to_num(0.0)
        p_ulp = ulp(torch.stack([old.value().abs(), update.abs(), p.abs()]).amax(0), row.p_dtype)
        for name, actual, truth, one in (
            ("m", row.m, m, m_ulp), ("v", row.v, v, v_ulp), ("p", row.value(), p, p_ulp)
        ):  # fmt: skip
            dtype = row.p_dtype if name == "p" else state
            error = (actual.double() - truth).abs()
            out_of_range = truth.abs() > torch.finfo(dtype).max
            assert actual[out_of_range].isinf().all()
            error[out_of_range] = 0
            if dtype == torch.float64:
                # 1 - beta^t loses what beta^t has in common with 1, in the truth, too.
                allowed = one * (8 + 2 / (1 - beta2 ** row.step.double()))
            else:
                # A subnormal number is rounded twice, to 24 bits and then to what it has.
                subnormal = truth.abs() < 64 * torch.finfo(dtype).tiny
                allowed = one * torch.where(subnormal, max(LIMITS[dtype], 1.0), LIMITS[dtype])
                if name == "p":
                    allowed += update_error
            if not (error <= allowed).all():
                i = int((error / allowed).nan_to_num(torch.inf).argmax())
                element = [float(x[i]) for x in (old.value(), g, old.m, old.v, update, truth)]
                pytest.fail(f"{name} of {row.kind}: {error[i] / one[i]:.3f} ULP at {i}: {element}")
        assert_bitwise_equal(row.g, old.g, "gradient")
        assert row.step == old.step + 1


def exact_arithmetic(monkeypatch) -> None:
    """Makes the interpreter, where it runs, compute as a device does.

    Its fma rounds the product: here fp32 goes through fp64, which holds the product. Its conversion
    to bf16 truncates.
    """
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        wide = np.float64 if z.data.dtype == np.float32 else z.data.dtype
        product = x.data.astype(wide) * y.data.astype(wide)
        return TensorHandle((product + z.data).astype(z.data.dtype), z.dtype.scalar)

    real_cast = InterpreterBuilder.cast_impl

    def cast(self, source, to):
        types = (source.dtype.scalar, to.scalar)
        if types == (tl.float32, tl.bfloat16):
            x = torch.from_numpy(np.atleast_1d(source.data).copy()).to(torch.bfloat16)
            data = x.view(torch.int16).numpy().view(np.uint16).reshape(np.shape(source.data))
        elif types == (tl.bfloat16, tl.float32):
            data = (source.data.astype(np.uint32) << 16).view(np.float32)
        else:
            return real_cast(self, source, to)
        return TensorHandle(data, to.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
