"""Token arrays, most of them memory-mapped files, seen end to end as one dataset."""

import bisect
import contextlib
import mmap
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from operator import index
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlm.data.sampler import WindowSampler
from fastlm.errors import DataError
from fastlm.ops.gather_batch import TokenSource, gather_batch, token_segments

TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")


class TokenDataset:
    """One or more 1-D token arrays of one dtype, seen end to end.

    Raises TypeError for what is no NumPy array, DataError for an array of another shape or dtype,
    ValueError for paths or offsets that are not one an array.
    """

    def __init__(
        self,
        segments: Sequence[np.ndarray],
        paths: Sequence[str | Path] = (),  # the file of each segment
        offsets: Sequence[int] = (),  # where in its file each segment begins, in tokens; default 0
    ):
        segments = list(segments)
        if not segments:
            raise DataError("a dataset needs at least one token array")
        for name, values in (("paths", paths), ("offsets", offsets)):
            if len(values) not in (0, len(segments)):
                raise ValueError(f"{len(values)} {name} for {len(segments)} token arrays")
        for array in segments:
            if not isinstance(array, np.ndarray):
                raise TypeError(f"token arrays must be NumPy arrays, got {type(array).__name__}")
            if array.ndim != 1:
                raise DataError(f"token arrays must be 1-D, got shape {array.shape}")
            if array.dtype.name not in TOKEN_DTYPES or not array.dtype.isnative:
                raise DataError(
                    f"token arrays must be native {', '.join(TOKEN_DTYPES)}, got {array.dtype}"
                )
            if array.dtype != segments[0].dtype:
                raise DataError(
                    f"token files of one dataset must have one dtype, got {segments[0].dtype} "
                    f"and {array.dtype}"
                )
        self.segments = [np.ascontiguousarray(array) for array in segments]
        # uint8 tokens, as many: 1 where a token of this dataset is no target of the loss
        self.ignored: TokenDataset | None = None
        self.paths = [str(path) for path in paths]
        self._offsets = [index(offset) for offset in offsets] or [0] * len(segments)
        self._ends = list(accumulate(len(array) for array in segments))
        # (name, mapping, the file's size) of every mapped file
        self._mapped: dict[int, tuple[str, mmap.mmap, int]] = {}
        for i, array in enumerate(self.segments):
            if (mapping := _mapping(array)) is not None and id(mapping) not in self._mapped:
                name = self.paths[i] if self.paths else f"the file of array {i}"
                self._mapped[id(mapping)] = name, mapping, mapping.size()

    def __len__(self) -> int:
        """Tokens in all."""
        return self._ends[-1]

    @property
    def dtype(self) -> np.dtype:
        return self.segments[0].dtype

    def locate(self, position: int) -> tuple[str, int]:
        """(file, offset in tokens within it) of a position of the dataset."""
        i = bisect.bisect_right(self._ends, position)
        name = self.paths[i] if self.paths else f"array {i}"
        begin = self._ends[i - 1] if i else 0
        return name, position - begin + self._offsets[i]

    def check_files(self) -> None:
        """DataError if a mapped file is shorter than it was: where it no longer is, reading it
        would end the process with SIGBUS. Asks the system for each file's size: 1 or 2 us a file.
        """
        for name, mapping, size in self._mapped.values():
            if (now := mapping.size()) < size:
                raise DataError(
                    f"{name}: was cut from {size} to {now} bytes while it was in use; put the "
                    f"whole file back and go on from the last checkpoint"
                )

    def gather(
        self, starts: np.ndarray, context_len: int, device: torch.device | str
    ) -> tuple[Tensor, Tensor]:
        """gather_batch of these tokens: (x, y), int64, (B, T) each, of the windows at `starts`.

        y is -100 for a token that is no target.
        """
        self.check_files()
        x, y = gather_batch(self.segments, starts, context_len, device)
        if self.ignored is not None:
            _, ignored = self.ignored.gather(starts, context_len, device)
            y = y.masked_fill_(ignored != 0, -100)
        return x, y

    def will_need(self, starts: np.ndarray, context_len: int) -> None:
        """Has the system read the windows at `starts` from the disk, while something else is done.

        The first touch of a window otherwise waits for a disk, and for the neighbourhood that the
        system reads with it: of 1 GiB that was in no cache 32 windows of 256 uint16 read 78 MB
        without this and 0.15 MB with it. MADV_RANDOM saves the same bytes but waits for each page,
        and saves nothing beside this.
        """
        if self.ignored is not None:
            self.ignored.will_need(starts, context_len)
        if self._mapped:
            for start in starts.tolist():
                self._will_need(start, start + context_len + 1)

    def _will_need(self, begin: int, end: int) -> None:
        size = self.dtype.itemsize
        i = bisect.bisect_right(self._ends, begin)
        while begin < end and i < len(self.segments):
            if (place := self._places[i]) is not None:
                mapping, offset = place  # of the segment's first byte
                offset -= (self._ends[i] - len(self.segments[i])) * size
                first = offset + begin * size
                behind = offset + min(end, self._ends[i]) * size
                first -= first % mmap.PAGESIZE
                with contextlib.suppress(OSError):  # it is advice
                    mapping.madvise(mmap.MADV_WILLNEED, first, behind - first)
            begin = self._ends[i]
            i += 1

    @cached_property
    def _places(self) -> list[tuple[mmap.mmap, int] | None]:
        """Where each segment is: its mapping, and the offset in it in bytes."""
        return [
            None
            if (mapping := _mapping(array)) is None or not len(array)
            else (mapping, array.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data)
            for array in self.segments
        ]

    def sampler(self, context_len: int, seed: int) -> WindowSampler:
        """What chooses the windows of training samples."""
        return WindowSampler(len(self), context_len, seed)

    def slice(self, begin: int, end: int) -> "TokenDataset":
        """The tokens [begin, end), without a copy."""
        pieces, offsets, starts = [], [], [0, *self._ends[:-1]]
        for array, start, offset in zip(self.segments, starts, self._offsets, strict=True):
            first = max(0, begin - start)
            pieces.append(array[first : max(0, end - start)])
            offsets.append(offset + first)
        part = TokenDataset(pieces, self.paths, offsets)
        if self.ignored is not None:
            part.ignored = self.ignored.slice(begin, end)
        return part

    def has_targets(self) -> bool:
        """Is any token a target? Reads all of `ignored`."""
        return self.ignored is None or any(not array.all() for array in self.ignored.segments)


def joined(datasets: Sequence[TokenDataset]) -> TokenDataset:
    """All of them, end to end."""
    segments = [array for dataset in datasets for array in dataset.segments]
    offsets = [offset for dataset in datasets for offset in dataset._offsets]
    paths = [path for dataset in datasets for path in dataset.paths]
    whole = TokenDataset(segments, paths if len(paths) == len(segments) else [], offsets)
    if any(dataset.ignored for dataset in datasets):
        # Memory of zeros that are only read is one page, whatever its size.
        parts = [
            dataset.ignored or TokenDataset([np.zeros(len(dataset), np.uint8)])
            for dataset in datasets
        ]
        whole.ignored = joined(parts)
    return whole


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """The memory map that the array is a view of, if it is one of a file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, mmap.mmap) else None


def as_dataset(data: TokenSource | TokenDataset) -> TokenDataset:
    """`data` as a TokenDataset, not copied."""
    if isinstance(data, TokenDataset):
        return data
    return TokenDataset(token_segments(data))
