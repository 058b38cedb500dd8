"""Validation loss: on fixed batches while training, on every token, or very many, at the end.

Nothing here draws a random number, so evaluating changes nothing of the training.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.config import TrainingConfig
from fastlm.data.dataset import TokenDataset
from fastlm.data.files import Data
from fastlm.data.loader import all_batches, spread_batches
from fastlm.data.progress import progress
from fastlm.errors import ConfigError
from fastlm.hardware import autocast, select_device, select_dtype
from fastlm.ops.cross_entropy import check_labels, cross_entropy_loss
from fastlm.parallel.world import ALONE, World

LossFunction = Callable[
    [Tensor, Tensor], Tensor
]  # x, y: (B, T) -> sum of the targets' losses, nats


def evaluate_model_loss(
    model: nn.Module, data: Any, config: TrainingConfig, num_batches: int = 20
) -> float:
    """Mean loss per token (nats) over `num_batches` fixed batches spread evenly over `data`.

    data: (n,) token ids. The batches are of config.batch_size windows of config.context_len tokens,
    the same at every call, and the matmuls are in config.dtype, as in training. The model, (B, T)
    ids to (B, T, V) logits, is put into eval mode and back into the mode it was in.
    """
    _check_positive(num_batches=num_batches)
    device = select_device(config.device)
    dtype = select_dtype(config.dtype, device)
    batches = spread_batches(data, config.batch_size, config.context_len, num_batches, device)
    with evaluating(model), autocast(device, dtype):
        return mean_loss(lambda x, y: summed_loss(model(x), y), batches)


def validate(
    model: nn.Module,
    val_dataset: Any,
    batch_size: int,
    context_length: int,
    vocab_size: int | None = None,
    d_model: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    d_ff: int | None = None,
    rope_theta: float | None = None,
    device: torch.device | str = "auto",
    num_val_batches: int = 10,
) -> float:
    """evaluate_model_loss in float32, with the arguments of the CS336 training guide.

    The sizes from vocab_size to rope_theta are there for its callers; the model knows them.
    """
    _check_positive(
        batch_size=batch_size, context_length=context_length, num_val_batches=num_val_batches
    )
    device = select_device(device)
    batches = spread_batches(val_dataset, batch_size, context_length, num_val_batches, device)
    with evaluating(model):
        return mean_loss(lambda x, y: summed_loss(model(x), y), batches)


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name}={size}: it must be at least 1")


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum of the losses of all targets that are not -100: (), fp32, in nats."""
    return cross_entropy_loss(logits, targets, reduction="sum")


def mean_loss(
    loss: LossFunction, batches: Iterable[tuple[Tensor, Tensor]], world: World = ALONE
) -> float:
    """Mean loss per target over `batches`, summed in fp64.

    world: ranks that share the batches; all of them give all of the batches and get the same mean.
    Waits for the device once, at the end. Raises ValueError for a label out of range, which makes
    a loss on a GPU NaN. NaN if there is no target.
    """
    total, targets = _loss_sum(loss, batches, world)
    return _mean(total, targets)


def _mean(total: float, targets: int) -> float:
    """NaN of no targets, as windows of long prompts may have none."""
    return total / targets if targets else math.nan


def _loss_sum(
    loss: LossFunction,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
    on_targets: Callable[[int], object] = lambda _: None,  # takes the size of each batch
) -> tuple[float, int]:
    """(sum of the losses, number of targets) of all ranks."""
    losses, targets = [], []
    for x, y in _shared(batches, world):
        losses.append(loss(x, y))
        targets.append((y != -100).sum())
        on_targets(y.numel() * world.size)
    total = sum(torch.stack(losses).tolist())
    check_labels()
    sums = world.sum(torch.tensor([total, int(torch.stack(targets).sum())], dtype=torch.float64))
    return float(sums[0]), int(sums[1])


def _shared(
    batches: Iterable[tuple[Tensor, Tensor]], world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the batches: every world.size-th.

    All ranks get equally many, for sharded weights are gathered together: where a rank has none
    left, it gets another's without its targets.
    """
    batches = iter(batches)
    while turn := list(itertools.islice(batches, world.size)):
        if world.rank < len(turn):
            yield turn[world.rank]
        else:
            x, y = turn[0]
            yield x, torch.full_like(y, -100)


class Evaluation(NamedTuple):
    """The loss over the targets of some data, or over a part of them."""

    loss: float  # mean, nats
    targets: int  # that it is the mean of
    of_targets: int  # in the data

    @property
    def extent(self) -> str:
        """Which targets, in words."""
        if self.targets == self.of_targets:
            return f"over all {self.targets:,} targets"
        return f"over {self.targets:,} of {self.of_targets:,} targets, evenly spread"


def loss_over_all(
    loss: LossFunction,
    data: TokenDataset,
    batch_size: int,
    context_len: int,
    device: torch.device,
    *,
    max_targets: int = 0,
    world: World = ALONE,
) -> Evaluation:
    """The loss over every target of `data` once, or over about `max_targets` (0: no limit) of them,
    in windows spread evenly. Shows how far it is. world: ranks that share the work; all get the
    result.
    """
    positions = len(data) - 1  # of targets, and of tokens that are none
    batches = all_batches(data, batch_size, context_len, device, max_targets)
    with progress(
        "[VAL] final loss",
        min(max_targets or positions, positions),
        partial(print, flush=True),
        unit="targets",
        silent_seconds=10.0,
    ) as on_targets:
        total, targets = _loss_sum(loss, batches, world, on_targets)
    return Evaluation(_mean(total, targets), targets, positions - _ignored(data))


def _ignored(data: TokenDataset) -> int:
    """How many tokens behind the first are no targets. Reads all of data.ignored."""
    if data.ignored is None:
        return 0
    data.ignored.check_files()
    return sum(int(np.count_nonzero(a)) for a in data.ignored.slice(1, len(data)).segments)


def loss_over_sets(
    loss: LossFunction, data: Data, cfg: TrainingConfig, device: torch.device, world: World
) -> dict[str, Evaluation]:
    """loss_over_all of each validation set by name; of the only one under ''. Named sets share
    cfg.final_eval_tokens evenly."""
    sets = data.val_sets or {"": data.val}
    most = -(-cfg.final_eval_tokens // len(sets))
    return {
        name: loss_over_all(
            loss, dataset, cfg.batch_size, cfg.context_len, device, max_targets=most, world=world
        )
        for name, dataset in sets.items()
    }


def mean_of_sets(found: Mapping[str, Evaluation]) -> Evaluation:
    """The validation loss of several sets: the mean of theirs, each counting the same."""
    return Evaluation(
        sum(one.loss for one in found.values()) / len(found),
        sum(one.targets for one in found.values()),
        sum(one.of_targets for one in found.values()),
    )


def describe_sets(found: Mapping[str, Evaluation], data: Data) -> dict[str, str]:
    """What to say of each named set: its loss, bits/byte where its text is known, the extent."""
    said = {}
    for name in data.val_sets:
        one, size = found[name], data.val_set_bytes.get(name)
        bpb = f", {bits_per_byte(one.loss, one.of_targets, size):.4f} bits/byte" if size else ""
        said[name] = f"loss {one.loss:.4f} nats/token{bpb}, {one.extent}"
    return said


def bits_per_byte(mean_nats: float, targets: int, num_bytes: int) -> float:
    """Total loss in bits over the UTF-8 bytes of the text: comparable between tokenizers.

    targets: in the text. With the mean loss of a part of them, this estimates the text's.
    """
    return mean_nats * targets / math.log(2) / num_bytes


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; outside each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
