"""cross_entropy_loss where kernels can go wrong: sizes, instruction sets, in place, dispatcher.

N rows, V vocabulary.
"""

import pytest
import torch
from cross_entropy_cases import (
    DTYPES,
    INTERPRETED,
    OPTIONS,
    assert_right,
    cross_entropy_loss,
    loss_and_gradient,
    make,
)
from tolerance import DEVICES, assert_bitwise_equal

from fastlm import check_labels
from fastlm.extension import extension

pytestmark = pytest.mark.usefixtures("one_thread")

# Around vectors (8, 16, 32), the C++ kernel's blocks (2048) and Triton's; real vocabularies.
VOCABULARIES = [7, 17, 1025, 2049, 8191, 16385, 50257]
VOCABULARIES += [
    pytest.param(V, marks=pytest.mark.exhaustive)
    for V in (
        8, 9, 15, 16, 31, 33, 1023, 1024, 2047, 2048, 4095, 4097, 8193, 10000, 16383, 32767, 32768,
        32769, 50304, 128256,
    )
]  # fmt: skip

only_cpp = pytest.mark.skipif(INTERPRETED, reason="of the C++ kernel")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_vocabularies(V, device):
    for dtype in DTYPES:
        logits, targets = make((3, V), dtype, device, scale=2.0)
        targets[0] = V - 1
        for options in ({}, {"reduction": "none"}):  # gradient in the forward pass, and after it
            loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
            assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcaps(softcap, reduction, dtype, device):
    # 1000: not a multiple of a tile, whose padding must not become -softcap.
    logits, targets = make((5, 1000), dtype, device, scale=10.0)
    logits[0] = -100.0  # all at the cap
    options = {"softcap": softcap, "reduction": reduction}
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
    assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("margin", [3.0, 8.0, 12.0, 20.0])
def test_sure_rows(margin, reduction, dtype, device):
    # p -> 1: rounding the softmax before 1 is taken off loses every digit of the gradient.
    logits, targets = make((6, 4000), dtype, device, scale=0.1, ignored=False)
    logits[torch.arange(6), targets] = margin + 8.0
    options = {"reduction": reduction}
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
    assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_huge_logits_after_the_forward_pass(reduction, device):
    # Near 1e4 an fp32 lse is off by 5e-4: probabilities must not be computed from it.
    logits, targets = make((4, 3000), device=device, ignored=False)
    logits[0] += 1e4
    logits[1] -= 1e4
    for inplace in (False, True):
        options = {"reduction": reduction}
        loss, gradient = loss_and_gradient(
            lambda x, y, **options: cross_entropy_loss(x.clone(), y, inplace=inplace, **options),  # noqa: B023
            logits, targets, **options,
        )  # fmt: skip
        assert_right(loss, gradient, logits, targets, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("finite", [0, 2500, 4999])
def test_only_one_finite_logit(finite, device):
    # Whole blocks of -infinity, also the first: exp(-inf - -inf) is NaN.
    logits = torch.full((2, 5000), -torch.inf, device=device)
    logits[:, finite] = 1.0
    targets = torch.tensor([finite, -100], device=device)
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets)
    assert loss == 0 and (gradient == 0).all()
    loss, lse = cross_entropy_loss(logits, targets, return_lse=True)
    assert loss == 0 and (lse == 1).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_in_place(reduction, dtype, device):
    logits, targets = make((7, 1003), dtype, device)
    options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    loss, _ = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
    leaf = logits.clone().requires_grad_()
    copy = leaf * 1  # what a model's head returns: the loss may have its memory
    loss_inplace = cross_entropy_loss(copy, targets, inplace=True, **options)
    assert_bitwise_equal(copy.detach(), logits, "logits after the forward pass")
    torch.testing.assert_close(loss_inplace, loss, rtol=1e-6, atol=0)
    upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(3)).to(device)
    (got,) = torch.autograd.grad(loss_inplace, copy, upstream, retain_graph=True)
    assert got.data_ptr() == copy.data_ptr()  # no second buffer
    leaf_again = logits.clone().requires_grad_()
    loss_again = cross_entropy_loss(leaf_again, targets, **options)
    (expected,) = torch.autograd.grad(loss_again, leaf_again, upstream)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=1e-7)
    with pytest.raises(RuntimeError, match=r"a second time.*overwritten"):
        torch.autograd.grad(loss_inplace, copy, upstream)


