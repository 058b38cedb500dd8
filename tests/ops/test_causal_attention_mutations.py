"""The suite can fail: wrong results, handed to causal_attention_cases.py's assertion, are rejected.

out, dq: (B, H, T, d); dk, dv: (B, H_kv, T, d).
"""

from dataclasses import replace

import pytest
import torch
from causal_attention_cases import DTYPES, NAMES, assert_right, make, results

from fastlm import causal_attention

pytestmark = pytest.mark.usefixtures("one_thread")


def zeroed(x):
    return torch.zeros_like(x)


def scaled(x):
    return x * 1.02


def last_position_missed(x):
    fixed = x.clone()
    fixed[:, :, -1] = 0
    return fixed


def last_element_missed(x):
    fixed = x.clone()
    fixed[..., -1] = 0
    return fixed


def positions_moved(x):
    return x.roll(1, dims=2)


def heads_swapped(x):
    return x.flip(1)


def one_row_of_another(x):
    fixed = x.clone()
    fixed[:, :, 17] = x[:, :, 16]
    return fixed


def one_nan(x):
    fixed = x.clone()
    fixed[-1, -1, -1, -1] = torch.nan
    return fixed


MUTATIONS = [
    zeroed, scaled, last_position_missed, last_element_missed, positions_moved, heads_swapped,
    one_row_of_another, one_nan,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_a_wrong_result_is_rejected(mutation, dtype):
    case = make((1, 4, 2), 33, 16, dtype, rope=True)
    right = results(causal_attention, case)
    assert_right(right, case)
    for index, name in enumerate(NAMES):
        wrong = list(right)
        wrong[index] = mutation(wrong[index])
        with pytest.raises(AssertionError, match=f"^{name}"):
            assert_right(wrong, case)


def shifted(case):
    cos, sin = case.rope
    return replace(case, rope=(cos.roll(1, 0), sin.roll(1, 0)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "change",
    [
        lambda case: replace(case, scale=1 / 15**0.5),
        lambda case: replace(case, rope=None),
        lambda case: replace(case, rope=(case.rope[0], -case.rope[1])),
        shifted,
        lambda case: replace(case, k=case.k.flip(1)),  # another head's
        lambda case: replace(case, v=case.v.roll(1, 2)),
        lambda case: replace(case, grad_out=case.grad_out.bfloat16().to(case.q.dtype) * 1.01),
    ],
    ids=["scale", "no rope", "rope backwards", "rope shifted", "keys", "values", "upstream"],
)
def test_another_computation_is_rejected(change, dtype):
    case = make((1, 4, 2), 33, 16, dtype, rope=True)
    with pytest.raises(AssertionError, match=r"^(out|dq|dk|dv): largest error"):
        assert_right(results(causal_attention, change(case)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_that_is_off_by_one_is_rejected(dtype):
    case = make((1, 2, 2), 33, 16, dtype, Tq=32)
    first = replace(case, k=case.k[:, :, :-1], v=case.v[:, :, :-1])  # no query sees its own key
    got = results(causal_attention, first)
    got[2:] = [torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in got[2:]]
    with pytest.raises(AssertionError, match=r"^out: largest error"):
        assert_right(got, case)


def test_coarser_probabilities_are_rejected():
    # As if a kernel for fp32 multiplied in bf16.
    case = make((1, 2, 2), 65, 16)
    got = results(causal_attention, case.to(torch.bfloat16))
    with pytest.raises(AssertionError, match=r"^out: largest error"):
        assert_right([x.float() for x in got], case)
