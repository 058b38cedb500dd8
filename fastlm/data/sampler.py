"""Which window is sample number i: a pure function of (seed, i), random access in O(1).

An epoch cuts the tokens into windows T apart, from a random phase, and visits them in a random
order. The first window and the last are moved to where they fit, so that an epoch sees every
target: once, but fewer than T of them at either end twice. (Where the phase needs one window less
than others do, the window over is at a random place.) Sample number i is window i mod W of epoch
i // W. Because nothing but (seed, i) enters, a run resumes at any step, with any batch size,
accumulation or number of processes, on exactly the samples that it had not seen.

The order is a keyed permutation: a balanced Feistel network over the smallest even number of bits
that holds W, walked until the value lies below W (Black & Rogaway, "Ciphers with arbitrary finite
domains", 2002). The round function is splitmix64's finaliser (Steele et al., 2014).
"""

import functools

import numpy as np

from fastlm.ops.gather_batch import check_window_fits

# With 4, some values came 28 % too often at the last of 5 positions (4,000 keys); with 6 none did,
# of any size up to 64 (tests/data/test_sampler.py).
_ROUNDS = 6
_MASK64 = (1 << 64) - 1

# Counts up when the same (seed, i) gives another window: a run resumes in the order it began with.
# 1 left out what the last epoch's windows did not reach: up to a third of small data, always.
SAMPLER_VERSION = 2


def _mix(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _key(*parts: int) -> np.uint64:
    """A 64-bit key out of integers, in order."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = _mix(key + np.uint64(part & _MASK64) + np.uint64(0x9E3779B97F4A7C15))
    return key[0]


def mixed(*parts: int) -> int:
    """A 64-bit number out of integers, in order: a seed for what depends on all of them."""
    return int(_key(*parts))


def permute(index: np.ndarray, size: int, *key: int) -> np.ndarray:
    """The permutation of range(size) chosen by `key`, at positions `index` (int64, any shape)."""
    if size == 1:
        return np.zeros_like(index)
    half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    keys = [_key(*key, round_) for round_ in range(_ROUNDS)]
    value = index.astype(np.uint64)
    pending = np.ones(value.shape, dtype=bool)
    while pending.any():  # a domain is less than 4 * size: 4 walks on average at most
        left, right = value >> half_bits, value & half_mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right + round_key) & half_mask)
        value = np.where(pending, (left << half_bits) | right, value)
        pending = value >= np.uint64(size)
    return value.astype(np.int64)


class WindowSampler:
    """Start positions of training windows, by sample number."""

    def __init__(self, num_tokens: int, context_len: int, seed: int):
        check_window_fits(num_tokens, context_len)
        self.context_len = context_len
        self.seed = seed
        self._last_start = num_tokens - 1 - context_len
        # As many as cover the n - 1 targets from every phase: of one number, so that the sample's
        # epoch is a division.
        self.windows_per_epoch = -(-(num_tokens - 1 + context_len - 1) // context_len)

    def starts(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: where samples first, first + 1, … begin."""
        return self.starts_of(np.arange(first, first + count, dtype=np.int64))

    def starts_of(self, sample: np.ndarray) -> np.ndarray:  # both (n,) int64
        """Where the samples of these numbers begin."""
        epochs, index = np.divmod(sample, self.windows_per_epoch)
        starts = np.empty(len(sample), dtype=np.int64)
        for epoch in np.unique(epochs):  # one, or two where a batch crosses into the next epoch
            here = epochs == epoch
            window = permute(index[here], self.windows_per_epoch, self.seed, int(epoch))
            phase = int(_key(self.seed, int(epoch), -1) % np.uint64(self.context_len))
            start = window * self.context_len - phase
            anywhere = int(_key(self.seed, int(epoch), -2) % np.uint64(self._last_start + 1))
            nothing_left = start >= self._last_start + self.context_len
            starts[here] = np.where(nothing_left, anywhere, start)
        # Before the data begins, or too near to its end: the window nearest to that.
        return starts.clip(0, self._last_start)
