"""DDP and FSDP2 around model and loss: the sums are those of one process (wrap_programs.py)."""

import pytest
import torch
import wrap_programs
from ranks import run_ranks
from torch import nn

from fastlm.errors import ConfigError
from fastlm.model_interface import blocks_of
from fastlm.parallel.world import World
from fastlm.parallel.wrap import micro_step, wrap


def outputs(program, size, tmp_path, *argv, timeout=60):
    """What each rank of wrap_programs.{program} prints; all must end well."""
    call = f"wrap_programs:{program}"
    results = run_ranks(size, list(argv), tmp_path, call=call, timeout=timeout)
    assert [r.returncode for r in results] == [0] * size, "\n".join(r.output for r in results)
    return [r.stdout for r in results]


@pytest.mark.parametrize("size", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_gradients_norms_and_weights_are_those_of_one_process(size, tmp_path):
    for output in outputs("sums", size, tmp_path):
        assert output.splitlines() == [
            f"passed {name}"
            for name in ("ddp 1", "ddp 3", "fsdp 1", "fsdp 3", "fsdp kept", "tied", "meta")
        ]


def test_blocks_compiled_in_place(tmp_path):
    for output in outputs("compiled", 2, tmp_path, "eager"):
        assert output.splitlines() == ["passed ddp", "passed fsdp"]


@pytest.mark.exhaustive
def test_blocks_compiled_in_place_by_inductor(tmp_path):
    for output in outputs("compiled", 2, tmp_path, "inductor", timeout=300):
        assert output.splitlines() == ["passed ddp", "passed fsdp"]


def test_what_a_step_communicates(tmp_path):
    """Two blocks and the rest, three micro-batches. Kept, each is gathered once. Else a block is
    gathered in each forward and backward, and the rest once. Either way each is reduced once; the
    one all_reduce is the loss's."""
    for output in outputs("communication", 2, tmp_path):
        reduced = "('_reduce_scatter_base_', 3), ('allreduce_', 1)]"
        assert output.splitlines() == [
            "ddp: [('allreduce_', 2)]",
            f"reshard=False: [('_allgather_base_', 3), {reduced}",
            f"reshard=True: [('_allgather_base_', {2 * 3 * 2 + 1}), {reduced}",
        ]


def test_bfloat16(tmp_path):
    outputs("mixed", 2, tmp_path)


def test_parameters_without_gradients(tmp_path):
    outputs("unused", 2, tmp_path)


def test_float16_has_no_fsdp(tmp_path):
    for output in outputs("refusals", 2, tmp_path):
        assert output == "--parallel fsdp trains in bfloat16 or float32, not float16\n"


def test_a_world_of_one_wraps_nothing():
    loss, world = wrap_programs.Loss(), World({})
    for parallel in ("ddp", "fsdp"):
        assert wrap(loss, world, parallel=parallel) is loss
    with micro_step(loss, last=False):
        pass
    with pytest.raises(ConfigError, match="not float16"):
        wrap(loss, world, parallel="fsdp", dtype=torch.float16)


def test_blocks_are_those_of_the_outermost_lists():
    model = wrap_programs.Loss().model
    assert blocks_of(model) == list(model.layers)
    inner = [nn.Linear(2, 2) for _ in range(4)]
    experts = nn.Module()
    experts.list = nn.ModuleList(inner[:2])
    assert blocks_of(nn.Sequential(nn.ModuleList([experts, inner[2]]), inner[3])) == [
        experts,
        inner[2],
    ]
    stages = nn.ModuleList([nn.ModuleList(inner[:2]), nn.ModuleList(inner[2:])])
    assert blocks_of(nn.Sequential(stages)) == inner
    assert blocks_of(nn.Linear(2, 2)) == []
