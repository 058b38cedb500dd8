"""The launchers of kernels/cross_entropy.py against fp64, on a GPU or in Triton's interpreter.

test_triton_cross_entropy.py runs this file in a process of its own (tests/helpers/interpreter.py).
N rows, V vocabulary.
"""

import pytest
import torch
from fastlm.kernels import configs
from fastlm.kernels.cross_entropy import (
    check_labels,
    denominator_scale,
    row_gradients,
    row_losses,
    scale_in_place,
    sum_rows,
)
from fastlm.kernels.loss_options import Options
from interpreter import DEVICE, INTERPRETED, sampled
from tolerance import assert_as_accurate, assert_bitwise_equal
from triton_rows import DTYPES, OPTIONS, check, make

# NumPy, which the interpreter computes with, warns of what is meant: -inf - -inf in idle lanes.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@sampled(
    lambda name, dtype: dtype in DTYPES[: 1 + (name in ("defaults", "small softcap", "together"))],
    "name, dtype", OPTIONS, DTYPES,
)  # fmt: skip
def test_options(name, dtype):
    options = OPTIONS[name]
    for N, V in ((1, 1), (3, 1), (7, 2), (5, 17), (4, 511), (3, 1000)):
        if options.ignore_index == 0 and V == 1:
            continue
        check(*make(N, V, dtype, options=options), options)


def boundaries(itemsize, softcap):
    found = set()
    for aligned in (True, False):
        for largest, _ in configs.row_configs(itemsize, False, softcap=softcap, aligned=aligned):
            if largest is not None:
                unit = 16 // itemsize
                found |= {largest + d for d in (-1, 0, 1, unit)}
    return sorted(found)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_lengths_at_every_boundary(softcap, dtype):
    options = Options(softcap=softcap, label_smoothing=0.1, z_loss=1e-3)
    for V in boundaries(dtype.itemsize, softcap is not None):
        logits, targets = make(2 if V < 5000 else 1, V, dtype, seed=V, options=options)
        targets[-1] = V - 1
        check(logits, targets, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "N, V",
    [(2, 50257)]
    + [
        pytest.param(*n, marks=pytest.mark.exhaustive)
        for n in ((3, 10000), (2, 50304), (1, 128256))
    ],
)
def test_vocabularies(N, V, dtype):
    logits, targets = make(N, V, dtype)
    check(logits, targets)
    options = OPTIONS["together"]
    check(*make(N, V, dtype, options=options), options)


@sampled(
    lambda name, V, dtype: V < 1000 or (name, dtype) == ("smoothing", torch.bfloat16),
    "name, V, dtype", ["defaults", "smoothing", "z_loss"], [50, 40000], DTYPES,
)  # fmt: skip
def test_huge_logits(name, V, dtype):
    # exp(1e4) is no fp32 number; 1e4 is one of fp16. Near p = 1 the target's gradient cancels.
    logits, targets = make(7, V, dtype, scale=1.0)
    logits[0] += 1e4
    logits[1] -= 1e4
    logits[2] *= 1e3
    logits[3, 7], targets[3] = 1e4, 7
    logits[4], targets[4] = 1e4, 0
    logits[5], targets[5] = -1e4, 3
    logits[6, 5], targets[6] = logits[6].max() + 16, 5
    losses, _, gradient = check(logits, targets, OPTIONS[name])
    assert losses.isfinite().all() and gradient.isfinite().all()


@sampled(
    lambda V, softcap, dtype: V < 1000 or dtype == DTYPES[(softcap is None) == (V < 10_000)],
    "V, softcap, dtype", [20, 9000, 50304], [None, 4.0], DTYPES,
)  # fmt: skip
def test_minus_infinity(V, softcap, dtype):
    options = Options(softcap=softcap)
    logits, targets = make(3, V, dtype)
    logits[:, 5:9] = -torch.inf
    targets[:] = torch.tensor([4, 9, V - 1])
    logits[2, : V - 1] = -torch.inf  # whole blocks, the first ones
    losses, _, gradient = check(logits, targets, options)
    assert losses.isfinite().all() and (gradient[:, 5:9] == 0).all()
    if softcap is None:
        assert losses[2] == 0 and (gradient[2] == 0).all()
        targets[0] = 5  # a label of probability 0
        losses, _, _, gradient = row_losses(logits, targets, options, gradient_scale=torch.ones(()))
        assert losses[0] == torch.inf and gradient.isfinite().all()


