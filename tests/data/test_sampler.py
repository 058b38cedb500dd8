"""fastlm/data/sampler.py: the order of the training windows.

n tokens, T context length, W windows of an epoch.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data.sampler import WindowSampler, permute

# All small ones; one less and more than powers of two, where the Feistel network's domain grows.
SIZES = sorted({*range(1, 71), *(2**k + d for k in range(6, 15) for d in (-1, 0, 1))})


def assert_permutation(size: int, *key: int) -> np.ndarray:
    permuted = permute(np.arange(size), size, *key)
    assert permuted.dtype == np.int64
    assert np.array_equal(np.sort(permuted), np.arange(size)), f"size {size}, key {key}"
    return permuted


def test_every_size_is_permuted():
    for size in SIZES:
        assert_permutation(size, 7, size)


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 5000), key=st.lists(st.integers(-(2**70), 2**70), max_size=3))
def test_any_size_and_key_is_permuted(size, key):
    assert_permutation(size, *key)


@pytest.mark.parametrize("size", [2**40 - 3, 2**40, 2**40 + 1, 2**41 - 1, 3**25])
def test_huge_sizes_do_not_repeat(size):
    # In order from either end and all over: no two positions may get one value.
    first = np.arange(50_000)
    anywhere = np.random.default_rng(0).integers(0, size, 50_000)
    index = np.unique(np.concatenate([first, size - 1 - first, anywhere]))
    permuted = permute(index, size, 1, 2)
    assert permuted.min() >= 0 and permuted.max() < size
    assert len(np.unique(permuted)) == len(index)
    # Spread over the whole range: a quarter of the values in each quarter.
    quarters = np.histogram(permuted, bins=4, range=(0, size))[0] / len(index)
    assert np.abs(quarters - 0.25).max() < 0.01


def test_random_access_is_the_whole_permutation():
    whole = permute(np.arange(1000), 1000, 5)
    index = np.random.default_rng(0).permutation(1000)[:50].reshape(5, 10)
    assert np.array_equal(permute(index, 1000, 5), whole[index])
    assert permute(np.empty(0, dtype=np.int64), 1000, 5).shape == (0,)


def test_keys_give_different_permutations():
    keys = [(0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (2**64 - 1,), ()]
    permuted = [tuple(permute(np.arange(1000), 1000, *key)) for key in keys]
    assert len(set(permuted)) == len(keys)
    # Unrelated ones: a thousand random numbers agree in one place on average.
    for a in range(len(keys)):
        for b in range(a):
            assert sum(x == y for x, y in zip(permuted[a], permuted[b], strict=True)) < 10


def test_it_is_not_a_shift_or_a_stride():
    # Of neighbours the differences are all over, where (a * i + b) % size has two.
    steps = Counter(np.diff(permute(np.arange(4099), 4099, 3)).tolist())
    assert max(steps.values()) < 12
    assert len(steps) > 2500


@pytest.mark.parametrize(
    "size", [2, 9, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (5, 17, 100))]
)
def test_every_position_gets_every_value(size):
    # Over 3,000 keys, the values at two of the positions are uniform within 5 sigma. (The domain of
    # the Feistel network is smallest here, and four rounds were not enough for 5 to 9 and 17.)
    index = np.array([0, size - 1])
    values = np.stack([permute(index, size, key) for key in range(3000)])
    for column in values.T:
        counts = np.bincount(column, minlength=size)
        deviation = np.sqrt(3000 / size * (1 - 1 / size))
        assert np.abs(counts - 3000 / size).max() < 5 * deviation


def epoch_of(sampler: WindowSampler, epoch: int) -> np.ndarray:
    W = sampler.windows_per_epoch
    return sampler.starts(epoch * W, W)


def times_drawn(sampler: WindowSampler, num_tokens: int, epochs: int) -> np.ndarray:
    """(n - 1,): how often the targets 1 ... n - 1 come in the first `epochs` epochs."""
    starts = sampler.starts(0, epochs * sampler.windows_per_epoch)
    assert starts.min() >= 0 and starts.max() + sampler.context_len + 1 <= num_tokens
    # The window at s has the targets s + 1 ... s + T.
    steps = np.bincount(starts + 1, minlength=num_tokens + 1)
    steps = steps - np.bincount(starts + 1 + sampler.context_len, minlength=num_tokens + 1)
    return steps.cumsum()[1:num_tokens]


@pytest.mark.parametrize("context_len", [1, 2, 7, 32])
def test_an_epoch_has_every_target(context_len):
    for num_tokens in range(context_len + 1, 6 * context_len + 40):
        sampler = WindowSampler(num_tokens, context_len, seed=3)
        for epoch in range(3):
            counts = times_drawn(sampler, num_tokens, epoch + 1)
            counts -= times_drawn(sampler, num_tokens, epoch) if epoch else 0
            assert counts.min() >= 1
            # Once each, but for the ends and at most one window more.
            assert counts.sum() == sampler.windows_per_epoch * context_len
            assert counts.sum() <= num_tokens - 1 + 2 * (context_len - 1)
            assert (counts[context_len:-context_len] > 1).sum() <= context_len
            assert counts.max() <= 3


@pytest.mark.parametrize("num_tokens, T", [(60_031, 64), (1_000, 256), (12_000, 4096), (11, 4)])
def test_every_target_is_drawn_about_as_often(num_tokens, T):
    # The targets that only the last window has were once left out for good.
    counts = times_drawn(WindowSampler(num_tokens, T, seed=0), num_tokens, 1000) / 1000
    assert len(counts) == num_tokens - 1
    assert counts.min() >= 1 and counts.max() <= 2.4
    assert counts[T:-T].mean() < 1.5
    # Neither end is favoured.
    assert abs(counts[:T].mean() - counts[-T:].mean()) < 0.15


def test_epochs_differ_in_order_and_phase():
    sampler = WindowSampler(10_000, 16, seed=0)
    epochs = [epoch_of(sampler, epoch) for epoch in range(64)]
    assert len({tuple(starts) for starts in epochs}) == 64


@pytest.mark.parametrize("num_tokens", range(47, 65))
def test_windows_are_cut_at_every_phase(num_tokens):
    # However the windows fit: every window start of the data is drawn.
    sampler = WindowSampler(num_tokens, 16, seed=0)
    starts = sampler.starts(0, 300 * sampler.windows_per_epoch)
    assert set(starts.tolist()) == set(range(num_tokens - 16))


def test_seeds_differ():
    streams = {
        tuple(WindowSampler(10_000, 16, seed).starts(0, 100)) for seed in (0, 1, 2, -1, 2**63)
    }
    assert len(streams) == 5
    epochs = [epoch_of(WindowSampler(10_000, 16, seed), 0) for seed in range(32)]
    assert len({int(np.sort(starts)[5]) for starts in epochs}) > 8  # of 16 phases
    assert len({tuple(starts // 16) for starts in epochs}) == 32
    again = WindowSampler(10_000, 16, 1).starts(0, 100)
    assert np.array_equal(again, WindowSampler(10_000, 16, 1).starts(0, 100))


def test_random_access_equals_reading_in_order():
    sampler = WindowSampler(1000, 7, seed=5)  # 141 windows: the stream crosses many epochs
    stream = sampler.starts(0, 1500)
    assert np.array_equal(np.concatenate([sampler.starts(i, 1) for i in range(1500)]), stream)
    for size in (2, 64, 141, 500):  # in batches of any size
        batches = [sampler.starts(first, size) for first in range(0, 1500 - size + 1, size)]
        assert np.array_equal(np.concatenate(batches), stream[: len(batches) * size])
    assert sampler.starts(10, 0).shape == (0,)


def test_a_seek_takes_no_time():
    # Sample number 10^15 costs what number 0 does: nothing is walked through to get there.
    sampler = WindowSampler(10**12, 1024, seed=5)
    far = sampler.starts(10**15, 64)
    assert far.dtype == np.int64 and far.min() >= 0 and far.max() + 1025 <= 10**12
    assert np.array_equal(far[10:20], sampler.starts(10**15 + 10, 10))


def test_starts_are_uniform():
    # 1,000 tokens, T = 10: 101 windows, 10 phases. Over 1,000 epochs each start of 1 ... 988 comes
    # 100 times, within 5 sigma; the windows moved to the ends come on top.
    sampler = WindowSampler(1000, 10, seed=1)
    starts = sampler.starts(0, 1000 * sampler.windows_per_epoch)
    counts = np.bincount(starts, minlength=990)
    assert len(counts) == 990
    assert np.abs(counts[1:-1] - 100).max() < 5 * np.sqrt(100 * 0.9)
    assert counts[0] == 1000


def test_the_first_samples_are_unlike_the_last():
    # A short run must see all of the data, not its beginning: 200 of 10,000 windows.
    starts = WindowSampler(1_000_001, 100, seed=2).starts(0, 200)
    tenths = np.histogram(starts, bins=10, range=(0, 1_000_000))[0]
    assert tenths.min() > 0 and tenths.max() < 45


@pytest.mark.parametrize("num_tokens", [-1, 0, 1, 16])
def test_data_too_short(num_tokens):
    with pytest.raises(
        ValueError, match=rf"data holds {num_tokens} tokens; context_len=16 needs .* 17"
    ):
        WindowSampler(num_tokens, 16, seed=0)
    assert WindowSampler(17, 16, seed=0).starts(0, 3).tolist() == [0, 0, 0]
