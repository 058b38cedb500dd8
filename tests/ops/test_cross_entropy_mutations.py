"""The suite can fail: wrong results, handed to cross_entropy_cases.py's assertion, are rejected."""

import pytest
import torch
from cross_entropy_cases import (
    DTYPES,
    assert_right,
    cross_entropy_loss,
    loss_and_gradient,
    make,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def zeroed(gradient, targets):
    return torch.zeros_like(gradient)


def halved(gradient, targets):
    return gradient / 2


def scaled(gradient, targets):
    return gradient * 1.02


def target_term_dropped(gradient, targets):
    # (p - 1) becomes p: what remains after the rows' sums are made 0 again.
    rows = torch.arange(len(targets))
    fixed = gradient.clone()
    fixed[rows, targets] -= gradient.sum(-1) + gradient[rows, targets]
    return fixed


def softmax_term_dropped(gradient, targets):
    kept = torch.zeros_like(gradient)
    rows = torch.arange(len(targets))
    kept[rows, targets] = gradient[rows, targets]
    return kept


def two_rows_swapped(gradient, targets):
    return gradient[[1, 0, *range(2, len(gradient))]]


def last_column_missed(gradient, targets):
    fixed = gradient.clone()
    fixed[:, -1] = 0
    return fixed


def one_nan(gradient, targets):
    fixed = gradient.clone()
    fixed[-1, -1] = torch.nan
    return fixed


MUTATIONS = [
    zeroed, halved, scaled, target_term_dropped, softmax_term_dropped, two_rows_swapped,
    last_column_missed, one_nan,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_a_wrong_gradient_is_rejected(mutation, dtype):
    logits, targets = make((6, 1000), dtype, ignored=False)
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets)
    assert_right(loss, gradient, logits, targets)
    with pytest.raises(AssertionError, match="gradient of the logits"):
        assert_right(loss, mutation(gradient, targets), logits, targets)


@pytest.mark.parametrize(
    "mutation",
    [
        lambda loss: loss * 6 / 8,  # divided by all rows, not by those that count
        lambda loss: loss * 1.001,
        lambda loss: torch.zeros_like(loss),
        lambda loss: loss + torch.nan,
        lambda loss: loss.bfloat16().float(),
    ],
    ids=["denominator", "1.001", "zero", "nan", "rounded"],
)
def test_a_wrong_loss_is_rejected(mutation):
    logits, targets = make((8, 1000))
    loss, gradient = loss_and_gradient(cross_entropy_loss, logits, targets)
    assert_right(loss, gradient, logits, targets)
    with pytest.raises(AssertionError, match="loss"):
        assert_right(mutation(loss), gradient, logits, targets)
