"""gather_batch and get_batch against gather_batch_reference.

B batch, T context length, n tokens. The C++ tests (test_csrc.py) cover the kernel's inner cases.
"""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from batches import assert_equals_reference, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm import DeviceError, TokenDataset, gather_batch, get_batch, load_token_dataset
from fastlm.extension import extension

DTYPES = ["uint8", "uint16", "uint32", "int32", "int64"]


@pytest.mark.parametrize("output", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype, output):
    tokens = tokens_of(dtype, 1000)
    for context_len in (1, 2, 63, 64, 65, 999):
        starts = [0, 1000 - context_len - 1, (1000 - context_len) // 2]
        batch = gather_batch(tokens, starts, context_len, dtype=output)
        assert_equals_reference(batch, tokens, starts, context_len, output)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_sizes(data):
    # Segments of any sizes, empty ones among them; windows anywhere.
    sizes = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    n = sum(sizes)
    if n < 2:
        return
    context_len = data.draw(st.integers(1, n - 1))
    starts = data.draw(st.lists(st.integers(0, n - context_len - 1), min_size=1, max_size=9))
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = tokens_of(dtype, n, seed=n)
    segments = np.split(tokens, np.cumsum(sizes)[:-1])
    batch = gather_batch(segments, starts, context_len)
    assert_equals_reference(batch, tokens, starts, context_len)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memmaps_and_datasets_of_several_files(dtype, tmp_path):
    tokens = tokens_of(dtype, 3001)
    paths = [tmp_path / name for name in ("a.bin", "b.npy", "c.bin")]
    first, second, third = np.split(tokens, [1000, 1001])
    first.tofile(paths[0])
    np.save(paths[1], second)
    third.tofile(paths[2])
    arrays = [load_token_dataset(path, dtype=dtype) for path in paths]
    assert all(isinstance(array, np.memmap) for array in arrays)
    # In one window, across one end and across two: every start around the segment of one token.
    starts = [0, 700, *range(930, 1003), 3001 - 65]
    for data in (arrays, TokenDataset(arrays, paths).segments):
        assert_equals_reference(gather_batch(data, starts, 64), tokens, starts, 64)
    assert_equals_reference(gather_batch(arrays[2], [5], 64), third, [5], 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_tensors(dtype):
    tokens = tokens_of(dtype, 200)
    starts = [3, 0, 99]
    tensor = torch.from_numpy(tokens)
    assert_equals_reference(gather_batch(tensor, starts, 100), tokens, starts, 100)
    assert_equals_reference(gather_batch(tensor[::2], [1], 50), tokens[::2], [1], 50)


def test_arrays_that_are_not_contiguous():
    tokens = tokens_of("uint16", 400)
    read_only = tokens.copy()
    read_only.flags.writeable = False
    for view in (tokens[::2], tokens[::-1], tokens.reshape(20, 20).T[3], tokens[1:], read_only):
        assert_equals_reference(gather_batch(view, [0, 4], 12), view, [0, 4], 12)


def test_starts_of_any_integer_type():
    tokens = tokens_of("uint16", 100)
    for starts in (
        np.array([3, 0], dtype=np.uint8),
        np.array([3, 9, 0, 9])[::2],
        torch.tensor([3, 0]),
        (3, 0),
        range(3, 1, -1),
    ):
        expected = [int(start) for start in starts]
        assert_equals_reference(gather_batch(tokens, starts, 10), tokens, expected, 10)


def test_no_rows():
    for starts in ([], np.empty(0, dtype=np.int64)):
        x, y = gather_batch(tokens_of("uint16", 10), starts, 4)
        assert x.shape == y.shape == (0, 4) and x.dtype == torch.int64


@pytest.mark.parametrize("position", [20, 37, 59, 60])
@pytest.mark.parametrize("dtype, token", [("uint32", 2**31), ("int64", 2**31), ("int64", 2**40)])
def test_a_token_that_does_not_fit_int32(dtype, token, position):
    tokens = tokens_of(dtype, 100)
    tokens[position] = token
    segments = np.split(tokens, [25, 38])
    with pytest.raises(ValueError, match=rf"position {position} does not fit int32.*int64"):
        gather_batch(segments, [0, 20], 40, dtype=torch.int32)
    assert_equals_reference(gather_batch(segments, [0, 20], 40), tokens, [0, 20], 40)
    gather_batch(segments, [position + 1, 0], 19, dtype=torch.int32)  # it is in no window


@pytest.mark.parametrize("index, start", [(0, -1), (1, 94), (2, 2**62), (3, -(2**63)), (1, 100)])
def test_a_start_outside_the_data(index, start):
    starts = [0, 93, 5, 6]
    starts[index] = start
    # 100 tokens, T = 6: the last window is [93, 100).
    with pytest.raises(ValueError, match=rf"starts\[{index}\] = {start} is outside \[0, 93\]: 100"):
        gather_batch(np.arange(100, dtype=np.uint16), starts, 6)


@pytest.mark.parametrize(
    "error, message, data, starts, arguments",
    [
        (ValueError, "context_len=0", np.arange(9), [0], {"context_len": 0}),
        (ValueError, "context_len=-3", np.arange(9), [0], {"context_len": -3}),
        (ValueError, r"starts\[0\] = 0 is outside", np.arange(9), [0], {"context_len": 9}),
        (TypeError, "dtype=torch.int16", np.arange(9), [0], {"dtype": torch.int16}),
        (TypeError, "starts must be .* float64", np.arange(9), [1.5], {}),
        (TypeError, r"starts must be .* shape \(1, 1\)", np.arange(9), [[1]], {}),
        (TypeError, r"starts must be .* shape \(\)", np.arange(9), 1, {}),
        (TypeError, "float64 with 1 dim", np.ones(9), [0], {}),
        (TypeError, "bool with 1 dim", np.ones(9, dtype=bool), [0], {}),
        (TypeError, "int16 with 1 dim", np.ones(9, dtype=np.int16), [0], {}),
        (TypeError, "uint64 with 1 dim", np.ones(9, dtype=np.uint64), [0], {}),
        (TypeError, ">u2 with 1 dim", np.ones(9, dtype=">u2"), [0], {}),
        (TypeError, "int64 with 2 dim", np.ones((3, 9), dtype=int), [0], {}),
        (TypeError, "contiguous", [np.arange(9)[::2]], [0], {}),
        (TypeError, "one dtype", [np.arange(9), np.arange(9, dtype=np.uint8)], [0], {}),
        (TypeError, r"data must be an array .*np\.array\(data\)", [1, 2, 3, 4, 5], [0], {}),
        (ValueError, "segments is empty", [], [0], {}),
        (DeviceError, "device='gpu' is unknown", np.arange(9), [0], {"device": "gpu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_arguments(error, message, data, starts, arguments):
    with pytest.raises(error, match=message):
        gather_batch(data, starts, **{"context_len": 3, **arguments})


def test_outputs_are_checked_by_the_extension():
    # What only the extension's own callers can get wrong must not become a wild write.
    segments, starts = [np.arange(9, dtype=np.uint16)], np.zeros(2, dtype=np.int64)
    good = np.empty((2, 3), dtype=np.int64)
    extension().gather_batch(segments, starts, good, good.copy())
    read_only = good.copy()
    read_only.flags.writeable = False
    for bad in (
        np.empty((1, 3), dtype=np.int64),
        np.empty((2, 4), dtype=np.int64),
        np.empty((2, 3), dtype=np.int32),
        np.empty((2, 3), dtype=np.uint64),
        np.empty((2, 3), dtype=np.float64),
        np.empty((2, 3), dtype=np.int16),
        np.empty((3, 2), dtype=np.int64).T,
        np.empty(6, dtype=np.int64),
        read_only,
    ):
        for x, y in ((bad, good), (good, bad)):
            with pytest.raises((TypeError, ValueError)):
                extension().gather_batch(segments, starts, x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_first_out_of_range(dtype):
    tokens = np.arange(70000).astype(np.uint8).astype(dtype)  # 0 to 255, again and again
    scan = extension().first_out_of_range
    assert scan(tokens, 256) == -1 and scan(tokens, 2**62) == -1
    assert scan(tokens, 255) == 255 and scan(tokens, 1) == 1 and scan(tokens, 0) == 0
    assert scan(tokens[:0], 0) == -1
    tokens[[65536, 65537]] = 255
    tokens[:65536] = 0
    assert scan(tokens, 255) == 65536
    if dtype.startswith("int"):
        tokens[65535] = -1
        assert scan(tokens, 2**62) == 65535
    with pytest.raises(TypeError, match="contiguous 1-D"):
        scan(tokens[::2], 256)


# get_batch


def test_get_batch_is_the_reference_at_the_drawn_starts():
    tokens = tokens_of("uint16", 500)
    x, y = get_batch(tokens, 16, 32, "cpu", generator=torch.Generator().manual_seed(3))
    starts = torch.randint(500 - 32, (16,), generator=torch.Generator().manual_seed(3))
    assert_equals_reference((x, y), tokens, starts.tolist(), 32)


def test_every_start_is_reached_uniformly():
    # CS336's own test, and that no start is left out: 93 starts, 32,000 draws, 5 sigma.
    data, context_len, batch_size = np.arange(0, 100), 7, 32
    torch.manual_seed(0)
    starts = Counter()
    for _ in range(1000):
        x, y = get_batch(data, batch_size, context_len, "cpu")
        assert x.shape == y.shape == (batch_size, context_len)
        assert torch.equal(x + 1, y)
        starts.update(x[:, 0].tolist())
    valid = len(data) - context_len
    assert sorted(starts) == list(range(valid))
    draws = 1000 * batch_size
    expected = draws / valid
    deviation = math.sqrt(draws * (1 / valid) * (1 - 1 / valid))
    assert max(abs(count - expected) for count in starts.values()) < 5 * deviation


def test_only_one_window_fits():
    x, y = get_batch(np.arange(8), 5, 7, "cpu")
    assert (x == torch.arange(7)).all() and (y == torch.arange(1, 8)).all()


def test_generators():
    data = np.arange(10_000, dtype=np.uint16)

    def draw(generator=None):
        return get_batch(data, 8, 4, "cpu", generator=generator)[0]

    def seeded(seed):
        return torch.Generator().manual_seed(seed)

    assert torch.equal(draw(seeded(1)), draw(seeded(1)))
    assert not torch.equal(draw(seeded(1)), draw(seeded(2)))
    one = seeded(1)
    assert not torch.equal(draw(one), draw(one))
    # Without one, torch's global generator, which a given one leaves alone.
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = draw()
    torch.set_rng_state(state)
    draw(seeded(7))
    assert torch.equal(draw(), first)


def test_torchs_defaults_change_nothing():
    tokens = tokens_of("uint16", 500)
    expected = get_batch(tokens, 4, 8, "cpu", generator=torch.Generator().manual_seed(1))
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        got = get_batch(tokens, 4, 8, "cpu", generator=torch.Generator("cpu").manual_seed(1))
        get_batch(tokens, 4, 8, "cpu")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(dtype)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("n, context_len", [(7, 7), (0, 1), (1, 1), (3, 100)])
def test_data_too_short(n, context_len):
    message = rf"data holds {n} tokens; context_len={context_len} needs at least {context_len + 1}"
    with pytest.raises(ValueError, match=message):
        get_batch(np.arange(n), 4, context_len, "cpu")


@pytest.mark.parametrize("batch_size, context_len", [(0, 4), (-1, 4), (4, 0), (4, -1)])
def test_sizes_below_one(batch_size, context_len):
    message = f"batch_size={batch_size}, context_len={context_len}: both must be at least 1"
    with pytest.raises(ValueError, match=message):
        get_batch(np.arange(50), batch_size, context_len, "cpu")


def test_a_device_that_is_not_there():
    # CS336's test expects a RuntimeError with one of these two texts.
    for function in (
        lambda: get_batch(np.arange(50), 4, 4, "cuda:99"),
        lambda: gather_batch(np.arange(50), [0], 4, "cuda:99"),
    ):
        with pytest.raises(DeviceError) as caught:
            function()
        assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, ValueError)
        message = str(caught.value)
        assert "cuda:99" in message
        if torch.cuda.is_available() or torch.version.cuda is None:
            assert "CUDA error" in message or "Torch not compiled with CUDA enabled" in message


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "xla", "meta", ""])
def test_a_device_that_nobody_knows(device):
    with pytest.raises(DeviceError, match="device="):
        get_batch(np.arange(50), 4, 4, device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
def test_batches_on_a_gpu():
    tokens = tokens_of("uint16", 5000)
    batches = [gather_batch(tokens, [i, 4000 - i], 900, "cuda") for i in range(50)]
    for i, (x, y) in enumerate(batches):  # pinned blocks that were reused too early would show
        assert x.is_cuda and y.is_cuda
        assert_equals_reference((x.cpu(), y.cpu()), tokens, [i, 4000 - i], 900)


def test_a_wrong_batch_is_rejected():
    # The comparison that this file stands on, given what wrong kernels would return.
    tokens, starts = np.arange(100, dtype=np.uint16), [3, 50, 7]
    x, y = gather_batch(tokens, starts, 20)
    assert_equals_reference((x, y), tokens, starts, 20)
    late = x.clone()
    late[1, 19] += 1
    for wrong in ((y, x), (x, x), (x[[1, 0, 2]], y[[1, 0, 2]]), (late, y), (x, late), (x.int(), y)):
        with pytest.raises(AssertionError):
            assert_equals_reference(wrong, tokens, starts, 20)
