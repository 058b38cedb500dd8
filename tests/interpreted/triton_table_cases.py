"""How the optimizer's Triton kernels go over tables: sums, launches, copies.

On a GPU or in Triton's interpreter. test_triton_adamw.py runs this file in a process of its own
(tests/helpers/interpreter.py).
"""

import threading
from dataclasses import replace

import pytest
import torch
from fastlm.kernels import clip_grad_norm, configs, device_table
from fastlm.kernels.adamw import step
from fastlm.kernels.clip_grad_norm import scale_gradients, sum_squares
from fastlm.kernels.collect import StepOptions
from interpreter import DEVICE, INTERPRETED
from optimizer_rows import (
    HYPER,
    KINDS,
    assert_step,
    assert_unchanged,
    exact_arithmetic,
    make_row,
    make_table,
    run,
    snapshot,
    ulp,
)
from tolerance import assert_bitwise_equal
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastlm.ops import clip_grad_norm as clip_ops

# NumPy, which the interpreter computes with, warns of what is meant: NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F32, F64 = torch.float32, torch.float64
CHUNK = configs.OPTIMIZER_CHUNK


@pytest.fixture(autouse=True)
def arithmetic(monkeypatch):
    exact_arithmetic(monkeypatch)


def test_no_rows_and_only_empty_rows():
    rows = [make_row("fp32 fp32", 0, step=3), make_row("split bf16", 0, step=8)]
    norm, sums = run(rows, max_grad_norm=1.0, skip_nonfinite=True)
    assert norm == 0 and sums.bad == -1
    assert [row.step.item() for row in rows] == [4, 9]
    norm, sums = run([], max_grad_norm=1.0, skip_nonfinite=True)
    assert norm == 0 and norm.dtype == F32 and sums.bad == -1
    assert sum_squares(make_table([])).sum == 0
    scale_gradients(make_table(rows), 0.5)
    scale_gradients(make_table([]), 0.5)


def test_sums_of_many_rows():
    rows = [make_row(list(KINDS)[i % 13], 20 * i, seed=i) for i in range(20)]
    rows[7] = make_row("fp32 fp32", 2 * CHUNK + 5)
    table = make_table(rows)
    found = sum_squares(table)
    assert found.sum.shape == () and found.sum.dtype == F64 and found.bad == -1
    true = sum(row.g.double().square().sum() for row in rows)
    assert abs(found.sum - true) <= 1e-14 * true
    norm = step(table, StepOptions([HYPER], max_grad_norm=1.0), found.sum)
    assert abs(norm - true.sqrt()) <= 1e-14 * norm
    for i in (11, 7):
        rows[i].g[-1] = torch.inf
        assert sum_squares(table).bad == i


def test_overflow_is_no_bad_row():
    rows = [make_row("fp64 fp64", 10)]
    rows[0].g[2] = 1e200
    before = snapshot(rows)
    norm, sums = run(rows, max_grad_norm=1.0, skip_nonfinite=True)
    assert norm == torch.inf and sums.bad == -1
    assert_unchanged(rows, before)


def test_launches(monkeypatch):
    """Four at most with the norm and two without, whatever the number of tensors."""
    launched = []
    kernel_class = InterpretedFunction if INTERPRETED else JITFunction
    real = kernel_class.run
    monkeypatch.setattr(
        kernel_class,
        "run",
        lambda self, *a, **k: (launched.append(self.fn.__name__), real(self, *a, **k))[1],
    )
    rows = [make_row("split bf16", n) for n in (5, 0, CHUNK + 1, *range(1, 20))]
    run(rows, max_grad_norm=1.0)
    sums = ["square_sums_kernel", "add_sums_kernel"]
    assert launched == [*sums, "prepare_kernel", "step_kernel"]
    launched.clear()
    run(rows)
    assert launched == ["prepare_kernel", "step_kernel"]
    launched.clear()
    run([*rows, make_row("fp32 fp32", 9)], max_grad_norm=1.0)
    sums = ["square_sums_kernel", *sums]
    assert launched == [*sums, "prepare_kernel", "step_kernel", "step_kernel"]


