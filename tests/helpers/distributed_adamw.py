"""AdamW and clip_gradients on DTensors: what both ranks of test_adamw_distributed.py run; also

    torchrun --nproc_per_node=2 tests/helpers/distributed_adamw.py DIRECTORY

Every case is run by both ranks at once and prints a line where it holds on a rank. DIRECTORY: an
empty one, the same for both.
"""

import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from adamw_runs import HYPER
from distributed_runs import (
    assert_same_on_all_ranks,
    assert_same_tensors,
    backward,
    full,
    local,
    local_snapshot,
    run,
    sharded_model,
    take_gradients,
    whole_parameters,
)
from tolerance import assert_bitwise_equal
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)

from fastlm import AdamW, clip_gradients

CASES = {}
MAX_NORM = 1.5


def case(function):
    CASES[function.__name__] = function
    return function


def assert_is_the_unsharded_run(mesh, dtype, quantum, compare, **options):
    """Trains sharded and, with the same global gradients, whole; compares everything."""
    model = sharded_model(mesh, dtype)
    whole = whole_parameters(model, torch.float32)
    optimizer = AdamW(model.parameters(), **HYPER, max_grad_norm=MAX_NORM, **options)
    alone = AdamW(whole, **HYPER, max_grad_norm=MAX_NORM)
    clipped = []
    for step in range(12):
        backward(model, step, quantum)
        take_gradients(whole, model)
        optimizer.step()
        alone.step()
        assert_same_on_all_ranks(optimizer.last_grad_norm.item())
        assert optimizer.last_grad_norm.shape == () and optimizer.first_nonfinite() is None
        compare(optimizer.last_grad_norm, alone.last_grad_norm)
        clipped.append(alone.last_grad_norm.item() > MAX_NORM)
    assert True in clipped and False in clipped, clipped
    for p, master, expected in zip(
        model.parameters(), optimizer.master_weights(), whole, strict=True
    ):
        assert isinstance(master, DTensor) and master.placements == p.placements
        compare(full(master), expected.detach())
        for key in ("exp_avg", "exp_avg_sq"):
            assert isinstance(optimizer.state[p][key], DTensor)
            compare(full(optimizer.state[p][key]), alone.state[expected][key])
        assert optimizer.state[p]["step"].item() == 12
    return model, optimizer


@case
def fsdp_is_the_unsharded_run(mesh, directory):
    assert_is_the_unsharded_run(mesh, torch.float32, 2.0**-6, assert_bitwise_equal)


@case
def fsdp_is_the_unsharded_run_but_for_the_order_of_sums(mesh, directory):
    # The order changes the fp64 sum, and so the clip coefficient, by 1e-16: now and then a value
    # is rounded the other way.
    def compare(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-8)

    assert_is_the_unsharded_run(mesh, torch.float32, None, compare)


@case
def split_precision_is_the_fp32_run(mesh, directory):
    model, optimizer = assert_is_the_unsharded_run(
        mesh, torch.bfloat16, 2.0**-6, assert_bitwise_equal, param_precision="split"
    )
    masters = optimizer.master_weights()
    # No full_tensor() of a remainder: neither gloo nor NCCL gathers int16.
    assert any((local(optimizer.state[p]["remainder"]) != 0).any() for p in model.parameters())
    for p, master in zip(model.parameters(), masters, strict=True):
        assert p.dtype == torch.bfloat16 and master.dtype == torch.float32
        assert optimizer.state[p]["remainder"].placements == p.placements
    other_model = sharded_model(mesh, torch.bfloat16, seed=1)
    other = AdamW(other_model.parameters(), param_precision="split")
    other.load_master_weights(masters)
    assert_same_tensors(map(full, other.master_weights()), map(full, masters))
    assert_same_tensors(map(local, other_model.parameters()), map(local, model.parameters()))


@case
def a_nan_on_one_rank_skips_the_step_on_all(mesh, directory):
    for value in (torch.nan, torch.inf):
        models = [sharded_model(mesh) for _ in range(2)]
        optimizer, without = (
            AdamW(model.named_parameters(), **HYPER, max_grad_norm=MAX_NORM) for model in models
        )
        model = models[0]
        run(model, optimizer, range(3))
        backward(model, 3)
        if dist.get_rank() == 1:
            local(model[0].bias.grad)[2] = value
        before = local_snapshot(model, optimizer)
        optimizer.step()
        assert_same_tensors(local_snapshot(model, optimizer), before)
        assert not optimizer.last_grad_norm.isfinite()
        bad = optimizer.first_nonfinite()
        assert bad == (None if dist.get_rank() == 0 else (0, 1, "0.bias")), bad
        # And it is as though it had never been.
        run(model, optimizer, (4, 5))
        assert optimizer.first_nonfinite() is None and optimizer.last_grad_norm.isfinite()
        run(models[1], without, (0, 1, 2, 4, 5))
        assert_same_tensors(local_snapshot(model, optimizer), local_snapshot(models[1], without))


# Gradients made by hand


