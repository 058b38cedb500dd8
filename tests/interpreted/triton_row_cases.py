"""The row kernels of cross-entropy where their loops begin and end.

On a GPU or in Triton's interpreter. test_triton_cross_entropy.py runs this file in a process of its
own (tests/helpers/interpreter.py). Blocks are small here: rows of hundreds of elements go through
several.
"""

import pytest
import torch
from fastlm.kernels import configs
from fastlm.kernels.cross_entropy import _row_arguments, row_gradients, row_losses
from fastlm.kernels.loss_options import Options
from interpreter import sampled
from tolerance import assert_bitwise_equal
from triton_rows import DTYPES, OPTIONS, by_torch, check, make

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BLOCK = 256  # 32 threads, of bf16 8 elements each


@pytest.fixture
def small_blocks(monkeypatch):
    """Two passes over rows in blocks of 256."""
    config = configs.RowConfig(BLOCK, 32, False, False)
    monkeypatch.setattr(configs, "row_config", lambda *_, **__: config)


@sampled(
    lambda name, V: (name == "defaults") != (V == 3 * BLOCK),
    "name, V", ["defaults", "together"], [8, BLOCK, 3 * BLOCK, 2 * BLOCK + 8],
)  # fmt: skip
def test_labels_at_the_ends_of_blocks(name, V, small_blocks):
    places = [0, BLOCK - 1, BLOCK, V - 1]
    places = sorted({y for y in places if (OPTIONS[name].ignore_index == 0) <= y < V})
    logits, _ = make(len(places), V, torch.bfloat16, options=OPTIONS[name])
    losses, _, gradient = check(logits, torch.tensor(places), OPTIONS[name])
    assert (losses > 0).all()
    for row, y in zip(gradient.float(), places, strict=True):  # the label's alone is negative
        assert row.argmin() == y and (name != "defaults" or (row < 0).nonzero().tolist() == [[y]])


@pytest.mark.parametrize("one_read", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_label_of_any_probability(dtype, one_read, monkeypatch):
    """1 - p_y from 1 to 2^-20 and less: the sum of the others, not a difference."""
    config = configs.RowConfig(1024 if one_read else BLOCK, 32, one_read, False)
    monkeypatch.setattr(configs, "row_config", lambda *_, **__: config)
    logits, targets = make(5, 600, dtype, scale=1.0)
    targets[:] = torch.arange(5) * 149
    for i in range(5):
        logits[i, targets[i]] = 5.0 * i
    check(logits, targets)
    # What torch's own p_y - 1 has lost.
    gradient = row_losses(logits, targets, Options(), gradient_scale=torch.ones(()))[3]
    truth = by_torch(logits, targets, Options(), torch.ones(5), torch.zeros(5), fp64=True)[2]
    error = (gradient.double() / truth - 1).gather(1, targets[:, None]).abs()
    assert error.max() < 2 * torch.finfo(dtype).eps + 4e-6, error


@pytest.mark.parametrize("one_read", [True, False])
@pytest.mark.parametrize("name", ["defaults", "together"])
def test_ignored_rows_return_early(name, one_read, monkeypatch):
    options = OPTIONS[name]
    config = configs.RowConfig(512 if one_read else BLOCK, 32, one_read, False)
    monkeypatch.setattr(configs, "row_config", lambda *_, **__: config)
    logits, targets = make(4, 500, torch.bfloat16, options=options)
    ignored = torch.arange(4) % 2 == 0
    targets[:] = torch.where(ignored, options.ignore_index, 7)
    one = torch.ones(())
    all_lse = row_losses(logits, targets, options, all_lse=True)[1]
    assert all_lse.all()
    given = logits.clone()
    given[ignored] = torch.nan  # which is not even looked at
    losses, lse, saved, gradient = row_losses(given, targets, options, gradient_scale=one)
    assert_bitwise_equal(lse, torch.where(ignored, 0.0, all_lse))
    assert (losses[ignored] == 0).all() and (gradient[ignored] == 0).all()
    assert (losses[~ignored] > 0).all() and (gradient[~ignored] != 0).any(-1).all()
    out = torch.full_like(given, 3.0)
    row_gradients(given, targets, saved, one, None, options, out)
    assert_bitwise_equal(out[ignored], gradient[ignored])
    # In place, with every lse: read before the zeros are written over them.
    losses, lse, _, _ = row_losses(
        logits, targets, options, all_lse=True, gradient_scale=one, out=logits
    )
    assert_bitwise_equal(lse, all_lse)
    assert_bitwise_equal(logits, gradient)


@sampled(
    lambda softcap, dtype: dtype == torch.float16 and softcap > 1.0,
    "softcap, dtype", [0.5, 30.0, 1000.0, 60_000.0], DTYPES,
)  # fmt: skip
def test_the_softcaps_derivative(softcap, dtype, small_blocks):
    """From slopes of 1 to 2^-15: with 16-bit logits and caps to 1,000 by a tanh that errs by 1e-7,
    which is less than the gradient's rounding; else by an exact one. tanh.approx, whose error is
    2^-11, would be seen."""
    logits, targets = make(2, BLOCK + 40, dtype, scale=1.0)
    # No probability below 2^-126, which the interpreter makes a wrong bf16.
    least = -6.0 if softcap <= 30.0 else 2.5 if softcap <= 1000.0 else 3.9
    logits[0] = (softcap * torch.linspace(least, 6, logits.shape[1])).clamp(max=64_000).to(dtype)
    logits[1] *= min(softcap, 5.0)  # a softmax over many
    check(logits, targets, Options(softcap=softcap))


@pytest.mark.parametrize("V", [40, 2 * BLOCK + 16])
def test_smoothing_of_large_logits(V, small_blocks):
    """The mean of x - x_y, summed by each thread: not of x, which cancels."""
    logits, targets = make(5, V, torch.float32, scale=1.0)
    check(logits + 1e5, targets, OPTIONS["smoothing"])


def test_which_rows_get_the_rough_tanh():
    # NumPy's exp2 errs less than a GPU's: no result here shows a cap too large for it.
    for dtype, softcap, kind in (
        (torch.float16, None, 0), (torch.float16, 1000.0, 2), (torch.bfloat16, 30.0, 2),
        (torch.float16, 1001.0, 1), (torch.float32, 30.0, 1),
    ):  # fmt: skip
        logits = torch.zeros(1, 64, dtype=dtype)
        assert _row_arguments(logits, logits, Options(softcap=softcap))["SOFTCAP"] == kind
