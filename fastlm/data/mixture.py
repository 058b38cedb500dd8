"""Several datasets as one, each with a share of the samples: --data A:0.7 B:0.3

Which source sample i comes from, and which of that source's samples it is, are pure functions of
(seed, i). The samples are taken in blocks: a block holds a fixed number of each source, in an order
of its own, a keyed permutation. So shares are exact over a block, and each source is read in its
own sampler's order, without a gap, epoch by epoch.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from fastlm.data.dataset import TokenDataset, joined
from fastlm.data.sampler import WindowSampler, mixed, permute
from fastlm.errors import DataError

BLOCK = 1 << 14  # samples; a share is a multiple of 1 / BLOCK


@dataclass(frozen=True)
class Source:
    name: str  # for people
    dataset: TokenDataset
    weight: float  # its share of the samples; of all sources together 1


class Mixture(TokenDataset):
    """The sources' tokens end to end, of one dtype, sampled by weight.

    Raises DataError for weights that are not positive and finite.
    """

    def __init__(self, sources: Sequence[tuple[str, TokenDataset, float]]):
        for name, _, weight in sources:
            if not (weight > 0 and math.isfinite(weight)):
                raise DataError(f"--data {name}:{weight:g}: a weight must be positive and finite")
        whole = joined([dataset for _, dataset, _ in sources])
        super().__init__(whole.segments, whole.paths, whole._offsets)
        self.ignored = whole.ignored
        total = sum(weight for _, _, weight in sources)
        self.sources = [Source(name, dataset, w / total) for name, dataset, w in sources]

    def sampler(self, context_len: int, seed: int) -> "MixtureSampler":
        return MixtureSampler(
            [len(source.dataset) for source in self.sources],
            [source.weight for source in self.sources],
            context_len,
            seed,
        )


class MixtureSampler:
    """Start positions of training windows in the sources end to end, by sample number."""

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], context_len: int, seed: int):
        self.context_len, self.seed = context_len, seed
        self._samplers = [
            WindowSampler(size, context_len, mixed(seed, index)) for index, size in enumerate(sizes)
        ]
        self._begins = [0, *accumulate(sizes)][:-1]
        self._counts = _shares(weights)
        self._ends = np.cumsum(self._counts)

    def starts(self, first: int, count: int) -> np.ndarray:
        """(count,) int64: where samples first, first + 1, … begin."""
        source, sample = self.places(first, count)
        starts = np.empty(count, dtype=np.int64)
        for index in np.unique(source):
            here = source == index
            own = self._samplers[index].starts_of(sample[here])
            starts[here] = own + self._begins[index]
        return starts

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) int64 each: the source of samples first, first + 1, …; their numbers in it."""
        blocks, place = np.divmod(np.arange(first, first + count, dtype=np.int64), BLOCK)
        slot = np.empty(count, dtype=np.int64)
        for block in np.unique(blocks):
            here = blocks == block
            slot[here] = permute(place[here], BLOCK, self.seed, int(block), -3)
        source = np.searchsorted(self._ends, slot, side="right")
        counts, ends = self._counts[source], self._ends[source]
        return source, blocks * counts + slot - (ends - counts)


def _shares(weights: Sequence[float]) -> np.ndarray:
    """(sources,) int64: the samples of each in a block; at least one, BLOCK together."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    missing = BLOCK - int(shares.sum())  # those with the largest rests get what is left
    for index in np.argsort(shares - exact, kind="stable")[: max(0, missing)]:
        shares[index] += 1
    shares[np.argmax(shares)] += min(0, missing)  # what the smallest were raised by
    return shares


def split_weights(paths: Sequence[str]) -> list[tuple[str, float]] | None:
    """(path, weight) of PATH:WEIGHT each; None if no path has a weight.

    Raises DataError where some have one and some do not.
    """
    found = []
    for path in paths:
        match = re.fullmatch(r"(.+):([+-]?[\d.]+(?:[eE][+-]?\d+)?)", path)
        try:
            weighted = match is not None and not os.path.exists(path)
            found.append((match[1], float(match[2])) if weighted else (path, None))
        except ValueError as error:
            raise DataError(f"--data {path}: {match[2]} is no weight; write 0.3") from error
    without = [path for path, weight in found if weight is None]
    if len(without) == len(found):
        return None
    if without:
        raise DataError(
            f"--data {' '.join(paths)}: {without[0]} has no weight, and others have; write "
            f"PATH:WEIGHT for each"
        )
    return found


def split_names(paths: Sequence[str]) -> dict[str, list[str]]:
    """{name: paths} of NAME=PATH each; {} if no path has a name.

    Raises DataError where some have one and some do not.
    """
    named: dict[str, list[str]] = {}
    without = []
    for path in paths:
        match = re.fullmatch(r"([^=/\\]+)=(.+)", path)
        if match is None or os.path.exists(path):
            without.append(path)
        else:
            named.setdefault(match[1], []).append(match[2])
    if named and without:
        raise DataError(
            f"--val-data {' '.join(paths)}: {without[0]} has no name, and others have; write "
            f"NAME=PATH for each"
        )
    return named


def short_names(paths: Sequence[str]) -> list[str]:
    """What tells the paths apart: their last parts, or all of them where these are not enough."""
    names = [Path(path).name for path in paths]
    return names if all(names) and len(set(names)) == len(names) else list(paths)
