"""fastlm/data/loader.py: batches by sample number, and the batches of validation.

B batch, T context length, n tokens.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import TokenDataset
from fastlm.data.loader import TrainLoader, all_batches, spread_batches
from fastlm.data.sampler import WindowSampler

TOKENS = np.arange(10_000, dtype=np.uint16)  # token = position: a batch tells where it is from


def assert_windows(x, y, context_len):
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape and x.shape[1] == context_len
    assert torch.equal(x[:, 1:], x[:, :-1] + 1) and torch.equal(y, x + 1)


def test_a_batch_is_the_same_whenever_it_is_asked_for():
    loader = TrainLoader(TOKENS, 4, 16, seed=1)
    in_order = [loader.batch(4 * step) for step in range(50)]
    other = TrainLoader(TOKENS, 4, 16, seed=1)
    for step in (49, 0, 7, 7, 31):
        x, y = other.batch(4 * step)
        assert_windows(x, y, 16)
        assert torch.equal(x, in_order[step][0]) and torch.equal(y, in_order[step][1])
    firsts = {tuple(x[:, 0].tolist()) for x, _ in in_order}
    assert len(firsts) == 50  # another batch at every step
    assert not torch.equal(TrainLoader(TOKENS, 4, 16, seed=2).batch(0)[0], in_order[0][0])


def test_the_samples_are_the_samplers():
    loader = TrainLoader(TOKENS, 4, 16, seed=1)
    starts = WindowSampler(len(TOKENS), 16, seed=1).starts(0, 4000)
    drawn = torch.cat([loader.batch(4 * step)[0][:, 0] for step in range(1000)])  # crosses epochs
    assert drawn.tolist() == starts.tolist()


def test_nothing_random_is_drawn():
    loader = TrainLoader(TOKENS, 4, 16, seed=1)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    loader.batch(3)
    list(spread_batches(TOKENS, 2, 16, 3, "cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 6])
def test_small_batches_have_the_samples_of_a_big_one(batch_size):
    whole = TrainLoader(TOKENS, 12, 16, seed=1)
    parts = TrainLoader(TOKENS, batch_size, 16, seed=1)
    for first in (0, 12, 5, 777):
        batches = [parts.batch(i) for i in range(first, first + 12, batch_size)]
        assert all(x.shape == (batch_size, 16) for x, _ in batches)
        for side in (0, 1):
            joined = torch.cat([batch[side] for batch in batches])
            assert torch.equal(joined, whole.batch(first)[side])


def test_a_dataset_of_several_arrays():
    pieces = TokenDataset(np.split(TOKENS, [10, 10, 5000]))
    for step in range(20):
        x, y = TrainLoader(pieces, 8, 64, seed=1).batch(8 * step)
        assert torch.equal(x, TrainLoader(TOKENS, 8, 64, seed=1).batch(8 * step)[0])
        assert_windows(x, y, 64)


def test_data_too_short_to_train_on():
    TrainLoader(TOKENS[:17], 4, 16, seed=1).batch(0)
    with pytest.raises(ValueError, match="data holds 16 tokens; context_len=16 needs at least 17"):
        TrainLoader(TOKENS[:16], 4, 16, seed=1)


# Validation


def assert_covers_every_target_once(num_tokens, batch_size, context_len, segments=1):
    tokens = TOKENS[:num_tokens]
    data = TokenDataset(np.array_split(tokens, segments))
    targets = []
    for x, y in all_batches(data, batch_size, context_len, "cpu"):
        assert x.shape == y.shape == (batch_size, context_len)  # one shape: one compiled graph
        assert x.dtype == y.dtype == torch.int64
        assert ((x >= 0) & (x < num_tokens)).all()
        kept = y != -100
        assert torch.equal(y[kept], x[kept] + 1)
        targets += y[kept].tolist()
    assert sorted(targets) == list(range(1, num_tokens))


@pytest.mark.parametrize("context_len", [1, 2, 7])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_all_batches_of_every_small_size(batch_size, context_len):
    for num_tokens in range(context_len + 1, 5 * context_len * batch_size + 3):
        assert_covers_every_target_once(num_tokens, batch_size, context_len)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_all_batches_of_any_size(data):
    context_len = data.draw(st.integers(1, 40))
    num_tokens = data.draw(st.integers(context_len + 1, 400))
    batch_size = data.draw(st.integers(1, 9))
    assert_covers_every_target_once(
        num_tokens, batch_size, context_len, segments=data.draw(st.integers(1, 5))
    )


def test_all_batches_makes_no_more_than_it_needs():
    batches = list(all_batches(TOKENS[:1001], 4, 50, "cpu"))  # 20 full windows
    assert len(batches) == 5 and all((y != -100).all() for _, y in batches)
    assert len(list(all_batches(TOKENS[:1002], 4, 50, "cpu"))) == 6


def test_all_batches_leaves_the_data_alone():
    tokens = np.arange(30, dtype=np.int64)  # of the batches' own dtype, which -100 is written to
    list(all_batches(tokens, 4, 7, "cpu"))
    assert np.array_equal(tokens, np.arange(30))


def test_spread_batches_are_fixed_and_spread():
    batches = list(spread_batches(TOKENS, 8, 16, 5, "cpu"))
    assert len(batches) == 5
    for x, y in batches:
        assert x.shape == (8, 16)
        assert_windows(x, y, 16)
    starts = torch.cat([x[:, 0] for x, _ in batches])
    # From the first token to the last, the distances between them equal.
    assert starts[0] == 0 and starts[-1] == len(TOKENS) - 17
    distances = starts.diff()
    assert distances.min() > 0 and distances.max() - distances.min() <= 1
    for (x, y), (other_x, other_y) in zip(
        batches, spread_batches(TOKENS, 8, 16, 5, "cpu"), strict=True
    ):
        assert torch.equal(x, other_x) and torch.equal(y, other_y)


def test_spread_batches_of_little_data():
    ((x, y),) = spread_batches(TOKENS[:17], 3, 16, 1, "cpu")
    assert x[:, 0].tolist() == [0, 0, 0] and y[:, -1].tolist() == [16, 16, 16]
    ((x, _),) = spread_batches(TOKENS[:100], 1, 16, 1, "cpu")
    assert x.shape == (1, 16)


@pytest.mark.parametrize("batches", [
    lambda data: all_batches(data, 4, 16, "cpu"),
    lambda data: spread_batches(data, 4, 16, 3, "cpu"),
], ids=["all_batches", "spread_batches"])  # fmt: skip
def test_data_too_short_to_validate_on(batches):
    with pytest.raises(ValueError, match="data holds 16 tokens; context_len=16 needs at least 17"):
        list(batches(TOKENS[:16]))
    assert len(list(batches(TOKENS[:17]))) >= 1
