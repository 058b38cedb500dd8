"""A whole training step: batch, forward, backward, clipping, update.

Models: that of the notebook's worked example (6 layers, D 512, V 10000, 16 x 256 tokens), that of
the default run, the preset "demo" (4 layers, D 128, V 4096, 8 x 256 tokens), and GPT-2's size (on
a CPU 4 x 1024 tokens, and with --slow only: half a minute a round). The notebook's loop and the
composition (peer_model.py) train the same model as ours; nanoGPT trains its own, of the same
layers, width and heads.
"""

import copy
import itertools

import nanogpt_peer
import numpy as np
import peers
import pytest
import torch
from harness import TINY, Candidate, Work, compare
from peer_model import PeerLM, PeerStep, decay_groups
from step_profile import split_of_step

from fastlm import TrainingConfig, create_model_and_optimizer
from fastlm.data.loader import TrainLoader
from fastlm.hardware import back_heap_with_huge_pages, select_dtype
from fastlm.model import training_flops_per_token
from fastlm.model_loss import ModelLoss
from fastlm.presets import PRESETS
from fastlm.step import TrainStep

LR = 1e-4
COMPOSITION = "torch.compile, SDPA, fused AdamW"  # report.py has these names, too
NANOGPT = "nanoGPT's model, compiled, fused AdamW"


@pytest.mark.parametrize(
    "preset, vocab_size", [("notebook", 10000), ("demo", 4096), ("gpt2-124m", 50304)]
)
def bench_train_step(benchmark, device, allocator, request, preset, vocab_size):
    is_slow = preset == "gpt2-124m" and device.type == "cpu"
    if is_slow and not request.config.getoption("--slow"):
        pytest.skip("half a minute a round on a CPU: --slow")
    torch.compiler.reset()
    settings = {**PRESETS[preset], "vocab_size": vocab_size, "grad_accum": 1}
    settings |= {"optimizer": "adamw", "qk_norm": False}  # the mathematics of the others
    if is_slow:
        settings["batch_size"] = 4
    if TINY:
        settings |= {"batch_size": 2, "context_len": 32, "d_model": 32, "num_layers": 1}
        settings |= {"num_heads": 2}
    cfg = TrainingConfig(**settings, device=device.type, compile=True)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 1_000_000, dtype=np.uint16)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(tokens, cfg.batch_size, cfg.context_len, seed=0, device=device)
    step = TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)
    dtype = select_dtype(cfg.dtype, device)

    composition = PeerLM(model)
    x, y = loader.batch(0)
    expected = peers.notebook_cross_entropy(model(x), y).detach()
    torch.testing.assert_close(composition(x, y).detach(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(step.run(0, lr=0.0), expected, rtol=1e-3, atol=0)
    rivals = {
        COMPOSITION: on_batches(
            PeerStep(composition, decay_groups(composition, cfg.weight_decay), dtype), tokens, cfg
        )
    }
    if folder := nanogpt_peer.nanogpt_folder():
        theirs = nanogpt_peer.nanogpt_step(nanogpt_peer.nanogpt_model(folder, cfg), dtype)
        rivals[NANOGPT] = on_batches(theirs, tokens, cfg)
    if preset == "notebook":
        rivals["notebook's loop: eager fp32"] = notebook_step(copy.deepcopy(model), tokens, cfg)
    if allocator == "kept":  # as the trainer does, here for all alike, once the heap has grown
        for rival in rivals.values():
            rival.run()
        back_heap_with_huge_pages()

    samples = itertools.count(step.samples, step.samples)  # those that the thread reads ahead

    def run() -> torch.Tensor:
        return step.run(next(samples), lr=LR)

    a_step = cfg.batch_size * cfg.context_len
    comparison = compare(
        benchmark,
        "train_step",
        f"{preset}: {cfg.num_layers} layers, D {cfg.d_model}, V {vocab_size}, "
        f"{cfg.batch_size} x {cfg.context_len} tokens",
        device,
        Candidate(run),
        rivals,
        Work(
            f"{a_step} tokens, 6 * matmul weights + 6 * layers * T * D each",
            flops=a_step * training_flops_per_token(model, cfg.context_len),
            dtype=dtype,
        ),
        seconds=6,
        least_rounds=1 if is_slow else 3,
        note=str(dtype).removeprefix("torch.") + (f"; {nanogpt_peer.ABSENT}" if not folder else ""),
    )
    if device.type == "cpu":
        data = step.step_loader  # what the step waits for; another thread reads
        data.batches = torch.profiler.record_function("data")(data.batches)
        comparison.split_ms = split_of_step(run, steps=1 if is_slow else 3)


def on_batches(step: PeerStep, tokens: np.ndarray, cfg: TrainingConfig) -> Candidate:
    """`step` on batches made as nanoGPT makes them."""

    def run() -> None:
        x, y = peers.nanogpt_batch(tokens, cfg.batch_size, cfg.context_len, cfg.device)
        step.run(x, y, LR)

    return Candidate(run)


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
