"""A tiny model under FSDP2 on two ranks, and comparisons, for distributed_adamw.py."""

import torch
import torch.distributed as dist
from tolerance import assert_bitwise_equal
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_model(mesh, dtype=torch.float32, seed=0):
    """Shards of 4 and 3 rows, and of 1 and none."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rows = [local(p).shape[0] for p in model.parameters()]
    assert rows == ([4, 4, 1, 1], [3, 3, 0, 0])[mesh.get_rank()], rows
    return model


def backward(model, step, quantum=2.0**-6):
    """The gradients of step number `step`; batches differ from rank to rank.

    Rounded to multiples of `quantum`: their squares are then summed without rounding, so that the
    norm has the same bits however the gradients are divided among the ranks.
    """
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    x = torch.randn(16, 5, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    # Small ones, too, so that not every step is clipped.
    loss = (model(x) - 3).square().mean() * (1.0 if step % 3 else 0.1)
    loss.backward()
    if quantum:
        for p in model.parameters():
            local(p.grad).div_(quantum).round_().mul_(quantum)


def whole_parameters(model, dtype=None):
    return [nn.Parameter(full(p.detach()).to(dtype or p.dtype)) for p in model.parameters()]


def run(model, optimizer, steps):
    for step in steps:
        backward(model, step)
        optimizer.step()


def take_gradients(whole, model):
    for p, shard in zip(whole, model.parameters(), strict=True):
        p.grad = full(shard.grad).to(p.dtype)


def local_snapshot(model, optimizer):
    """This rank's part of all that a step may change."""
    tensors = [local(p.detach()) for p in model.parameters()]
    for p in model.parameters():
        tensors += [local(value) for value in optimizer.state[p].values()]
    return [t.clone() for t in tensors]


def assert_same_tensors(actual, expected):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(a, b, f"tensor {i}")


def assert_same_on_all_ranks(value):
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert len(set(values)) == 1, values
