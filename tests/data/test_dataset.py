"""fastlm/data/dataset.py: several token arrays seen as one."""

import numpy as np
import pytest

from fastlm import DataError, TokenDataset
from fastlm.data.dataset import as_dataset


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