def test_in_place_without_a_gradient_changes_nothing():
    logits, targets = make((4, 100))
    before = logits.clone()
    cross_entropy_loss(logits, targets, inplace=True)
    with torch.no_grad():
        cross_entropy_loss(logits.requires_grad_(), targets, inplace=True)
    assert_bitwise_equal(logits.detach(), before)


def test_in_place_needs_no_other_user_of_the_logits():
    # Someone else saved them for backward: autograd must see that they have changed.
    logits, targets = make((4, 100))
    x = logits.requires_grad_() * 1
    other = x.square().sum()
    cross_entropy_loss(x, targets, inplace=True).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_on_views():
    # Rows of a padded vocabulary, and columns that are not adjacent.
    logits, targets = make((6, 40), ignored=False)
    _, expected = loss_and_gradient(lambda x, y: cross_entropy_loss(x, y), logits, targets)
    upstream = loss_and_gradient(lambda x, y: x.sum(), logits, targets)[1][0, 0]
    padded = torch.zeros(6, 64)
    transposed = logits.t().contiguous().t()
    padded[:, :40] = logits
    for base, view in ((padded, padded[:, :40]), (transposed, transposed)):
        leaf = torch.zeros((), requires_grad=True)
        x = view.detach()
        x = x + leaf if base is not padded else _with_graph(x, leaf)
        cross_entropy_loss(x, targets, inplace=True).backward(upstream)
        torch.testing.assert_close(x.detach(), expected, rtol=1e-5, atol=1e-8)
    assert (padded[:, 40:] == 0).all()  # between the rows nothing is written


class _with_memory(torch.autograd.Function):
    """x in its own memory, as the result of an operation on `leaf`."""

    @staticmethod
    def forward(ctx, x, leaf):
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient.sum()


def _with_graph(x, leaf):
    return _with_memory.apply(x, leaf)


def test_kept_graph_keeps_the_gradient():
    # Three backwards with other upstream gradients; what was returned before stays as it was.
    logits, targets = make((5, 77))
    logits.requires_grad_()
    loss = cross_entropy_loss(logits, targets)
    (one,) = torch.autograd.grad(loss, logits, retain_graph=True)
    kept = one.clone()
    (two,) = torch.autograd.grad(loss, logits, torch.tensor(2.0), retain_graph=True)
    (half,) = torch.autograd.grad(loss, logits, torch.tensor(0.5))
    assert_bitwise_equal(one, kept)
    assert_bitwise_equal(two, 2 * one)
    assert_bitwise_equal(half, one / 2)


def test_leaf_gets_the_gradient_itself():
    logits, targets = make((5, 77))
    logits.requires_grad_()
    cross_entropy_loss(logits, targets).backward()
    first = logits.grad.clone()
    cross_entropy_loss(logits, targets).backward()
    torch.testing.assert_close(logits.grad, 2 * first)


@pytest.mark.skipif(INTERPRETED, reason="impl is given")
def test_second_derivative():
    logits, targets = make((3, 7), ignored=False)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='torch'"):
        torch.autograd.grad(cross_entropy_loss(logits, targets), logits, create_graph=True)
    loss = cross_entropy_loss(logits, targets, impl="torch")
    (first,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert first.square().sum().requires_grad


@only_cpp
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_instruction_sets(isa, dtype):
    module = extension()
    try:
        module.force_isa(isa)
    except ValueError:
        pytest.skip(f"this machine has no {isa}")
    try:
        for V in (1, 9, 31, 1000, 2049, 5003):
            logits, targets = make((4, V), dtype)
            for options in ({}, {"reduction": "none"}, OPTIONS["together"], OPTIONS["softcap"]):
                loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets, **options)
                assert_right(loss, gradient, logits, targets, **options)
    finally:
        module.force_isa(None)