def test_offsets_past_32_bits():
    """The last chunk of 2^31 + 100 elements; the memory before it is not there at all."""
    start = 2**31 // CHUNK * CHUNK
    for kind in ("fp32 fp32", "bf16 bf16", "split bf16"):
        row = make_row(kind, 100, step=1)
        before = snapshot([row])
        table = make_table([row])
        table.rows[0, 6] = start + 100
        for column, name in enumerate(("p", "g", "m", "v", "remainder")):
            if (x := getattr(row, name)) is not None:
                table.rows[0, column] -= start * x.element_size()
        on, _ = device_table.on_device(table)
        ((p, g, first, count),) = on.launches
        assert first + count == on.num_chunks == 2**31 // CHUNK + 1
        on.launches[:] = [(p, g, first + count - 1, 1)]
        step(table, StepOptions([HYPER]), None)
        assert_step([row], before)


def test_what_changes_is_sent_again():
    row = make_row("fp32 fp32", 40, step=1)
    table = make_table([row])
    lr = torch.tensor(1e-3)
    options = StepOptions([(lr, *HYPER[1:])])
    before = snapshot([row])
    step(table, options, None)
    assert_step([row], before, hyper=[(1e-3, *HYPER[1:])])
    # The learning rate on the device, a gradient that moved, other hyperparameters.
    lr.fill_(1e-1)
    before = snapshot([row])
    step(table, options, None)
    assert_step([row], before, hyper=[(lr, *HYPER[1:])])
    row.g = torch.randn(40)
    table = replace(make_table([row]), cache=table.cache)  # one a step
    before = snapshot([row])
    hyper = (1e-2, 0.7, 0.8, 1e-5, 0.0)
    step(table, StepOptions([hyper]), None)
    assert_step([row], before, hyper=[hyper])
    sent = table.cache["hyper"], table.cache["device_table"].pointers
    copies = [id(mirror.copy) for mirror in sent]
    table = replace(make_table([row]), cache=table.cache)
    step(table, StepOptions([hyper]), None)
    assert [id(mirror.copy) for mirror in sent] == copies  # and what does not change is not
    with pytest.raises(TypeError, match=r"lr is a tensor of torch\.int64"):
        step(table, StepOptions([(torch.tensor(1), *HYPER[1:])]), None)
    for options in (StepOptions([HYPER], 1.0), StepOptions([HYPER], skip_nonfinite=True)):
        with pytest.raises(ValueError, match="need the sum of"):
            step(table, options, None)


def test_copies_of_a_capture(monkeypatch):
    """Their sources stay as they are, and what steps outside of it read does, too."""

    def values(*numbers):
        return torch.tensor(numbers, device="cpu")

    mirror = device_table.Mirror(torch.device(DEVICE))
    eager = mirror.on_device(values(1, 2))
    monkeypatch.setattr(device_table, "_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run one step outside of it"):
        mirror.on_device(values(3, 4))
    mirror.spares = [values(0, 0) for _ in range(2)]
    first = mirror.on_device(values(3, 4))
    again = mirror.on_device(values(3, 4))
    other = mirror.on_device(values(5, 6))
    assert len({x.data_ptr() for x in (eager, first, again, other)}) == 4
    assert [x.tolist() for x in mirror.fixed] == [[3, 4], [5, 6]] and not mirror.spares
    assert all(any(x is y for y in device_table._captured) for x in mirror.fixed)
    with pytest.raises(RuntimeError, match="cannot capture the first step of an optimizer"):
        run([make_row("fp32 fp32", 3)])
    monkeypatch.undo()
    assert mirror.on_device(values(1, 2)) is eager and eager.tolist() == [1, 2]


def test_a_table_that_outlives_no_step(monkeypatch):
    """What is on the device is kept between tables that share a cache, while only pointers change,
    and made anew when rows, dtypes or groups do."""
    cache = {}

    def stepped(rows):
        before = snapshot(rows)
        table = replace(make_table(rows), cache=cache)
        total = sum_squares(table).sum
        step(table, StepOptions([HYPER, HYPER]), None)
        assert_step(rows, before, hyper=[HYPER, HYPER])
        squares = [row.g.double().square().sum() for row in rows]
        assert abs(total - sum(squares)) <= 1e-14 * sum(squares)
        return cache["device_table"], cache["device_table"].pointers.sent, cache["hyper"].sent

    rows = [make_row(kind, 20 + i, seed=i) for i, kind in enumerate(("fp32 fp32", "split bf16"))]
    first, pointers, hyper = stepped(rows)
    again = stepped(rows)
    assert again[0] is first and again[1] is pointers and again[2] is hyper
    rows[1].g = rows[1].g.clone()
    moved = stepped(rows)
    assert moved[0] is first and moved[1] is not pointers and moved[2] is hyper
    seen = [first]
    for changed in (
        [*rows, make_row("fp32 fp32", 20)],  # another number of rows
        [make_row("fp32 fp32", 21), rows[1]],  # lengths
        [make_row("fp32 bf16", 21), rows[1]],  # dtypes
        [make_row("fp32 bf16", 21, group=1), rows[1]],  # groups
        [make_row("fp32 bf16", 21, group=1)],  # a parameter without a gradient
    ):
        now, _, same = stepped(changed)
        assert now not in seen and same is hyper
        seen.append(now)


