"""fastlm/data/dataset.py: several token arrays seen as one."""

import ctypes
import mmap
import os
import time

import numpy as np
import pytest
from training_runs import tiny_config

from fastlm import DataError, TokenDataset, train_loop
from fastlm.data.dataset import as_dataset
from fastlm.data.loader import TrainLoader
from fastlm.step import TrainStep


def test_locate():
    dataset = TokenDataset(
        [np.arange(n, dtype=np.uint16) for n in (0, 3, 0, 0, 2, 1, 0)], list("abcdefg")
    )
    assert len(dataset) == 6 and dataset.dtype == np.uint16
    located = [dataset.locate(position) for position in range(6)]
    assert located == [("b", 0), ("b", 1), ("b", 2), ("e", 0), ("e", 1), ("f", 0)]
    assert TokenDataset([np.zeros(2, np.uint8)] * 2).locate(3) == ("array 1", 1)


def test_slice():
    tokens = np.arange(30, dtype=np.uint16)
    pieces = np.split(tokens, [0, 10, 10, 11, 25])
    dataset = TokenDataset(pieces, list("abcdef"))
    for begin in range(31):
        for end in range(begin, 31):
            part = dataset.slice(begin, end)
            assert np.concatenate(part.segments).tolist() == list(range(begin, end))
            assert len(part) == end - begin
            # The file and the offset in the file, not in the slice.
            for position in (0, end - begin - 1):
                if begin < end:
                    assert part.locate(position) == dataset.locate(begin + position)
    twice = dataset.slice(5, 28).slice(3, 20)
    assert np.concatenate(twice.segments).tolist() == list(range(8, 25))
    assert [twice.locate(i) for i in range(17)] == [dataset.locate(i) for i in range(8, 25)]
    assert np.shares_memory(twice.segments[1], tokens)  # not copied


@pytest.mark.parametrize(
    "segments, message",
    [
        ([], "at least one"),
        ([np.zeros((2, 2), np.uint16)], r"1-D, got shape \(2, 2\)"),
        ([np.zeros(2, np.float32)], "got float32"),
        ([np.zeros(2, np.int16)], "got int16"),
        ([np.zeros(2, ">u2")], "got >u2"),
        ([np.zeros(2, np.uint16), np.zeros(2, np.uint32)], "one dtype, got uint16 and uint32"),
    ],
)
def test_arrays_that_are_no_dataset(segments, message):
    with pytest.raises(DataError, match=message):
        TokenDataset(segments)


@pytest.mark.parametrize("segments", [[None], "x", [[1, 2], [3]], [1, 2], None, np.arange(3), 5])
def test_what_is_no_array(segments):
    with pytest.raises(TypeError, match=r"NumPy arrays, got|not iterable"):
        TokenDataset(segments)


def test_a_name_and_an_offset_for_every_array():
    arrays = [np.zeros(2, np.uint8)] * 2
    for wrong in ({"paths": ["a"]}, {"offsets": [0, 0, 0]}):
        with pytest.raises(ValueError, match=r"[13] \w+ for 2 token arrays"):
            TokenDataset(arrays, **wrong)


def test_as_dataset():
    tokens = np.arange(9, dtype=np.uint16)
    dataset = TokenDataset([tokens])
    assert as_dataset(dataset) is dataset
    assert np.shares_memory(as_dataset(tokens).segments[0], tokens)
    assert len(as_dataset([tokens, tokens[:3]])) == 12


# What the next batches need


class Pages:
    """Which pages of a file are in memory."""

    def __init__(self, path, mapping):
        self.path, self.mapping = path, mapping
        self.libc = ctypes.CDLL(None, use_errno=True)

    def drop(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    def resident(self) -> np.ndarray:
        size = len(self.mapping)
        flags = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
        address = np.frombuffer(self.mapping, np.uint8).ctypes.data
        assert self.libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags) == 0
        return np.frombuffer(flags, np.uint8) & 1 == 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="files cannot be made cold")
def test_the_next_windows_are_read_from_the_disk_and_little_else(tmp_path):
    header, tokens, page = 1024, 8 << 20, mmap.PAGESIZE
    (tmp_path / "a.bin").write_bytes(bytes(header) + np.arange(tokens, dtype="<u2").tobytes())
    array = np.memmap(tmp_path / "a.bin", "<u2", "r", offset=header)
    # Two segments of one file: the windows across their border are in both.
    dataset = TokenDataset([array[: tokens // 2], np.arange(7, dtype="<u2"), array[tokens // 2 :]])
    pages = Pages(tmp_path / "a.bin", array._mmap)
    pages.drop()
    if pages.resident().any():
        pytest.skip("this file system keeps its files in memory")
    border = tokens // 2
    starts = np.array([0, 1_000_000, border - 100, border + 3, len(dataset) - 4097])
    dataset.will_need(starts, 4096)
    positions = (starts[:, None] + np.arange(4097)).ravel()
    in_file = np.where(positions < border, positions, positions - 7)  # those of the array apart
    in_file = in_file[(positions < border) | (positions >= border + 7)]
    wanted = np.zeros(len(pages.resident()), bool)
    wanted[(header + 2 * in_file) // page] = True
    deadline = time.monotonic() + 30
    while not pages.resident()[wanted].all() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pages.resident()[wanted].all()
    assert pages.resident().sum() <= 2 * wanted.sum() < len(wanted) / 100
    x, _ = dataset.gather(starts[:2], 4096, "cpu")
    assert x[1, 5] == 1_000_005 % 65536


def test_what_is_in_no_file_needs_nothing():
    dataset = TokenDataset([np.zeros(100, np.uint16)])
    dataset.will_need(np.array([0, 50]), 16)
    assert dataset._mapped == {}


def test_a_step_asks_for_the_windows_of_the_next(monkeypatch, tmp_path, without_extras):
    asked, read = [], []
    genuine = TrainLoader.batch

    def batch(loader, first):
        read.append(first)
        return genuine(loader, first)

    monkeypatch.setattr(TrainLoader, "batch", batch)
    monkeypatch.setattr(TrainLoader, "will_need", lambda loader, first: asked.append(first))
    monkeypatch.setattr(TrainStep, "warm_up", lambda step: None)
    tokens = np.arange(3000, dtype=np.uint16) % 64
    train_loop(tokens, tokens, tiny_config(tmp_path, total_steps=4, grad_accum=2))
    assert read[:8] == [0, 4, 8, 12, 16, 20, 24, 28]  # the thread reads one step more
    assert asked[:6] == [8, 12, 16, 20, 24, 28]
