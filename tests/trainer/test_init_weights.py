"""init_weights: the same weights for a seed, made at once, behind the meta device, or in shards."""

import json
import math
import socket

import pytest
import torch
from command_server import commands
from sharded_init import SIZES
from torch import nn
from training_runs import same

from fastlm import TransformerLM, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict()) | dict(model.named_buffers())


def made(tied: bool = False, seed: int = 3, **options) -> TransformerLM:
    torch.manual_seed(seed)
    return TransformerLM(**SIZES, tie_embeddings=tied, **options)


def unmade(tied: bool = False) -> TransformerLM:
    """With memory, filled with what no weight is."""
    with torch.device("meta"):
        model = TransformerLM(**SIZES, tie_embeddings=tied)
    assert all(tensor.is_meta for tensor in everything(model).values())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in everything(model).values():
            tensor.fill_(math.nan)
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_behind_the_meta_device_they_are_those_of_construction(tied):
    expected = made(tied)
    state = torch.get_rng_state()
    model = unmade(tied)
    assert torch.equal(torch.get_rng_state(), state)  # the meta device draws nothing
    assert (model.lm_head.weight is model.token_embeddings.weight) == tied
    torch.manual_seed(3)
    model.init_weights()
    assert same(everything(model), everything(expected))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    other = made(tied, seed=4)
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_each_weight_has_its_deviation():
    torch.manual_seed(0)
    D, F, V, L = 64, 192, 500, 8
    model = TransformerLM(V, D, 2, L, 16, F)
    deviation = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    glorot = math.sqrt(2 / (D + D))
    for layer in range(L):
        name = f"layers.{layer}."
        assert deviation[f"{name}attn.q_proj.weight"] == pytest.approx(glorot, rel=0.1)
        residual = deviation[f"{name}attn.output_proj.weight"]
        assert residual == pytest.approx(glorot / math.sqrt(2 * L), rel=0.1)
        residual = deviation[f"{name}ffn.w2.weight"]
        assert residual == pytest.approx(math.sqrt(2 / (D + F) / (2 * L)), rel=0.1)
        assert torch.equal(model.layers[layer].ln1.weight, torch.ones(D))
    assert deviation["token_embeddings.weight"] == pytest.approx(1.0, rel=0.1)
    assert deviation["lm_head.weight"] == pytest.approx(math.sqrt(2 / (D + V)), rel=0.1)
    tied = TransformerLM(V, D, 2, L, 16, F, tie_embeddings=True)
    assert tied.lm_head.weight.std().item() == pytest.approx(1 / math.sqrt(D), rel=0.1)


def test_a_checkpoint_needs_the_rotary_tables_only(tmp_path):
    """And no random number is drawn."""
    expected = made()
    save_checkpoint(expected, None, 5, tmp_path / "a.pt")
    model, state = unmade(), torch.get_rng_state()
    model.init_rope()
    assert torch.equal(torch.get_rng_state(), state)
    assert load_checkpoint(model, None, tmp_path / "a.pt") == 5
    assert same(everything(model), everything(expected))


def test_moving_a_model_keeps_its_matrices_tied():
    model = made(tied=True)
    model.to(torch.bfloat16)
    assert model.lm_head.weight is model.token_embeddings.weight
    model.lm_head = nn.Linear(10, 61, bias=False)  # untied by its owner, it stays so
    model.to(torch.float32)
    assert model.lm_head.weight is not model.token_embeddings.weight


def test_a_default_dtype_is_that_of_the_weights():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = made()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.rope_cos.dtype == torch.float32


# --- sharded ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shards_are_those_of_the_whole(tmp_path, world, tied):
    expected, out = made(tied), tmp_path / "whole.pt"
    ranks = [
        commands().start(
            [str(out), str(tied)], tmp_path, call="sharded_init:main",
            env=dict(
                RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
        )
        for port in [free_port()]
        for rank in range(world)
    ]  # fmt: skip
    for rank in ranks:
        result = rank.wait()
        assert result.returncode == 0, result.output
    assert same(torch.load(out), everything(expected))
    total = sum(p.numel() for p in expected.parameters())
    fair = sum(-(-len(p) // world) * p.numel() // len(p) for p in expected.parameters())
    largest = max(p.numel() for p in expected.parameters())
    rows = [json.loads((tmp_path / f"whole.pt.{rank}.json").read_text()) for rank in range(world)]
    expected(torch.arange(7)[None]).square().mean().backward()
    norm = sum(p.grad.square().sum() for p in expected.parameters())
    assert sum(held for held, *_ in rows) == total
    for held, drawn, is_tied, trained in rows:
        assert held <= fair and drawn == largest and is_tied == tied
        assert trained == pytest.approx(float(norm), rel=1e-5)