@pytest.mark.parametrize("V", [20, 40000])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_nan_is_not_hidden(V, softcap):
    logits, targets = make(5, V)
    targets[:] = 0
    logits[2, 3] = torch.nan
    logits[3] = torch.nan
    options = Options(softcap=softcap)
    losses, lse, _, gradient = row_losses(logits, targets, options, gradient_scale=torch.ones(()))
    nan = [False, False, True, True, False]
    assert losses.isnan().tolist() == nan and lse.isnan().tolist() == nan
    assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == nan
    row_gradients(logits, targets, lse, torch.ones(5), None, options, logits)
    assert logits.isnan().all(-1).tolist() == logits.isnan().any(-1).tolist() == nan


@sampled(
    lambda name, V: V < 1000 or name in ("defaults", "together"), "name, V", OPTIONS, [20, 40000]
)
def test_ignored_rows_may_hold_anything(name, V):
    options = OPTIONS[name]
    logits, targets = make(6, V, options=options)
    targets[:] = options.ignore_index
    targets[5] = 1
    logits[0], logits[1], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3, 1:] = -torch.inf
    one = torch.ones(())
    losses, lse, _, gradient = row_losses(logits, targets, options, gradient_scale=one)
    assert (losses[:5] == 0).all() and (gradient[:5] == 0).all()
    assert losses[5] > 0 and (gradient[5] != 0).any()
    for grad_lse in (None, torch.tensor([0.0, 0, 0, 1.0, 0, 0])):
        out = torch.empty_like(logits)
        row_gradients(logits, targets, lse, torch.ones(6), grad_lse, options, out)
        assert (out[[0, 1, 2, 4]] == 0).all() and (out[5] != 0).any()
        torch.testing.assert_close(out[5], gradient[5], rtol=1e-5, atol=1e-9)
    if options.softcap is None:
        assert out[3, 0] == 1 and (out[3, 1:] == 0).all()


def test_grad_losses_of_any_form():
    logits, targets = make(5, 100)
    options = OPTIONS["smoothing"]
    scale = torch.tensor(0.37)
    _, lse, _, expected = row_losses(logits, targets, options, gradient_scale=scale)
    nothing = torch.zeros(5)
    every_other = torch.full((10,), 0.37)
    every_other[1::2] = torch.nan
    for grad_losses in (scale, scale.expand(5), scale.repeat(5), every_other[::2]):
        for grad_lse in (None, nothing):
            out = torch.full_like(logits, torch.nan)
            row_gradients(logits, targets, lse, grad_losses, grad_lse, options, out)
            assert_bitwise_equal(out, expected)
    row_gradients(logits, targets, lse, None, torch.ones(5), options, out)
    torch.testing.assert_close(out, torch.softmax(logits, -1))


def test_rows_that_overlap_are_not_written():
    logits, targets = make(1, 9)
    logits, targets = logits.expand(4, 9), targets.expand(4)
    losses, lse, _, _ = row_losses(logits, targets, OPTIONS["defaults"])
    with pytest.raises(ValueError, match="its rows overlap, as of expanded logits"):
        row_gradients(logits, targets, lse, losses, None, OPTIONS["defaults"], logits)


def test_no_rows():
    logits, targets = make(0, 9)
    one = torch.ones(())
    row_losses(logits.new_empty(9, 0).t(), targets, OPTIONS["defaults"])  # strides of (1, 0)
    losses, lse, _, gradient = row_losses(logits, targets, OPTIONS["together"], gradient_scale=one)
    assert losses.shape == lse.shape == (0,) and gradient.shape == (0, 9)
    row_gradients(logits, targets, lse, losses, lse, OPTIONS["defaults"], gradient)
    assert sum_rows(losses, one) == 0
    assert denominator_scale(targets, 9, -100, None, True) == 1
    scale_in_place(logits, torch.tensor(2.0))
    check_labels()


