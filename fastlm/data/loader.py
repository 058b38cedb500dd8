"""Training and validation batches on the device.

B batch, T context length.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fastlm.data.dataset import TokenDataset, as_dataset
from fastlm.ops.gather_batch import TokenSource, check_window_fits


class TrainLoader:
    """Batches by sample number: `batch(i)` is the same whenever and wherever it is asked for."""

    def __init__(
        self,
        data: TokenSource | TokenDataset,
        batch_size: int,  # windows in a batch, B
        context_len: int,
        *,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        self.dataset = as_dataset(data)
        self.batch_size, self.context_len = batch_size, context_len
        self.device = torch.device(device)
        self.sampler = self.dataset.sampler(context_len, seed)

    def batch(self, first: int) -> tuple[Tensor, Tensor]:
        """(x, y), int64, (B, T) each: the samples first, first + 1, … of the sampler."""
        starts = self.sampler.starts(first, self.batch_size)
        return self.dataset.gather(starts, self.context_len, self.device)

    def will_need(self, first: int) -> None:
        """batch(first) comes soon: the system may read it from the disk."""
        self.dataset.will_need(self.sampler.starts(first, self.batch_size), self.context_len)


def spread_batches(
    data: TokenSource | TokenDataset, batch_size: int, context_len: int, num_batches: int, device
) -> Iterator[tuple[Tensor, Tensor]]:
    """`num_batches` fixed batches of windows spread evenly over `data`: (x, y), (B, T) each."""
    dataset = as_dataset(data)
    check_window_fits(len(dataset), context_len)
    last = len(dataset) - context_len - 1
    starts = np.linspace(0, last, num_batches * batch_size).round().astype(np.int64)
    dataset.will_need(starts, context_len)
    for rows in np.split(starts, num_batches):
        yield dataset.gather(rows, context_len, device)


def all_batches(
    data: TokenSource | TokenDataset,
    batch_size: int,
    context_len: int,
    device,
    max_targets: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every target of `data` once, in batches of one shape: (x, y), (B, T) each.

    What fills up the last window and the last batch is labelled -100, which the loss ignores.

    max_targets: if there are more than that, only so many, in some of the windows (at least one),
        which are spread evenly over the data. 0: all.
    """
    dataset = as_dataset(data)
    check_window_fits(len(dataset), context_len)
    last = len(dataset) - context_len - 1
    begins = np.arange(0, len(dataset) - 1, context_len)  # of the targets each window adds
    if 0 < max_targets < len(dataset) - 1:
        windows = max(1, max_targets // context_len)
        begins = begins[np.linspace(0, len(begins) - 1, windows).round().astype(np.int64)]
    starts = np.minimum(begins, last)
    for first in range(0, len(starts), batch_size):
        rows = slice(first, first + batch_size)
        padding = batch_size - len(starts[rows])
        x, y = dataset.gather(np.pad(starts[rows], (0, padding)), context_len, "cpu")
        for row, (start, begin) in enumerate(zip(starts[rows], begins[rows], strict=True)):
            y[row, : begin - start] = -100  # targets the window before has had
        if padding:
            y[-padding:] = -100
        yield x.to(device), y.to(device)
