"""DDP and FSDP2 around a module that is model and loss in one: forward(x, y, ...) -> loss.

Every rank divides its loss by the tokens of all ranks. So gradients are added up over the ranks,
never averaged, and the sum is that of one process with the whole batch.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn

from fastlm.errors import ConfigError
from fastlm.kernels.collect import is_dtensor
from fastlm.model_interface import blocks_of
from fastlm.parallel.world import World


def wrap(
    loss: nn.Module,
    world: World,
    *,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    dtype: torch.dtype = torch.float32,
    reshard: bool = True,
    find_unused: bool = False,
) -> nn.Module:
    """The module to call in training and evaluation instead of `loss`; in a world of one, `loss`.

    loss: forward(x, y, ...) -> 0-d loss. Rank 0's weights and buffers go to all, one block after
    the other: its module may be on the CPU, and the others' on the meta device, so that a machine
    holds the whole model once. Build the optimizer afterwards: parameters are replaced.
    dtype: what FSDP2 gathers the blocks' weights in; gradients are reduced in fp32. reshard: FSDP2
    frees a block's weights after its forward, and gathers them once more in backward. find_unused:
    some parameters may get no gradient, on some ranks or on all: a model of somebody else's. (FSDP2
    before torch 2.13: on no rank or on all, or the run ends with an error of the collective.) Under
    fsdp all ranks must call the same blocks in the same order, since each gathers its weights from
    all ranks: where they do not, their processes abort, in any version.

    Raises ConfigError for "fsdp" in float16.
    """
    if parallel == "fsdp" and dtype == torch.float16:
        raise ConfigError("--parallel fsdp trains in bfloat16 or float32, not float16")
    if world.size == 1:
        return loss
    if parallel == "ddp":
        return _data_parallel(loss, world.device, find_unused)
    return _sharded(loss, world, dtype, reshard, find_unused)


def _data_parallel(loss: nn.Module, device: torch.device, find_unused: bool) -> nn.Module:
    _materialize(loss, device)
    known = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
    # Buffers are constants: they are sent once. Torch 2.13 does so at the construction, and has
    # renamed the setting, which before it leaves them out altogether.
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    if sync == "broadcast_buffers":
        for buffer in loss.buffers():
            dist.broadcast(buffer.detach(), src=0)
    module = nn.parallel.DistributedDataParallel(
        loss,
        device_ids=[device] if device.type == "cuda" else None,
        **{sync: False},
        gradient_as_bucket_view=True,  # one copy of the gradients instead of two
        find_unused_parameters=find_unused,
    )
    # DDP by itself divides by the number of ranks. To multiply the loss by it would undo that, but
    # for the rounding where it is no power of two.
    module.register_comm_hook(None, _add_up)
    return module


# Without types: torch may be built without distributed, and DDP refuses their names as strings.
def _add_up(_, bucket):
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


def _sharded(
    loss: nn.Module, world: World, dtype: torch.dtype, reshard: bool, find_unused: bool
) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        # Inputs stay as they are: RoPE's tables are fp32, and so are sums under autocast.
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    blocks = blocks_of(loss)
    for block in blocks:
        _take_rank_0s(block, world.device)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    # The rest, embeddings and head, is gathered in fp32: the gradient of a whole vocabulary is a
    # sum over few or very many tokens, which autocast does not round to bf16 either. Backward
    # begins with it, so that freeing it after forward would gain nothing.
    _take_rank_0s(loss, world.device)
    fully_shard(loss, mesh=mesh, reshard_after_forward=False)
    for module in _shards(loss):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
        if find_unused and hasattr(module, "set_reduce_scatter_unused_params"):  # torch >= 2.13
            module.set_reduce_scatter_unused_params(True, recurse=False)
    loss._kept_gathered = [loss] if reshard else [loss, *blocks]  # see micro_step
    loss.register_forward_hook(_free_after_evaluation)
    return loss


def _materialize(module: nn.Module, device: torch.device) -> list[torch.Tensor]:
    """Moves what is not sharded yet to `device`, empty where it was on the meta device; returns it.

    Tied parameters stay tied, which nn.Module.to_empty does not promise.
    """
    moved: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for tensors in (owner._parameters, owner._buffers):
            for name, tensor in tensors.items():
                if tensor is None or is_dtensor(tensor):
                    continue
                if id(tensor) not in moved:
                    is_meta = tensor.is_meta
                    new = torch.empty_like(tensor, device=device) if is_meta else tensor.to(device)
                    if isinstance(tensor, nn.Parameter) and new is not tensor:
                        new = nn.Parameter(new.detach(), requires_grad=tensor.requires_grad)
                    moved[id(tensor)] = new
                tensors[name] = moved[id(tensor)]
    return list(moved.values())


def _take_rank_0s(module: nn.Module, device: torch.device) -> None:
    for tensor in _materialize(module, device):
        dist.broadcast(tensor.detach(), src=0)


def _free_after_evaluation(loss: nn.Module, args: object, output: object) -> None:
    """Without a backward nothing else would free what the forward has gathered, and the module's
    parameters would be whole copies that no optimizer step reaches."""
    if not torch.is_grad_enabled():
        for module in _shards(loss):
            module.reshard()


def _shards(module: nn.Module) -> list:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


@contextlib.contextmanager
def micro_step(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: gradients are reduced behind the last only.

    FSDP2 keeps the unreduced gradients of all parameters until then, and keeps gathered what it
    does not free after forward anyway: the root's parameters, and the blocks' without `reshard`.
    """
    if isinstance(module, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if last else module.no_sync():
            yield
        return
    if kept := getattr(module, "_kept_gathered", None):
        module.set_is_last_backward(last)
        module.set_requires_gradient_sync(last)
        for shard in kept:
            shard.set_reshard_after_backward(last, recurse=False)
    yield


def gathered_on_main(state: dict[str, torch.Tensor], world: World) -> dict[str, torch.Tensor]:
    """A state dict's DTensors gathered, one at a time, on rank 0's CPU; {} on other ranks, which
    call it, too."""
    gathered = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
        if world.is_main:
            gathered[name] = tensor.cpu()
    return gathered