@pytest.mark.parametrize("N", [1, 5, 4095, 4096, 4097, 9000])
def test_denominator_and_sum(N):
    generator = torch.Generator().manual_seed(N)
    targets = torch.randint(50, (N,), generator=generator, device="cpu").to(DEVICE)
    targets[::2] = -100
    count = int((targets != -100).sum())
    assert denominator_scale(targets, 50, -100, None, True) == torch.tensor(1 / max(count, 1))
    assert denominator_scale(targets, 50, -100, None, False) == 1
    for items in (torch.tensor(7), torch.tensor(7.5), torch.tensor(7.5, dtype=torch.float64)):
        actual = denominator_scale(targets, 50, -100, items, True)
        assert actual.shape == () and actual.dtype == torch.float32
        assert actual == torch.tensor(1 / items.item() if count else 1.0)
        assert denominator_scale(targets, 50, -100, items, False) == 1
    assert denominator_scale(torch.full_like(targets, -100), 50, -100, None, True) == 1
    losses = torch.randn(N, generator=generator, device="cpu").to(DEVICE)
    scale = torch.tensor(0.3)
    total = sum_rows(losses, scale)
    assert total.shape == () and total.dtype == torch.float32
    assert total == (losses.double().sum() * scale.double()).float()
    check_labels()


@pytest.mark.parametrize("bad", [-1, 11, 2**31 + 3, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_label_out_of_range(ignore_index, bad):
    check_labels()
    options = Options(ignore_index=ignore_index)
    logits, targets = make(6, 11, options=options)
    expected = row_losses(logits, targets, options, gradient_scale=torch.ones(()))
    targets[[3, 5]] = torch.tensor([bad, -7])
    denominator_scale(targets, 11, ignore_index, None, True)
    other = targets.clone()
    other[0] = 999
    denominator_scale(other, 12, ignore_index, None, False)  # the first one noted stays
    losses, lse, _, gradient = row_losses(logits, targets, options, gradient_scale=torch.ones(()))
    good = [0, 1, 2, 4]
    assert losses[[3, 5]].isnan().all() and gradient[[3, 5]].isnan().all()
    assert_bitwise_equal(lse, expected[1])
    assert_bitwise_equal(losses[good], expected[0][good])
    assert_bitwise_equal(gradient[good], expected[3][good])
    out = torch.zeros_like(logits)
    row_gradients(logits, targets, lse, torch.ones(()), torch.ones(6), options, out)
    assert out[[3, 5]].isnan().all() and out[good].isfinite().all()
    text = rf"^targets \(flattened\) \[3\] = {bad}: labels must lie in \[0, 11\) or be ignore_index"
    with pytest.raises(ValueError, match=text + rf" \({ignore_index}\)$"):
        check_labels()
    check_labels()  # once


def test_labels_are_checked_outside_inference_mode():
    with torch.inference_mode():
        denominator_scale(torch.tensor([99]), 11, -100, None, True)
    with pytest.raises(ValueError, match=r"\[0\] = 99"):
        check_labels()
    check_labels()


@sampled(lambda V, dtype: dtype in DTYPES[V > 1000 : 2], "V, dtype", [40, 41, 20001], DTYPES)
def test_rows_anywhere(V, dtype):
    # A slice of wider rows, every other row, a start that is no multiple of 16 bytes.
    logits, targets = make(4, V, dtype)
    one = torch.ones(())
    options = OPTIONS["smoothing"]
    expected = row_losses(logits, targets, options, gradient_scale=one)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)  # another block, another order of sums
    wide = torch.full((8, V + 24), torch.nan, dtype=dtype)
    for view in (wide[:4, :V], wide[:4, 8 : V + 8], wide[::2, :V], wide[:4, 3 : V + 3]):
        view.copy_(logits)
        losses, lse, _, gradient = row_losses(view, targets, options, gradient_scale=one)
        assert gradient.is_contiguous()
        for actual, values in zip((losses, lse, lse, gradient), expected, strict=True):
            torch.testing.assert_close(actual, values, rtol=tolerance, atol=1e-9)
        outside = wide.isnan().sum()
        row_gradients(view, targets, lse, one, None, options, view)
        torch.testing.assert_close(view, gradient, rtol=tolerance, atol=1e-9)
        assert wide.isnan().sum() == outside  # nothing is written between the rows
        wide.fill_(torch.nan)


def test_offsets_past_32_bits():
    # Three rows, 2^31 elements from first to last; the memory between them is never touched.
    V, stride = 72, 2**30 + 8
    storage = torch.empty(2 * stride + V, dtype=torch.float16)
    logits = storage.as_strided((3, V), (stride, 1))
    values, targets = make(3, V, torch.float16)
    logits.copy_(values)
    options = OPTIONS["defaults"]
    expected = row_losses(values, targets, options, gradient_scale=torch.ones(()))
    losses, lse, _, _ = row_losses(
        logits, targets, options, gradient_scale=torch.ones(()), out=logits
    )  # fmt: skip
    assert_bitwise_equal(losses, expected[0])
    assert_bitwise_equal(logits, expected[3])
    logits.copy_(values)
    row_gradients(logits, targets, lse, torch.ones(()), None, options, logits)
    assert_bitwise_equal(logits, expected[3])
    # A stride that is itself past 32 bits.
    assert 2 * stride > 2**31
    far = storage.as_strided((2, V), (2 * stride, 1))
    far.copy_(values[:2])
    assert_bitwise_equal(row_losses(far, targets[:2], options)[0], expected[0][:2])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 4096, 10007, 3 * 4096 + 8])