@only_cpp
@pytest.mark.parametrize(
    "shape",
    [(64, 501), pytest.param((37, 10000), marks=pytest.mark.exhaustive), (300, 50257)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_any_bit(shape, dtype):
    # The last one is written past the caches.
    logits, targets = make(shape, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets)
        losses, after = loss_and_gradient(cross_entropy_loss, logits, targets, reduction="none")
        results.append((loss, gradient, losses, after))
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert_bitwise_equal(got, expected)


@only_cpp
def test_offsets_beyond_two_to_the_31():
    # A few rows, three GiB apart, of memory that nothing else touches.
    stride, V = 1_600_000_000, 300
    try:
        memory = torch.empty(2 * stride + V, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("no address space of 6 GB")
    logits = memory.as_strided((3, V), (stride, 1))
    small, targets = make((3, V), torch.float16, ignored=False)
    logits.copy_(small)
    loss, gradient = loss_and_gradient(cross_entropy_loss, small, targets)
    x = logits.detach().requires_grad_()
    assert_bitwise_equal(cross_entropy_loss(x, targets).detach(), loss)
    generator = torch.Generator().manual_seed(5)
    upstream = 0.2 + torch.rand((), generator=generator)
    (got,) = torch.autograd.grad(cross_entropy_loss(x, targets), x, upstream)
    assert_bitwise_equal(got, gradient)


@pytest.mark.skipif(INTERPRETED, reason="the CPU op of fastlm")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction):
    logits, targets = make((4, 33))
    logits.requires_grad_()
    options = (-100, 0.1, 5.0, 0.01)
    for with_gradient in (False, reduction == "mean"):
        torch.library.opcheck(
            torch.ops.fastlm.cross_entropy_loss.default,
            (logits, targets, None, reduction, True, with_gradient, False, *options),
        )
    _, _, saved, *_ = torch.ops.fastlm.cross_entropy_loss(
        logits.detach(), targets, None, reduction, True, False, False, *options
    )
    weights = torch.rand(4) if reduction == "none" else torch.tensor(0.5)
    arguments = (targets, saved, weights, torch.rand(4), *options)
    x = logits.detach()
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_gradient.default, (x, *arguments))
    torch.library.opcheck(torch.ops.fastlm.cross_entropy_gradient_.default, (x, *arguments))
    torch.library.opcheck(torch.ops.fastlm.scale_.default, (x, torch.tensor(2.0)))


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_with_a_head(inplace):
    # As in a model: the logits are made inside of the graph.
    def loss_of(x, w, y):
        return cross_entropy_loss(x @ w.t(), y, inplace=inplace)

    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    for rows in (5, 8, 11):  # the second makes the size dynamic
        _, targets = make((rows, 50))
        x, w = torch.randn(rows, 12, requires_grad=True), torch.randn(50, 12, requires_grad=True)
        for upstream in (1.0, 3.0):
            got = torch.autograd.grad(compiled(x, w, targets) * upstream, (x, w))
            expected = torch.autograd.grad(loss_of(x, w, targets) * upstream, (x, w))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@only_cpp
def test_label_out_of_range_in_a_compiled_graph():
    compiled = torch.compile(cross_entropy_loss, fullgraph=True, backend="aot_eager")
    logits, targets = make((2, 3, 9), ignored=False)
    compiled(logits, targets)
    targets[1, 1] = 9
    with pytest.raises(ValueError, match=r"targets\[1, 1\] = 9: .*\[0, 9\)"):
        compiled(logits, targets)
    check_labels()  # nothing is left for later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_waits_for_nothing_and_can_be_captured():
    logits, targets = make((64, 1000), torch.bfloat16, "cuda")
    logits.requires_grad_()

    def loss_and_its_gradient():
        loss = cross_entropy_loss(logits, targets)
        # Not backward(): a leaf accumulates on the stream of its first use; captures refuse that.
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss.detach(), gradient

    loss_and_its_gradient()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = loss_and_its_gradient()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, gradient = loss_and_its_gradient()
    graph.replay()
    assert_bitwise_equal(captured, expected[0])
    assert_bitwise_equal(gradient, expected[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_label_out_of_range():
    logits, targets = make((2, 3, 9), device="cuda", ignored=False)
    check_labels()
    targets[1, 1] = 9
    assert cross_entropy_loss(logits, targets).isnan()
    with pytest.raises(ValueError, match=r"\[4\] = 9: .*\[0, 9\)"):
        check_labels()
    check_labels()
