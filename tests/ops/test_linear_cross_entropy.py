"""linear_cross_entropy_loss against its reference in fp64 and against PyTorch's linear + loss.

N rows, D model width, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_cases import assert_right, in_fp64, make, results
from tolerance import DEVICES, assert_bitwise_equal

from fastlm import (
    active_implementation,
    linear_cross_entropy_loss,
    linear_cross_entropy_plan,
)
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss_reference

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 3, 2), (7, 16, 33), (2, 3, 8, 65), (40, 32, 1000), (9, 24, 4099)]
OPTIONS = {
    "defaults": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num_items": {"num_items": 11},
    "together": {"label_smoothing": 0.2, "softcap": 8.0, "z_loss": 0.02, "num_items": 7.5},
    "together, none": {
        "label_smoothing": 0.2, "softcap": 8.0, "z_loss": 0.02, "reduction": "none",
    },
}  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, device):
    for shape in SHAPES:
        tensors = make(shape, dtype, device)
        got = results(linear_cross_entropy_loss, *tensors, **options)
        targets = tensors[3]
        assert got[0].shape == (targets.shape if options.get("reduction") == "none" else ())
        assert [t.dtype for t in got] == [torch.float32, dtype, torch.float32, torch.float32]
        assert_right(got, tensors, **options)


def test_weights_of_16_bits():
    # Their gradient is summed over chunks in fp32 and rounded once: as if there were one chunk.
    tensors = make((64, 8, 300), torch.bfloat16, master=False)
    whole = results(linear_cross_entropy_loss, *tensors)
    assert [t.dtype for t in whole[1:]] == [torch.bfloat16] * 3
    assert_right(whole, tensors)
    split = results(linear_cross_entropy_loss, *tensors, memory_budget=30_000)
    assert linear_cross_entropy_plan(*tensors[:2], bias=tensors[2], memory_budget=30_000).chunks > 2
    assert_right(split, tensors)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "all but bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_operands(reduction, frozen):
    hidden, weight, bias, targets = make((12, 8, 70))
    loss, *expected = results(
        linear_cross_entropy_loss, hidden, weight, bias, targets, reduction=reduction
    )
    trained = {
        "hidden": [False, True, True], "weight": [True, False, True],
        "bias": [True, True, False], "all but bias": [False, False, True],
    }[frozen]  # fmt: skip
    leaves = [
        t.detach().requires_grad_(wanted)
        for t, wanted in zip((hidden, weight, bias), trained, strict=True)
    ]
    got = linear_cross_entropy_loss(*leaves[:2], targets, bias=leaves[2], reduction=reduction)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(5)) + 0.2
    got.backward(upstream)
    for leaf, gradient, wanted in zip(leaves, expected, trained, strict=True):
        if wanted:
            torch.testing.assert_close(leaf.grad, gradient, rtol=1e-5, atol=1e-7)
        else:
            assert leaf.grad is None


def test_nothing_to_learn_from():
    for rows in ((5,), (0,), (2, 0)):
        hidden, weight, bias, targets = make((*rows, 8, 70))
        targets[...] = -100
        for reduction in ("mean", "sum", "none"):
            loss, *gradients = results(
                linear_cross_entropy_loss, hidden, weight, bias, targets, reduction=reduction
            )
            assert (loss == 0).all() and loss.shape == (rows if reduction == "none" else ())
            assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("compiled", [False, True])
def test_hidden_states_and_weights_of_any_strides(compiled):
    # Dense, but not row by row: as a convolution's output, and a transposed embedding.
    *tensors, targets = make((1, 6, 8, 70), bias=False)
    torch._dynamo.reset()
    loss_of = linear_cross_entropy_loss
    loss_of = torch.compile(loss_of, fullgraph=True) if compiled else loss_of
    for labels in (targets, torch.full_like(targets, -100)):
        found = []
        for function, turned in ((linear_cross_entropy_loss, False), (loss_of, True)):
            leaves = [(x.mT.contiguous() if turned else x) for x in tensors[:2]]
            leaves = [x.detach().requires_grad_() for x in leaves]
            loss = function(*(x.mT if turned else x for x in leaves), labels)
            gradients = torch.autograd.grad(loss * 0.3, leaves)
            found.append([loss.detach(), *(x.mT if turned else x for x in gradients)])
        torch.testing.assert_close(*found)


def test_ignored_rows_may_hold_anything():
    hidden, weight, bias, targets = make((9, 8, 70))
    expected = results(linear_cross_entropy_loss, hidden, weight, bias, targets)
    hidden[1::3] = torch.nan
    got = results(linear_cross_entropy_loss, hidden, weight, bias, targets)
    for a, b in zip(got, expected, strict=True):
        assert_bitwise_equal(a, b)


def test_ignored_rows_are_left_out_of_the_products(monkeypatch):
    rows = []
    mm = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, **k: rows.append(a.shape) or mm(a, b, **k))
    hidden, weight, _, targets = make((90, 8, 70), bias=False)
    linear_cross_entropy_loss(hidden, weight, targets)
    assert rows == [(60, 8)]


def test_return_lse():
    hidden, weight, bias, targets = make((2, 3, 8, 70))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss, lse = linear_cross_entropy_loss(
        hidden, weight, targets, bias=bias, softcap=5.0, return_lse=True
    )
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    true_loss, true_lse = linear_cross_entropy_loss_reference(
        doubles[0], doubles[1], targets, bias=doubles[2], softcap=5.0, return_lse=True
    )
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    got = torch.autograd.grad(loss + (weights * lse).sum(), leaves)
    expected = torch.autograd.grad(true_loss + (weights * true_lse).sum(), doubles)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_autocast():
    # fp32 parameters and states, bf16 products: as F.linear does it, the gradient of the fp32
    # weight is not rounded to bf16 on its way.
    hidden, weight, bias, targets = make((40, 16, 300))
    with torch.autocast("cpu", torch.bfloat16):
        got = results(linear_cross_entropy_loss, hidden, weight, bias, targets)
        assert linear_cross_entropy_plan(hidden, weight).extra_bytes > 2 * 40 * 300
    outside = results(linear_cross_entropy_loss, hidden.bfloat16(), weight, bias, targets)
    assert [t.dtype for t in got] == [torch.float32] * 4
    for a, b in zip(got, outside, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-2, atol=1e-5)
    assert_bitwise_equal(got[2], outside[2])
    # Chunks are added in fp32: of 40 chunks the sum is no multiple of a bf16 unit.
    with torch.autocast("cpu", torch.bfloat16):
        split = results(
            linear_cross_entropy_loss, hidden, weight, bias, targets, memory_budget=30_000
        )[2]
    assert not torch.equal(split, split.bfloat16().float())
    torch.testing.assert_close(split, got[2], rtol=2e-2, atol=1e-4)


def test_backward_twice():
    hidden, weight, _, targets = make((12, 8, 70), bias=False)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy_loss(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(3.0), retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(1.5))
    for a, b, c in zip(first, kept, second, strict=True):
        assert_bitwise_equal(a, b)
        torch.testing.assert_close(a, 2 * c)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(
            linear_cross_entropy_loss(hidden, weight, targets), weight, create_graph=True
        )


def test_inputs_are_unchanged():
    tensors = make((12, 8, 70), torch.bfloat16)
    before = [t.clone() for t in tensors]
    results(linear_cross_entropy_loss, *tensors, memory_budget=10_000)
    for tensor, copy in zip(tensors, before, strict=True):
        assert_bitwise_equal(tensor, copy)


def test_tied_embeddings():
    # The head's weight is also the embedding: its gradient is the sum of both uses.
    weight = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.arange(12) % 50
    loss = linear_cross_entropy_loss(weight[tokens], weight, tokens + 1)
    expected = F.cross_entropy(weight[tokens] @ weight.t(), tokens + 1)
    got = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(got, torch.autograd.grad(expected, weight))


@pytest.mark.parametrize("backend, sizes", [("aot_eager", [6, 9, 12]), ("inductor", [6])])
def test_compiles_without_a_graph_break(backend, sizes):
    compiled = torch.compile(linear_cross_entropy_loss, fullgraph=True, backend=backend)
    for rows in sizes:
        tensors = make((rows, 16, 65))
        for options in ({"label_smoothing": 0.1}, {"reduction": "none"}):
            got = results(compiled, *tensors, **options)
            expected = results(linear_cross_entropy_loss, *tensors, **options)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_opcheck():
    hidden, weight, bias, targets = make((4, 8, 33))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    wanted, dtype = [True, True, True], torch.float32
    options = (-100, 0.1, 5.0, 0.01)
    for reduction, with_gradients in (("mean", True), ("none", False)):
        torch.library.opcheck(
            torch.ops.fastlm.linear_cross_entropy_loss.default,
            (*leaves, targets, None, reduction, not with_gradients, dtype, wanted, with_gradients,
             3000, None, False, *options),
        )  # fmt: skip
    plain = [t.detach() for t in leaves]
    _, _, saved, *_ = torch.ops.fastlm.linear_cross_entropy_loss(
        *plain, targets, None, "none", True, dtype, wanted, False, 3000, None, False, *options
    )
    torch.library.opcheck(
        torch.ops.fastlm.linear_cross_entropy_gradient.default,
        (
            *plain,
            targets,
            saved,
            torch.rand(4),
            torch.rand(4),
            dtype,
            wanted,
            3000,
            False,
            *options,
        ),
    )


def test_impl_torch():
    tensors = make((12, 8, 70))
    assert active_implementation("linear_cross_entropy") == "cpp"
    got = results(linear_cross_entropy_loss, *tensors)
    for a, b in zip(got, results(linear_cross_entropy_loss, *tensors, impl="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    doubles = in_fp64(*tensors)
    leaves = [t.requires_grad_() for t in doubles[:2]]
    assert torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy_loss(x, w, tensors[3], softcap=3.0), leaves
    )


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"hidden has shape \(4, 8\), weight \(70, 9\)", {"weight": (70, 9)}),
        (ValueError, r"hidden has shape \(4, 8\), weight \(8,\)", {"weight": (8,)}),
        (ValueError, r"bias has shape \(69,\), not \(70,\)", {"bias": (69,)}),
        (ValueError, r"targets has shape \(4,\), hidden \(5, 8\)", {"hidden": (5, 8)}),
        (ValueError, "vocabulary no entry", {"weight": (0, 8)}),
        (ValueError, "memory_budget=100: it must be at least", {"memory_budget": 100}),
        (ValueError, "num_valid=5: it must lie in", {"num_valid": 5}),
        (ValueError, "reduction='avg'", {"reduction": "avg"}),
        (ValueError, "impl='triton'", {"impl": "triton"}),
        (ValueError, r"targets\[2\] = 70: labels must lie in \[0, 70\)", {"bad": 70}),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(error, message, change):
    hidden, weight, _, targets = make((4, 8, 70), ignored=False)
    arguments = {"hidden": hidden, "weight": weight, "bias": None, "targets": targets}
    for name, value in change.items():
        if name == "bad":
            targets[2] = value
        else:
            arguments[name] = torch.zeros(value) if isinstance(value, tuple) else value
    with pytest.raises(error, match=message):
        linear_cross_entropy_loss(**arguments)


def test_dtypes_that_do_not_fit():
    hidden, weight, _, targets = make((4, 8, 70))
    with pytest.raises(TypeError, match=r"weight has dtype torch\.int64"):
        linear_cross_entropy_loss(hidden, weight.long(), targets)
    with pytest.raises(TypeError, match=r"weight has dtype float64, hidden torch\.float32"):
        linear_cross_entropy_loss(hidden, weight.double(), targets)
    with pytest.raises(TypeError, match=r"targets has dtype torch\.float32"):
        linear_cross_entropy_loss(hidden, weight, targets.float())


MUTATIONS = {
    "zeroed": lambda g: torch.zeros_like(g),
    "halved": lambda g: g / 2,
    "rows swapped": lambda g: g.flip(0),
    "the largest missed": lambda g: torch.where(g.abs() == g.abs().max(), 0.0, g),
    "one NaN": lambda g: torch.where(torch.arange(g.shape[-1]) == 3, torch.nan, g),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_wrong_gradients_are_rejected(mutation, which, dtype):
    tensors = make((16, 12, 100), dtype, ignored=False)
    got = list(results(linear_cross_entropy_loss, *tensors))
    assert_right(got, tensors)
    got[which] = MUTATIONS[mutation](got[which])
    with pytest.raises(AssertionError, match="gradient of"):
        assert_right(got, tensors)
