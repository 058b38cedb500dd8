"""A rank that initialises a model in shards, for test_init_weights.py."""

import json

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import TransformerLM
from fastlm.model_interface import model_class

# Rows that neither 2 nor 3 ranks can share equally.
SIZES = dict(vocab_size=61, d_model=10, num_heads=1, num_layers=2, max_seq_len=7, d_ff=13)


class Largest(TorchDispatchMode):
    """The most elements that any operation has returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def main(argv: list[str]) -> None:
    """One rank: builds a model in shards, writes the whole of it, and what this rank held."""
    out, tied = argv
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with torch.device("meta"):
        model = TransformerLM(**SIZES, tie_embeddings=tied == "True")
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    with Largest() as largest:
        model.init_weights()
    whole = {name: p.full_tensor() for name, p in model.state_dict().items()}
    whole |= dict(model.named_buffers())
    held = sum(p.to_local().numel() for p in model.parameters())
    is_tied = model.lm_head.weight is model.token_embeddings.weight
    # It also trains: FSDP knows the new parameters.
    model(torch.arange(7)[None]).square().mean().backward()
    norm = sum(p.grad.full_tensor().square().sum() for p in model.parameters())
    assert model_class(model) is None
    layer = fully_shard(torch.nn.Linear(4, 4), mesh=mesh)
    assert model_class(layer) == "torch.nn.modules.linear.Linear"
    if rank == 0:
        torch.save(whole, out)
    with open(f"{out}.{rank}.json", "w") as file:
        json.dump([held, largest.elements, is_tied, float(norm)], file)
    dist.destroy_process_group()
