"""Runs that are the same under any number of ranks, for sharded_cases.py: all have one batch."""

from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import make_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastlm import AdamW, load_checkpoint
from fastlm.checkpoint import checkpoint_payload, read_values
from fastlm.parallel.sharded import write_sharded

STEPS = range(3)
MORE_STEPS = range(3, 6)

VARIANTS = {
    "plain": {},
    "tied": dict(tie_embeddings=True, value_residual=True, embedding_residual=True),
    "split": dict(dtype=torch.bfloat16),  # with its remainders in int16
    "uneven": None,  # shards of one row and of none
}


def make(variant: str, seed: int, *, fsdp: bool):
    settings = VARIANTS[variant]
    if settings is None:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(11, 5), nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        blocks = [model[1], model[3]]
    else:
        dtype = settings.get("dtype", torch.float32)
        others = {key: value for key, value in settings.items() if key != "dtype"}
        model = make_model(seed, d_model=16, d_ff=48, **others).to(dtype)
        blocks = list(model.layers)
    if fsdp:
        for module in (*blocks, model):
            fully_shard(module)
    groups = [
        [p for p in model.parameters() if (p.dim() >= 2) == matrix] for matrix in (True, False)
    ]
    precision = "split" if variant == "split" else "native"
    optimizer = AdamW(
        [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1]}],
        lr=1e-2, max_grad_norm=1.0, param_precision=precision,
    )  # fmt: skip
    return model, optimizer


def run(model, optimizer, steps) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(11, (2, 8), generator=torch.Generator().manual_seed(step))
        loss = (model(ids).float() - 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def values(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor, whole."""
    state = optimizer.state_dict()["state"]
    tensors = dict(model.state_dict())
    tensors |= {f"{i}.{key}": t for i, entry in state.items() for key, t in entry.items()}
    return {name: whole(tensor.detach()) for name, tensor in tensors.items()}


def whole(tensor):
    if not isinstance(tensor, DTensor):
        return tensor.clone()
    if tensor.dtype == torch.int16:  # which gloo does not gather
        local = tensor.to_local().int()
        tensor = DTensor.from_local(
            local, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
        return tensor.full_tensor().short()
    return tensor.full_tensor()


def extra() -> dict:
    """What a run stores besides."""
    return dict(
        guard={"norms": torch.arange(128.0), "counts": torch.tensor([3, 0, 1])},
        config={"betas": (0.9, 0.95), "lr_max": 1e-3, "ckpt_dir": None, "compile": False},
        run_id="r", saved_at=1.5, samples_seen=2**60, best_checkpoint={"val_loss": float("inf")},
        tokenizer='{"é": "\\ud800"}', random_state={"torch": torch.arange(999).to(torch.uint8)},
    )  # fmt: skip


def save(variant: str, path: Path, group) -> None:
    model, optimizer = make(variant, 0, fsdp=True)
    run(model, optimizer, STEPS)
    payload = checkpoint_payload(model, optimizer, 3, **extra())
    write_sharded(payload, path, group=group, read_back=True)
    expected = values(model, optimizer)
    losses = run(model, optimizer, MORE_STEPS)
    if dist.get_rank() == 0:
        torch.save((expected, losses, extra()), path.with_suffix(".expected"))
    dist.barrier(group)


def assert_continues(variant: str, path: Path, expected: Path, group, *, fsdp: bool) -> None:
    """What is loaded from `path` is what was saved, and goes on as the run that saved it."""
    tensors, losses, stored = torch.load(expected)
    model, optimizer = make(variant, 1, fsdp=fsdp)
    header = read_values(path, group=group)
    assert header["iteration"] == 3
    assert all(t.is_meta for t in header["model_state"].values())
    for key, value in stored.items():
        assert_equal(header[key], value)
    assert load_checkpoint(model, optimizer, path, group=group) == 3
    loaded = values(model, optimizer)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_equal(loaded[name], tensor, name)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    # The mean of three equal bf16 gradients is rounded.
    rtol = 1e-3 if variant == "split" else 1e-5
    torch.testing.assert_close(run(model, optimizer, MORE_STEPS), losses, rtol=rtol, atol=0)


def assert_equal(actual, expected, what="") -> None:
    assert type(actual) is type(expected), what
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys(), what
        for key, value in expected.items():
            assert_equal(actual[key], value, f"{what}.{key}")
    elif isinstance(actual, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected), what
    else:
        assert actual == expected, what