def whole_numbers(*shape, seed=0, dtype=torch.float32):
    """Their squares are summed without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def with_gradient(grad):
    param = torch.zeros_like(grad)
    param.grad = grad
    return param


def some_gradients(mesh):
    """Unsharded ones, and the same as this rank holds them."""
    mesh2d = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicas", "shards"))
    makers = [
        lambda x: distribute_tensor(x, mesh, [Shard(0)]),
        lambda x: distribute_tensor(x, mesh, [Shard(1)]),
        lambda x: distribute_tensor(x, mesh, [Replicate()]),
        lambda x: distribute_tensor(x, mesh2d, [Replicate(), Shard(0)]),
        lambda x: distribute_tensor(x, mesh2d, [Shard(0), Shard(1)]),
        lambda x: x,
    ]
    shapes = [(7, 5), (3, 3), (1, 4), (2, 1), (0, 6), (65, 2)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    whole = [
        whole_numbers(*shape, seed=i, dtype=dtypes[i % len(dtypes)])
        for i, shape in enumerate(shapes * len(makers))
    ]
    parts = [makers[i // len(shapes)](x.clone()) for i, x in enumerate(whole)]
    return whole, parts


@case
def clip_gradients_counts_every_element_once(mesh, directory):
    for max_norm in (3.0, 1e9):  # clips, does not
        for order in (1, -1):
            gradients, parts = (x[::order] for x in some_gradients(mesh))
            before = [x.clone() for x in gradients]
            params = [with_gradient(x) for x in gradients]
            norm = clip_gradients(params, max_norm)
            assert norm > 100
            clipped = clip_gradients([with_gradient(x) for x in parts], max_norm)
            assert clipped == norm, (clipped, norm)
            assert_same_on_all_ranks(clipped)
            assert_same_tensors(map(full, parts), gradients)
            assert all(map(torch.equal, before, gradients)) == (max_norm > norm)


@case
def clip_gradients_of_a_model(mesh, directory):
    # By itself, between backward and torch's own step, as loops do that are not fastlm's.
    model = sharded_model(mesh)
    whole = whole_parameters(model)
    backward(model, 1, quantum=None)
    take_gradients(whole, model)
    norm = clip_gradients(model.parameters(), 0.5)
    expected = clip_gradients(whole, 0.5)
    assert_same_on_all_ranks(norm)
    torch.testing.assert_close(norm, expected, rtol=1e-14, atol=0)
    for p, shard in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(full(shard.grad), p.grad, rtol=2e-7, atol=0)


@case
def a_nonfinite_norm_leaves_gradients_as_they_are(mesh, directory):
    _, parts = some_gradients(mesh)
    if dist.get_rank() == 1:
        local(parts[0])[1, 2] = torch.inf
    before = [local(x).clone() for x in parts]
    norm = clip_gradients([with_gradient(x) for x in parts], 1.0)
    assert norm == torch.inf
    assert_same_tensors(map(local, parts), before)


@case
def partial_gradients(mesh, directory):
    # A sum over the ranks that is still outstanding: no norm is known of it yet.
    mine = whole_numbers(7, 5, seed=dist.get_rank())
    partial = DTensor.from_local(mine, mesh, [Partial()])
    with pytest.raises(ValueError, match="sum it over its mesh first"):
        clip_gradients([with_gradient(partial)], 1.0)
    # A step knows, by its parameter, where the sum belongs.
    total = whole_numbers(7, 5, seed=0) + whole_numbers(7, 5, seed=1)
    for placement in (Shard(0), Shard(1), Replicate()):
        start = whole_numbers(7, 5, seed=2)
        param = nn.Parameter(distribute_tensor(start, mesh, [placement]))
        expected = nn.Parameter(start.clone())
        optimizer = AdamW([param], **HYPER, max_grad_norm=2.0)
        alone = AdamW([expected], **HYPER, max_grad_norm=2.0)
        expected.grad = total
        for _ in range(2):
            param.grad = DTensor.from_local(mine.clone(), mesh, [Partial()])
            optimizer.step()
            alone.step()
            assert_bitwise_equal(full(param.detach()), expected.detach())
            assert_bitwise_equal(optimizer.last_grad_norm, alone.last_grad_norm)


@case
def a_rank_without_gradients_joins_the_norm(mesh, directory):
    # Of a layer that its batch did not reach, say: it must not leave the others waiting.
    start, gradient = whole_numbers(7, 5), whole_numbers(7, 5, seed=1)
    param = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    optimizer = AdamW([param], **HYPER, max_grad_norm=2.0)
    norm = gradient[:4].square().sum().sqrt()  # of rank 0's part
    for _ in range(2):  # before there is a state, and after
        if dist.get_rank() == 0:
            param.grad = distribute_tensor(gradient, mesh, [Shard(0)], src_data_rank=None)
        assert abs(clip_gradients(param, 1e9) / norm.item() - 1) < 1e-6
        optimizer.step()
        assert_bitwise_equal(optimizer.last_grad_norm, norm)
    if dist.get_rank() == 1:
        assert_bitwise_equal(local(param.detach()), start[4:])


@case
def plain_and_distributed_parameters_in_one_step(mesh, directory):
    starts = [whole_numbers(n, 5, seed=n) for n in (7, 1, 4, 6)]
    params = [
        nn.Parameter(distribute_tensor(starts[0], mesh, [Shard(0)])),
        nn.Parameter(starts[1].clone()),
        nn.Parameter(distribute_tensor(starts[2], mesh, [Replicate()])),
        nn.Parameter(distribute_tensor(starts[3], mesh, [Shard(1)])),
    ]
    whole = [nn.Parameter(start.clone()) for start in starts]
    optimizers = [
        AdamW([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}], **HYPER, max_grad_norm=2.0)
        for ps in (params, whole)
    ]
    for step in range(3):
        for i, (param, expected) in enumerate(zip(params, whole, strict=True)):
            expected.grad = whole_numbers(*expected.shape, seed=100 + 10 * step + i)
            param.grad = expected.grad.clone()
            if isinstance(param, DTensor):  # sometimes distributed otherwise than the parameter
                placements = [Shard(0)] if step == 2 else param.placements
                param.grad = distribute_tensor(param.grad, mesh, placements)
        for optimizer in optimizers:
            optimizer.step()
        assert_bitwise_equal(optimizers[0].last_grad_norm, optimizers[1].last_grad_norm)
        assert_same_tensors((full(p.detach()) for p in params), (p.detach() for p in whole))
    params[0].grad = whole_numbers(7, 5)
    with pytest.raises(ValueError, match="is a DTensor and its gradient an ordinary tensor"):
        optimizers[0].step()


# torch.distributed.checkpoint


def states(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def assert_continues_from_checkpoint(mesh, path, dtype=torch.float32, init=True, **arguments):
    options = StateDictOptions(flatten_optimizer_state_dict=path.name == "flat")

    def new(seed):
        model = sharded_model(mesh, dtype, seed)
        return model, AdamW(model.named_parameters(), **HYPER, max_grad_norm=MAX_NORM, **arguments)

    model, optimizer = new(seed=0)
    run(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 2e-3  # as a schedule does
    dcp.save(states(model, optimizer, options), checkpoint_id=path)
    run(model, optimizer, range(3, 6))

    resumed, fresh = new(seed=1)
    if init:
        fresh.init_state()
        assert all(fresh.state[p]["step"] == 0 for p in resumed.parameters())
    loaded = states(resumed, fresh, options)
    dcp.load(loaded, checkpoint_id=path)
    set_model_state_dict(resumed, loaded["model"], options=options)
    set_optimizer_state_dict(resumed, fresh, loaded["optimizer"], options=options)
    assert fresh.param_groups[0]["lr"] == 2e-3
    run(resumed, fresh, range(3, 6))
    assert_same_tensors(local_snapshot(resumed, fresh), local_snapshot(model, optimizer))


@case
def distributed_checkpoint(mesh, directory):
    assert_continues_from_checkpoint(mesh, directory / "nested")


@case
def distributed_checkpoint_in_flat_form(mesh, directory):
    assert_continues_from_checkpoint(mesh, directory / "flat")


@case
def distributed_checkpoint_of_split_precision(mesh, directory):
    assert_continues_from_checkpoint(
        mesh, directory / "split", torch.bfloat16, param_precision="split"
    )


@case
def distributed_checkpoint_without_init_state(mesh, directory):
    # torch then makes the state by a step with lr = 0 and gradients of zeros.
    assert_continues_from_checkpoint(mesh, directory / "lazy", init=False)


@case
def full_state_dict(mesh, directory):
    # As one file holds it: whole tensors on rank 0, which broadcasts them to be sharded again.
    model, resumed = sharded_model(mesh), sharded_model(mesh)
    optimizer, fresh = (AdamW(m.parameters(), **HYPER, max_grad_norm=1.0) for m in (model, resumed))
    run(model, optimizer, range(3))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        entry = state["state"]["2.weight"]
        assert [entry[key].shape for key in entry] == [(), (1, 7), (1, 7)]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(resumed, fresh, state, options=options)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert_bitwise_equal(local(fresh.state[q][key]), local(value), key)


def main(argv: list[str]) -> int:
    directory = Path(argv[0])
    torch.set_num_threads(1)
    # Ranks that wait for one that failed must not wait for gloo's half an hour.
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (2,))
    failed = 0
    for name, function in CASES.items():
        dist.barrier()
        try:
            function(mesh, directory)
        except Exception:
            # The other rank may be waiting for this one: no later case can be trusted.
            print(f"FAILED {name} on rank {dist.get_rank()}\n{traceback.format_exc()}", flush=True)
            failed = 1
            break
        # In one write: the ranks share a pipe.
        print(f"passed {name} on rank {dist.get_rank()}\n", end="", flush=True)
    if not failed:
        dist.destroy_process_group()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
