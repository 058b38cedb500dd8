"""Tokens, and the comparison of a batch with the reference. T context length."""

import numpy as np
import torch

from fastlm.ops.gather_batch import gather_batch_reference


def tokens_of(dtype: str, n: int, seed: int = 0) -> np.ndarray:
    """(n,) random tokens from all that fit int32 and the dtype, the first and the last included."""
    limit = min(np.iinfo(dtype).max, 2**31 - 1)
    tokens = np.random.default_rng(seed).integers(0, limit, n, endpoint=True).astype(dtype)
    tokens[:2] = [0, limit]
    return tokens


def assert_equals_reference(batch, tokens, starts, context_len, dtype=torch.int64):
    x, y = batch
    true_x, true_y = gather_batch_reference(tokens, starts, context_len)
    assert x.dtype == y.dtype == dtype
    assert x.is_contiguous() and y.is_contiguous()
    assert torch.equal(x.long(), true_x) and torch.equal(y.long(), true_y)
