"""A whole training step: batch, forward, backward, clipping, update.

Models: that of the notebook's worked example (6 layers, D 512, V 10000, 16 x 256 tokens), that of
the default run, the preset "demo" (4 layers, D 256, V 4096, 8 x 256 tokens), on a GPU GPT-2's too.
All candidates train this package's model: what differs is what is around it. The peers' loop is
nanoGPT's (loss in the compiled graph, clip_grad_norm_, AdamW), not its model.
"""

import copy

import numpy as np
import peers
import pytest
import torch
import torch.nn.functional as F
from harness import Candidate, Work, compare
from torch.nn.utils import clip_grad_norm_

from fastlm import TrainingConfig, create_model_and_optimizer
from fastlm.data.loader import TrainLoader
from fastlm.hardware import back_heap_with_huge_pages, select_dtype
from fastlm.model import training_flops_per_token
from fastlm.model_loss import ModelLoss
from fastlm.presets import PRESETS
from fastlm.step import TrainStep

LR = 1e-4


@pytest.mark.parametrize(
    "preset, vocab_size", [("notebook", 10000), ("demo", 4096), ("gpt2-124m", 50304)]
)
def bench_train_step(benchmark, device, allocator, preset, vocab_size):
    if preset == "gpt2-124m" and device.type == "cpu":
        pytest.skip("minutes a step on a CPU")
    torch.compiler.reset()
    settings = {**PRESETS[preset], "vocab_size": vocab_size, "grad_accum": 1}
    settings |= {"optimizer": "adamw", "qk_norm": False}  # the mathematics of the others
    cfg = TrainingConfig(**settings, device=device.type, compile=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1_000_000, dtype=np.uint16)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(tokens, cfg.batch_size, cfg.context_len, seed=0, device=device)
    step = TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)
    dtype = select_dtype(cfg.dtype, device)
    rivals = {
        "notebook's loop: eager fp32": notebook_step(copy.deepcopy(model), tokens, cfg),
        "torch.compile, fp32": compiled_step(copy.deepcopy(model), tokens, cfg, torch.float32),
        "torch.compile, fused AdamW, same dtype": compiled_step(
            copy.deepcopy(model), tokens, cfg, dtype, fused=True
        ),
    }

    x, y = loader.batch(0)
    expected = peers.notebook_cross_entropy(model(x), y).detach()
    torch.testing.assert_close(step.run(0, lr=0.0), expected, rtol=1e-3, atol=0)
    if allocator == "kept":  # as the trainer does, here for all alike, once the heap has grown
        for rival in rivals.values():
            rival.run()
        back_heap_with_huge_pages()

    a_step = cfg.batch_size * cfg.context_len
    compare(
        benchmark,
        "train_step",
        f"{preset}: {cfg.num_layers} layers, D {cfg.d_model}, V {vocab_size}, "
        f"{cfg.batch_size} x {cfg.context_len} tokens",
        device,
        Candidate(lambda: step.run(1, lr=LR)),
        rivals,
        Work(
            f"{a_step} tokens, 6 * matmul weights + 6 * layers * T * D each",
            flops=a_step * training_flops_per_token(model, cfg.context_len),
            dtype=dtype,
        ),
        seconds=10,
        least_rounds=3,
        note=str(dtype).removeprefix("torch."),
    )


def notebook_step(model, tokens: np.ndarray, cfg: TrainingConfig) -> Candidate:
    parameters = list(model.parameters())
    optimizer = peers.NotebookAdamW(parameters, lr=LR, weight_decay=cfg.weight_decay)

    def run() -> None:
        x, y = peers.notebook_batch(tokens, cfg.batch_size, cfg.context_len, cfg.device)
        loss = peers.notebook_cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        peers.notebook_clip(parameters, cfg.grad_clip_norm)
        optimizer.step()

    return Candidate(run)


def compiled_step(
    model, tokens: np.ndarray, cfg: TrainingConfig, dtype: torch.dtype, *, fused: bool | None = None
) -> Candidate:
    """nanoGPT's loop, with its options for speed or without."""

    @torch.compile
    def compiled_loss(x, y):
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, weight_decay=cfg.weight_decay, fused=fused
    )

    def run() -> None:
        x, y = peers.nanogpt_batch(tokens, cfg.batch_size, cfg.context_len, cfg.device)
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = compiled_loss(x, y)
        loss.backward()
        clip_grad_norm_(model.parameters(), cfg.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Candidate(run)
