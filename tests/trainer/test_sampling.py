"""How a token is drawn: temperature, top-k, top-p, and what is no distribution."""

import math

import pytest
import torch

from fastlm import ConfigError
from fastlm.errors import DivergedError
from fastlm.generate import check_sampling, sample

pytestmark = pytest.mark.usefixtures("one_thread")


LOGITS = torch.tensor([[1.0, 3.0, 0.0, 2.0, -4.0, 2.5]])
PROBABILITIES = LOGITS.softmax(-1)[0]
ORDER = [1, 5, 3, 0, 2, 4]  # likeliest first
DRAWS = 20_000


def draws(temperature=1.0, top_k=None, top_p=None, logits=LOGITS) -> torch.Tensor:
    """How often each token comes, of DRAWS."""
    generator = torch.Generator().manual_seed(0)
    rows = logits.expand(DRAWS, -1)
    ids = sample(rows, temperature, top_k, top_p, generator)
    assert ids.shape == (DRAWS, 1) and ids.dtype == torch.int64
    return torch.bincount(ids[:, 0], minlength=logits.shape[-1])


def assert_distribution(counts: torch.Tensor, expected: torch.Tensor) -> None:
    """Chi-square, at a level that a right sampler misses once in a million seeds."""
    kept = expected > 0
    assert (counts[~kept] == 0).all(), counts
    wanted = expected[kept] * DRAWS
    statistic = float(((counts[kept] - wanted) ** 2 / wanted).sum())
    # Quantiles of chi-square at 1 - 1e-6, by degrees of freedom.
    limit = {0: 1e-6, 1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9}[int(kept.sum()) - 1]
    assert statistic < limit, (counts, wanted)


def restricted(keep: list[int], temperature: float = 1.0) -> torch.Tensor:
    mask = torch.zeros(6, dtype=torch.bool)
    mask[keep] = True
    return (LOGITS[0] / temperature).masked_fill(~mask, -math.inf).softmax(-1)


@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0])
def test_temperature(temperature):
    assert_distribution(draws(temperature), restricted(list(range(6)), temperature))


def test_temperature_0_takes_the_likeliest():
    assert draws(0.0).tolist() == [0, DRAWS, 0, 0, 0, 0]
    assert draws(0.0, top_k=3, top_p=0.5).tolist() == [0, DRAWS, 0, 0, 0, 0]
    assert draws(1e-6).tolist() == [0, DRAWS, 0, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_a_temperature_near_0_takes_the_likeliest(temperature):
    """Of two that are equally likely, either."""
    assert draws(temperature).tolist() == [0, DRAWS, 0, 0, 0, 0]
    assert draws(temperature, top_k=3, top_p=0.5).tolist() == [0, DRAWS, 0, 0, 0, 0]
    assert draws(temperature, logits=LOGITS * 1e30).tolist() == [0, DRAWS, 0, 0, 0, 0]
    two = torch.tensor([[7.0, -math.inf, 7.0, 6.9]])
    assert_distribution(draws(temperature, logits=two), torch.tensor([0.5, 0, 0.5, 0]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(temperature, bad):
    logits = torch.zeros(2, 5)
    logits[1, 3] = bad
    with pytest.raises(DivergedError, match=r"logits are not finite .* earlier checkpoint"):
        sample(logits, temperature, None, 0.9)
    logits[1] = -math.inf
    with pytest.raises(DivergedError, match="logits are not finite"):
        sample(logits, temperature, None, 0.9)


@pytest.mark.parametrize("top_k", [1, 2, 4, 6, 100])
def test_top_k_keeps_the_k_likeliest(top_k):
    assert_distribution(draws(top_k=top_k), restricted(ORDER[:top_k]))


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.52, 0.6, 0.8, 0.95, 0.999, 1.0])
def test_top_p_keeps_the_fewest_that_reach_p(top_p):
    keep, reached = [], 0.0
    for token in ORDER:
        if reached < top_p:
            keep.append(token)
        reached += float(PROBABILITIES[token])
    assert_distribution(draws(top_p=top_p), restricted(keep))


def test_the_nucleus_ends_with_the_token_that_reaches_p():
    half = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    assert (draws(top_p=0.5, logits=half) > 0).tolist() == [True, False, False, False]
    assert (draws(top_p=0.51, logits=half) > 0).tolist() == [True, True, False, False]
    assert (draws(top_p=0.75, logits=half) > 0).tolist() == [True, True, False, False]


def test_top_k_and_top_p_together():
    """The nucleus is that of what top_k leaves, after the temperature."""
    narrowed = restricted(ORDER[:3], 2.0)
    assert float(narrowed[1] + narrowed[5]) > 0.7 > float(narrowed[1])
    assert_distribution(draws(2.0, top_k=3, top_p=0.7), restricted(ORDER[:2], 2.0))


def test_rows_are_sampled_by_their_own_logits():
    logits = torch.full((3, 5), -1e9)
    logits[0, 4] = logits[1, 0] = logits[2, 2] = 0
    for arguments in ((0.0, None, None), (1.0, 2, None), (1.0, None, 0.5), (0.7, 3, 0.9)):
        assert sample(logits, *arguments)[:, 0].tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-0.1, None, None), "temperature=-0.1: it must not be negative"),
        ((1.0, 0, None), "top_k=0: it must be at least 1"),
        ((1.0, None, 0.0), r"top_p=0.0: it must lie in \(0, 1\]"),
        ((1.0, None, 1.1), "top_p=1.1"),
        ((float("nan"), None, None), "temperature=nan"),
        ((1.0, None, float("nan")), "top_p=nan"),
    ],
)
def test_impossible_sampling_is_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_sampling(*arguments)