def test_scale_in_place(n, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator, device="cpu").to(DEVICE, dtype)
    if n > 1:
        x[1] = torch.inf
    before = x.clone()
    for one in (torch.ones(()), torch.ones((), dtype=torch.float64)):
        scale_in_place(x, one)
        assert_bitwise_equal(x, before)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for factor in (0.3, -2.0):
        factor = torch.tensor(factor)
        expected = (x.to(wide) * factor.to(wide)).to(dtype)
        scale_in_place(x, factor)
        if dtype == torch.bfloat16 and INTERPRETED:  # it truncates to that
            assert_as_accurate(x, expected, expected.double())
        else:
            assert_bitwise_equal(x, expected)
        x.copy_(before)
    with pytest.raises(ValueError, match="contiguous"):
        scale_in_place(torch.zeros(4, 4)[:, ::2], factor)


def test_more_blocks_than_programs(monkeypatch):
    real = configs.scale_config
    monkeypatch.setattr(configs, "scale_config", lambda rocm: (real(rocm)[0], 2))
    x = torch.arange(5 * 4096 + 3, dtype=torch.float32)
    scale_in_place(x, torch.tensor(2.0))
    assert torch.equal(x, 2 * torch.arange(5 * 4096 + 3, dtype=torch.float32))


@pytest.mark.parametrize("V", [300, 40000])
def test_same_bits_every_time(V):
    logits, targets = make(4, V, torch.bfloat16)
    one = torch.ones(())
    first = row_losses(logits, targets, OPTIONS["together"], gradient_scale=one)
    second = row_losses(logits, targets, OPTIONS["together"], gradient_scale=one)
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)
    # And of a row whatever stands in the others.
    alone = row_losses(logits[2:3], targets[2:3], OPTIONS["together"], gradient_scale=one)
    for a, b in zip(first, alone, strict=True):
        assert_bitwise_equal(a[2:3], b)


def test_arguments_that_do_not_fit():
    logits, targets = make(3, 8)
    one = torch.ones(())
    options = OPTIONS["defaults"]
    with pytest.raises(TypeError, match="logits has dtype"):
        row_losses(logits.double(), targets, options)
    with pytest.raises(ValueError, match="logits has strides"):
        row_losses(torch.zeros(8, 3).t(), targets, options)
    with pytest.raises(ValueError, match=r"out is torch.float32 \(3, 9\)"):
        row_losses(logits, targets, options, gradient_scale=one, out=torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"out is torch\.float16"):
        row_losses(logits, targets, options, gradient_scale=one, out=logits.half())
