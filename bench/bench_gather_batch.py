"""get_batch and the scan of token ids, on a 100 MB memory-mapped uint16 file in the page cache."""

import numpy as np
import peers
import pytest
import torch
from harness import TINY, Candidate, Work, compare

from fastlm import gather_batch, get_batch
from fastlm.data.files import TokenDataset, check_dataset
from fastlm.errors import DataError
from fastlm.ops.gather_batch import gather_batch_reference

VOCAB_SIZE = 50257
COUNT = 2_000_000 if TINY else 50_000_000


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> np.memmap:
    """(COUNT,) ids below VOCAB_SIZE."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, COUNT, dtype=np.uint16)
    ids.tofile(path)
    return np.memmap(path, dtype=np.uint16, mode="r")


@pytest.mark.parametrize("B, T", [(32, 256), (64, 1024), (512, 1024)])
def bench_get_batch(benchmark, tokens, device, B, T):
    starts = [0, 1_234_567, len(tokens) - T - 1]
    for ours, expected in zip(
        gather_batch(tokens, starts, T, device),
        gather_batch_reference(tokens, starts, T),
        strict=True,
    ):
        assert torch.equal(ours.cpu(), expected)
    for make in (get_batch, peers.nanogpt_batch, peers.notebook_batch, peers.numpy_batch):
        x, y = make(tokens, B, T, device)
        assert x.shape == y.shape == (B, T) and x.dtype == torch.int64
        assert torch.equal(x[:, 1:], y[:, :-1])

    def candidate(make) -> Candidate:
        return Candidate(lambda: make(tokens, B, T, device))

    compare(
        benchmark,
        "gather_batch",
        f"get_batch, {B} x {T} uint16",
        device,
        candidate(get_batch),
        {
            "nanoGPT's get_batch": candidate(peers.nanogpt_batch),
            "notebook's get_batch": candidate(peers.notebook_batch),
            "NumPy fancy indexing": candidate(peers.numpy_batch),
        },
        Work("B(T + 1) tokens of 2 bytes read, 2BT of 8 written", B * (T + 1) * 2 + 2 * B * T * 8),
        seconds=3,
    )


def bench_token_scan(benchmark, tokens):
    dataset = TokenDataset([tokens])

    def check(vocab_size: int) -> None:
        check_dataset(dataset, "training", context_len=256, vocab_size=vocab_size)

    check(VOCAB_SIZE)
    with pytest.raises(DataError):
        check(VOCAB_SIZE - 1)
    assert tokens.max() == VOCAB_SIZE - 1
    compare(
        benchmark,
        "gather_batch",
        f"scan of {COUNT // 10**6} M token ids, uint16",
        torch.device("cpu"),
        Candidate(lambda: check(VOCAB_SIZE)),
        {"NumPy array.max()": Candidate(tokens.max)},
        Work("2 bytes a token, read (the copy reads half of that and writes half)", 2 * COUNT),
        seconds=3,
    )