def test_clipping_again_sends_nothing(monkeypatch):
    """The table of a call is on the device for the next one; of another thread's not."""
    sent = []
    real = device_table._send
    monkeypatch.setattr(device_table, "_send", lambda *a: sent.append(1) or real(*a))
    monkeypatch.setattr(clip_ops, "implementation", lambda *a: clip_grad_norm)
    monkeypatch.setattr(clip_ops, "_kept", threading.local())
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (5, CHUNK + 3, 7)]
    norms = []

    def clip():
        norms.append(float(clip_ops.clip_gradients(params, 0.5)))

    for p in params:
        p.grad = torch.ones_like(p)
    clip()
    assert norms == [pytest.approx((CHUNK + 15) ** 0.5)] and len(sent) == 3
    clip()
    assert norms[1] == pytest.approx(0.5, rel=1e-5) and len(sent) == 3
    params[0].grad = 2 * torch.ones(5)  # an address
    clip()
    assert norms[2] == pytest.approx((0.25 + 20) ** 0.5, rel=1e-3) and len(sent) == 4
    params[1].grad = None  # sizes
    clip()
    assert norms[3] < 0.5 and len(sent) == 7
    thread = threading.Thread(target=clip)
    thread.start()
    thread.join()
    assert norms[4] == norms[3] and len(sent) == 10


def test_other_gradients_in_a_capture(monkeypatch):
    cache, rows = {}, [make_row("fp32 fp32", 9), make_row("fp32 fp32", 5)]
    step(replace(make_table(rows), cache=cache), StepOptions([HYPER]), None)
    monkeypatch.setattr(device_table, "_capturing", lambda device: True)
    before = snapshot(rows)
    with pytest.raises(RuntimeError, match="or the first one with other gradients"):
        step(replace(make_table(rows[:1]), cache=cache), StepOptions([HYPER]), None)
    assert_unchanged(rows, before)


def test_spares_for_captures(monkeypatch):
    """A step, not the sums of clip_gradients, makes the pinned memory that a capture takes."""
    monkeypatch.setattr(device_table, "_send", lambda values, device: values.clone())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    mirror = device_table.Mirror(torch.device("cpu"))
    mirror.on_device(torch.tensor([1, 2], device="cpu"))
    mirror.prepare_captures()
    assert not mirror.spares
    mirror.device = torch.device("cuda")
    monkeypatch.setattr(device_table, "_capturing", lambda device: False)
    mirror.prepare_captures()
    assert [x.shape for x in mirror.spares] == [(2,)] * 4
    mirror.on_device(torch.tensor([[1.0]], device="cpu"))
    mirror.prepare_captures()
    assert [(x.shape, x.dtype) for x in mirror.spares] == [((1, 1), F32)] * 4


def test_capture_is_asked_of_the_tables_device(monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == 1)
    assert device_table._capturing(torch.device("cuda", 1))
    assert not device_table._capturing(torch.device("cuda", 0))
    assert not device_table._capturing(torch.device("cpu"))


@pytest.mark.parametrize("factor", [0.3, 1e-30, -2.0, 1.0])
def test_scale_gradients(factor):
    """In fp32 two roundings: of the factor and of the product; then once to 16 bits."""
    rows = [make_row(kind, n) for kind in KINDS for n in (0, 9, CHUNK, CHUNK + 3)]
    rows[1].g[4] = torch.inf
    before = snapshot(rows)
    scale_gradients(make_table(rows), factor)
    for row, old in zip(rows, before, strict=True):
        product = old.g.double() * factor
        if row.g.dtype == F64:
            assert_bitwise_equal(row.g, product)
            continue
        if factor in (1.0, -2.0):
            assert_bitwise_equal(row.g, product.to(row.g.dtype))
        finite = old.g.isfinite()
        assert (row.g[~finite] == product[~finite]).all()
        error = (row.g.double() - product)[finite].abs()
        limit = 1.0 if row.g.dtype == F32 else 0.501
        assert (error <= limit * ulp(product[finite], row.g.dtype)).all()
