"""A program of a user, for mypy --strict (`make lint`): every public name, and the types it gives.

It is checked and never run. A line that ends in `type: ignore` is a mistake that must be found.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastlm
from fastlm import kernels


def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = hidden @ weight.T
    loss = fastlm.cross_entropy_loss(logits, targets, label_smoothing=0.1, num_items=8)
    assert_type(loss, Tensor)
    pair = fastlm.cross_entropy_loss(logits, targets, inplace=True, return_lse=True)
    assert_type(pair, tuple[Tensor, Tensor])
    joint = fastlm.linear_cross_entropy_loss(hidden, weight, targets, bias=None, softcap=30.0)
    assert_type(joint, Tensor)
    joint_pair = fastlm.linear_cross_entropy_loss(
        hidden, weight, targets, memory_budget=1 << 30, reduction="none", return_lse=True
    )
    assert_type(joint_pair, tuple[Tensor, Tensor])
    either = fastlm.cross_entropy_loss(logits, targets, return_lse=loss.is_cuda)
    assert_type(either, Tensor | tuple[Tensor, Tensor])
    alone = kernels.cross_entropy_loss(logits, targets, softcap=30.0)
    assert_type(alone, Tensor)
    kernels.cross_entropy_loss(logits, targets, ignoreindex=0)  # type: ignore[call-overload]
    plan = fastlm.linear_cross_entropy_plan(hidden, weight, memory_budget=1 << 30)
    assert_type(plan, fastlm.LinearCrossEntropyPlan)
    assert_type(plan.scratch_bytes, int)
    fastlm.check_labels()
    fastlm.cross_entropy_loss(logits, targets, ignoreindex=0)  # type: ignore[call-overload]
    fastlm.linear_cross_entropy_loss(hidden, targets)  # type: ignore[call-overload]
    return loss + joint


def attention(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    assert_type(fastlm.active_implementation("causal_attention", q.device), str)
    return assert_type(fastlm.causal_attention(q, k, v, rope=rope), Tensor)


def batches(path: Path) -> tuple[Tensor, Tensor]:
    data = fastlm.load_token_dataset(path, dtype="uint16")
    assert_type(data, np.ndarray)
    dataset = fastlm.TokenDataset([data])
    assert_type(len(dataset), int)
    x, _ = fastlm.gather_batch(data, [0, 5], context_len=4)
    assert_type(x, Tensor)
    fastlm.get_batch("train.bin", 4, 8)  # type: ignore[arg-type]
    return assert_type(fastlm.get_batch(data, 4, 8, "cpu"), tuple[Tensor, Tensor])


def models(directory: Path) -> fastlm.TransformerLM:
    config = fastlm.ModelConfig(vocab_size=8, d_model=8, num_heads=2, num_layers=1, max_seq_len=8)
    model = assert_type(fastlm.TransformerLM.from_config(config), fastlm.TransformerLM)
    assert_type(model.config, fastlm.ModelConfig)
    assert_type(model(torch.zeros(1, 4, dtype=torch.long)), Tensor)
    assert_type(model.hidden(torch.zeros(1, 4, dtype=torch.long)), Tensor)
    assert_type(model.lm_head, nn.Linear)
    assert_type(fastlm.count_parameters(model), int)
    return assert_type(fastlm.from_pretrained(directory, max_seq_len=8), fastlm.TransformerLM)


def step(model: nn.Module, loss: Tensor) -> float:
    optimizer = fastlm.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), max_grad_norm=1.0)
    schedule = fastlm.get_cosine_schedule_with_warmup(optimizer, 10, 100)
    torch.autograd.backward(loss)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    assert_type(optimizer.last_grad_norm, Tensor | None)
    assert_type(optimizer.master_weights(), list[Tensor])
    position = optimizer.first_nonfinite()
    if position is not None:
        assert_type(position.name, str | None)
    assert_type(fastlm.cosine_lr_schedule(3, 1e-3, 1e-4, 10, 100), float)
    assert_type(fastlm.wsd_lr_schedule(3, 1e-3, 1e-4, 10, 100), float)
    fastlm.AdamW(model.parameters(), lr="high")  # type: ignore[arg-type]
    return assert_type(fastlm.clip_gradients(model.parameters(), 1.0), float)


def checkpoints(model: nn.Module, optimizer: torch.optim.Optimizer, path: Path) -> int:
    fastlm.save_checkpoint(model, optimizer, 3, path, note="any plain value")
    return assert_type(fastlm.load_checkpoint(model, optimizer, path), int)


def runs(data: np.ndarray[tuple[int], np.dtype[np.uint16]]) -> nn.Module:
    assert_type(fastlm.keep_freed_memory(), bool)
    assert_type(fastlm.select_device("auto"), torch.device)
    fastlm.set_seed(0)
    cfg = fastlm.TrainingConfig(total_steps=10, optimizer="muon", target_dir="run")
    fastlm.TrainingConfig(optimizer="sgd")  # type: ignore[arg-type]
    model, optimizer, begin = fastlm.create_model_and_optimizer(cfg)
    assert_type((model, optimizer, begin), tuple[fastlm.TransformerLM, fastlm.AdamW, int])
    assert_type(fastlm.evaluate_model_loss(model, data, cfg), float)
    assert_type(fastlm.validate(model, data, batch_size=2, context_length=4), float)
    plotter = fastlm.LivePlotter()
    plotter.log_train(1, 2.5, lr=1e-3)
    plotter.log_eval(1, 2.5)
    plotter.save("loss.png")
    fastlm.plot_lr_schedule(1e-3, 1e-4, 10, 100).savefig("lr.png")
    fastlm.trian_loop  # type: ignore[attr-defined]  # noqa: B018
    return assert_type(fastlm.train_loop(data, {"held-out": data}, cfg, model=model), nn.Module)


def the_users_mistake(error: Exception) -> type[fastlm.UserError] | None:
    known: tuple[type[fastlm.UserError], ...] = (
        fastlm.CheckpointError,
        fastlm.CompileError,
        fastlm.ConfigError,
        fastlm.DataError,
        fastlm.DeviceError,
        fastlm.DivergedError,
        fastlm.ExtensionError,
        fastlm.OutputError,
    )
    return next((kind for kind in known if isinstance(error, kind)), None)
