"""cross_entropy_loss against its reference in fp64 and against torch.nn.functional.cross_entropy.

N rows, V vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_cases import (
    DTYPES,
    INTERPRETED,
    OPTIONS,
    assert_right,
    cross_entropy_loss,
    loss_and_gradient,
    make,
    torch_loss,
)
from tolerance import DEVICES, assert_bitwise_equal

from fastlm import active_implementation
from fastlm.ops.cross_entropy import cross_entropy_loss_reference

pytestmark = pytest.mark.usefixtures("one_thread")

# Leading dimensions and V: one row, one class; one less and more than a vector of 64; odd ones;
# a vocabulary larger than a block of 4096.
SHAPES = [(1, 1), (3, 1), (7, 2), (4, 63), (5, 64), (4, 65), (2, 3, 17), (6, 1000), (2, 4097)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options, dtype",
    [
        pytest.param(
            options, dtype, id=f"{name}-{dtype}",
            # A sample where each case takes half a second.
            marks=[pytest.mark.exhaustive] * (
                INTERPRETED and dtype != torch.float32 and not name.startswith("together")
            ),
        )
        for name, options in OPTIONS.items() for dtype in DTYPES
    ],
)  # fmt: skip
def test_options(options, dtype, device):
    for shape in SHAPES:
        logits, targets = make(shape, dtype, device)
        if "ignore_index" in options:
            if shape[-1] <= 3:
                continue
            targets[targets == -100] = 3  # a label of the vocabulary, which others have, too
        loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        assert loss.shape == (targets.shape if options.get("reduction") == "none" else ())
        assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_is_differentiable(options):
    # The oracle itself: its gradient by finite differences, its value by PyTorch's function.
    logits, targets = make((2, 3, 7))
    targets[targets == -100] = options.get("ignore_index", -100)
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: cross_entropy_loss_reference(x, targets, **options), (logits,)
    )
    reference = cross_entropy_loss_reference(logits, targets, **options)
    torch.testing.assert_close(
        reference.float(), torch_loss(logits.float(), targets, **options), rtol=1e-6, atol=1e-6
    )


@pytest.mark.skipif(INTERPRETED, reason="fp64 runs impl 'torch'")
def test_double_precision():
    logits, targets = make((2, 3, 7))
    logits = logits.double().requires_grad_()
    options = OPTIONS["together"]
    assert torch.autograd.gradcheck(lambda x: cross_entropy_loss(x, targets, **options), (logits,))
    torch.testing.assert_close(
        cross_entropy_loss(logits, targets, **options),
        cross_entropy_loss_reference(logits, targets, **options),
        rtol=1e-13,
        atol=0,
    )


def test_cs336_values():
    # The logits and targets of CS336's own test, with its second part: overflow.
    logits = torch.tensor(
        [
            [0.1088, 0.1060, 0.6683, 0.5131, 0.0645],
            [0.4538, 0.6852, 0.2520, 0.3792, 0.2675],
            [0.4578, 0.3357, 0.6384, 0.0481, 0.5612],
            [0.9639, 0.8864, 0.1585, 0.3038, 0.0350],
            [0.3356, 0.9013, 0.7052, 0.8294, 0.8334],
            [0.6333, 0.4434, 0.1428, 0.5739, 0.3810],
            [0.9476, 0.5917, 0.7037, 0.2987, 0.6208],
            [0.8541, 0.1803, 0.2054, 0.4775, 0.8199],
        ]
    )
    targets = torch.tensor([1, 0, 2, 2, 4, 1, 4, 0])
    for inputs in (logits, 1000.0 * logits):
        torch.testing.assert_close(
            cross_entropy_loss(inputs, targets), F.cross_entropy(inputs, targets), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS["label_smoothing"], OPTIONS["z_loss"]], ids=str)
def test_huge_logits(dtype, options):
    # exp(1e4) is no fp32 number; 1e4 is one of fp16.
    logits, targets = make((6, 50), dtype, scale=1.0)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e4
    logits[3, 7], targets[3] = 1e4, 7
    logits[4], targets[4] = 1e4, 0
    targets[5] = 49
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
    assert loss.isfinite() and gradient.isfinite().all()
    assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, OPTIONS["softcap"], OPTIONS["z_loss"]], ids=str)
def test_minus_infinity_is_no_probability(dtype, options):
    logits, targets = make((4, 20), dtype, ignored=False)
    logits[:, 5:9] = -torch.inf
    targets[:] = torch.tensor([0, 4, 9, 19])
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
    assert loss.isfinite() and (gradient[:, 5:9] == 0).all()
    assert_right(loss, gradient, logits, targets, **options)
    if "softcap" not in options:  # a label of probability 0
        targets[0] = 5
        assert cross_entropy_loss(logits, targets, **options) == torch.inf


def test_nan_is_not_hidden():
    logits, targets = make((4, 20), ignored=False)
    logits[2, 3] = torch.nan
    losses = cross_entropy_loss(logits, targets, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False]
    assert cross_entropy_loss(logits, targets).isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(4, 9), (0, 9), (2, 0, 9)], ids=str)
def test_nothing_to_learn_from(shape, reduction, dtype):
    # Every row ignored, or no row at all: not 0/0, which F.cross_entropy's mean returns.
    logits, targets = make(shape, dtype)
    targets[:] = -100
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 2.0}):
        loss, gradient = loss_and_gradient(
            cross_entropy_loss, logits, targets, reduction=reduction, **options
        )
        assert loss.shape == (targets.shape if reduction == "none" else ())
        assert (loss == 0).all() and (gradient == 0).all()


def test_ignored_rows_may_hold_anything():
    # Padding is often masked with -inf, whose lse is infinite: it must not enter by 0 * inf.
    logits, targets = make((5, 9), ignored=False)
    expected = cross_entropy_loss(logits[1:], targets[1:], z_loss=0.1, label_smoothing=0.1)
    for padding in (-torch.inf, torch.inf, torch.nan):
        logits[0], targets[0] = padding, -100
        loss = cross_entropy_loss(logits, targets, z_loss=0.1, label_smoothing=0.1)
        torch.testing.assert_close(loss, expected)


def test_num_items_counts_over_micro_batches():
    logits, targets = make((8, 30))
    logits.requires_grad_()
    (whole,) = torch.autograd.grad(cross_entropy_loss(logits, targets), logits)
    items = (targets != -100).sum()
    for num_items in (items, int(items), float(items), items.double()):
        parts = [
            cross_entropy_loss(logits[rows], targets[rows], num_items=num_items)
            for rows in (slice(0, 3), slice(3, 8))
        ]
        assert all(part.dtype == torch.float32 for part in parts)
        (summed,) = torch.autograd.grad(sum(parts), logits)
        torch.testing.assert_close(summed, whole, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_return_lse(dtype, softcap):
    logits, targets = make((2, 3, 40), dtype)
    logits.requires_grad_()
    loss, lse = cross_entropy_loss(logits, targets, softcap=softcap, return_lse=True)
    torch.testing.assert_close(loss, cross_entropy_loss(logits, targets, softcap=softcap))
    true_logits = logits.detach().double().requires_grad_()
    true_loss, true_lse = cross_entropy_loss_reference(
        true_logits, targets, softcap=softcap, return_lse=True
    )
    assert lse.dtype == torch.float32 and lse.shape == targets.shape
    torch.testing.assert_close(lse.double(), true_lse, rtol=1e-6, atol=1e-6)
    # Both outputs in one backward pass.
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1))
    (loss + (weights * lse).sum()).backward()
    (true_loss + (weights * true_lse).sum()).backward()
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        logits.grad.double(), true_logits.grad, rtol=tolerance, atol=tolerance
    )


def test_lse_alone_is_differentiable():
    logits, targets = make((5, 11))
    logits.requires_grad_()
    _, lse = cross_entropy_loss(logits, targets, return_lse=True)
    (gradient,) = torch.autograd.grad(lse.sum(), logits)
    torch.testing.assert_close(gradient, torch.softmax(logits, dim=-1))


def test_inputs_are_unchanged():
    logits, targets = make((6, 33), torch.bfloat16)
    before = logits.clone(), targets.clone()
    logits.requires_grad_()
    cross_entropy_loss(logits, targets, **OPTIONS["together"]).backward()
    assert_bitwise_equal(logits.detach(), before[0])
    assert_bitwise_equal(targets, before[1])


def test_backward_twice():
    # A kernel that writes the gradient over the logits, or scales it in place, fails here.
    logits, targets = make((6, 33))
    logits.requires_grad_()
    loss = cross_entropy_loss(logits, targets)
    (first,) = torch.autograd.grad(loss, logits, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, torch.tensor(3.0))
    assert_bitwise_equal(first, second)
    (unit,) = torch.autograd.grad(cross_entropy_loss(logits, targets), logits)
    torch.testing.assert_close(first, 3 * unit)


def test_memory_layouts():
    # A slice of a padded vocabulary, a transposed matrix, every other row.
    logits, targets = make((6, 40), ignored=False)
    padded = torch.full((6, 64), torch.nan)
    padded[:, :40] = logits
    spread = torch.full((12, 40), torch.nan)
    spread[::2] = logits
    expected, expected_gradient = loss_and_gradient(cross_entropy_loss, logits, targets)
    for view in (padded[:, :40], logits.t().contiguous().t(), spread[::2]):
        view = view.detach().requires_grad_()
        assert not view.is_contiguous()
        loss = cross_entropy_loss(view, targets.repeat_interleave(2)[::2])
        assert_bitwise_equal(loss.detach(), expected)
        (gradient,) = torch.autograd.grad(loss, view)
        (contiguous,) = torch.autograd.grad(
            cross_entropy_loss(leaf := logits.clone().requires_grad_(), targets), leaf
        )
        torch.testing.assert_close(gradient, contiguous, rtol=0, atol=0)
    assert expected_gradient.isfinite().all()


def test_one_row_without_leading_dimensions():
    logits, targets = make((17,), ignored=False)
    assert targets.shape == ()
    torch.testing.assert_close(
        cross_entropy_loss(logits, targets), F.cross_entropy(logits, targets)
    )
    assert cross_entropy_loss(logits, targets, reduction="none").shape == ()


def test_threads_do_not_change_the_result():
    logits, targets = make((64, 501))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(loss_and_gradient(cross_entropy_loss, logits, targets))
    finally:
        torch.set_num_threads(1)
    for loss, gradient in results[1:]:
        assert_bitwise_equal(loss, results[0][0])
        assert_bitwise_equal(gradient, results[0][1])


# Another size becomes a dynamic one; compiling that, too, with inductor would take 5 s more.
@pytest.mark.parametrize(
    "backend, sizes",
    [
        ("aot_eager", [6, 9, 12]),
        pytest.param("inductor", [6], marks=[pytest.mark.exhaustive] * INTERPRETED),
    ],
)
def test_compiles_without_a_graph_break(backend, sizes):
    options = OPTIONS["together"]
    compiled = torch.compile(
        lambda x, y: cross_entropy_loss(x, y, **options), fullgraph=True, backend=backend
    )
    for rows in sizes:
        logits, targets = make((rows, 65))
        loss, gradient = loss_and_gradient(compiled, logits, targets)
        expected, expected_gradient = loss_and_gradient(
            cross_entropy_loss, logits, targets, **options
        )
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(INTERPRETED, reason="impl is given")
def test_implementation_can_be_forced():
    logits, targets = make((3, 5), ignored=False)
    forced = cross_entropy_loss(logits, targets, impl=active_implementation("cross_entropy"))
    assert_bitwise_equal(forced, cross_entropy_loss(logits, targets))
    torch.testing.assert_close(cross_entropy_loss(logits, targets, impl="torch"), forced)
