"""Learning-rate schedules: pure functions of the step, and the LambdaLR twin of the cosine.

`cfg` is a TrainingConfig, or anything with its settings of the schedule.
"""

import math
from types import SimpleNamespace
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR


def cosine_lr_schedule(
    t: int, lr_max: float, lr_min: float, warmup_iters: int, cosine_iters: int
) -> float:
    """Linear warm-up from 0 at t = 0, cosine to `lr_min` at t = `cosine_iters`, then constant.

    lr_min + (lr_max - lr_min) * (1 + cos(pi * progress)) / 2, with progress from 0 to 1 between
    the two (Loshchilov & Hutter, arXiv:1608.03983, one cycle); t counts steps.
    """
    if t < warmup_iters:
        return lr_max * t / warmup_iters
    if t >= cosine_iters:
        return lr_min
    progress = (t - warmup_iters) / (cosine_iters - warmup_iters)
    return lr_min + (lr_max - lr_min) * 0.5 * (1.0 + math.cos(math.pi * progress))


def wsd_lr_schedule(
    t: int,
    lr_max: float,
    lr_min: float,
    warmup_iters: int,
    total_iters: int,
    decay_fraction: float = 0.2,
) -> float:
    """Warm-up, stable, decay: linear from 0, constant, then linear to `lr_min` at `total_iters`.

    The decay takes the last `decay_fraction` of `total_iters` (MiniCPM, arXiv:2404.06395 §4; linear
    decay over a fifth: Hägele et al., arXiv:2405.18392).
    """
    if t < warmup_iters:
        return lr_max * t / warmup_iters
    if t >= total_iters:
        return lr_min
    decay_start = wsd_decay_start(warmup_iters, total_iters, decay_fraction)
    if t < decay_start:
        return lr_max
    progress = (t - decay_start) / (total_iters - decay_start)
    return lr_max + (lr_min - lr_max) * progress


def wsd_decay_start(warmup_iters: int, total_iters: int, decay_fraction: float = 0.2) -> float:
    """The step at which wsd_lr_schedule begins to decay."""
    return max(warmup_iters, total_iters * (1 - decay_fraction))


def learning_rate(step: int, cfg: Any) -> float:
    """The rate of a step under cfg.schedule."""
    if cfg.schedule == "wsd":
        return wsd_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.total_steps)
    return cosine_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.cosine_iters)


def rate_jump(step: int, stored: Any, cfg: Any) -> str | None:
    """One line if a run that goes on at `step` has a far higher rate than the step before had.

    stored: the settings in the checkpoint, a dict. So it is where a run that has decayed is made
    longer: what the decay has gained is lost again. A wsd run is meant to be extended from a
    checkpoint before its decay (Hägele et al., arXiv:2405.18392).
    """
    names = ("schedule", "lr_max", "lr_min", "warmup_iters", "total_steps", "cosine_iters")
    if not isinstance(stored, dict) or any(stored.get(name) is None for name in names):
        return None  # of another program: nothing is known of its rates
    before = SimpleNamespace(**{name: stored[name] for name in names})
    if step <= max(before.warmup_iters, cfg.warmup_iters):
        return None  # warming up, the rate rises by itself
    was, becomes = learning_rate(step - 1, before), learning_rate(step, cfg)
    if becomes <= 1.5 * was:
        if getattr(cfg, "optimizer", "adamw") != "muon" or "muon_lr" not in stored:
            return None
        was *= stored["muon_lr"] / before.lr_max
        becomes *= cfg.muon_lr / cfg.lr_max
        if becomes <= 1.5 * was:
            return None
        return (
            f"note: Muon's learning rate goes up from {was:.2e} to {becomes:.2e} at step {step}: "
            f"it is the learning rate * muon_lr / lr_max"
        )
    line = f"note: the learning rate goes up from {was:.2e} to {becomes:.2e} at step {step}"
    if before.schedule != "wsd" or cfg.schedule != "wsd":
        return f"{line}: it has decayed by another schedule than this one"
    decay_start = int(wsd_decay_start(before.warmup_iters, before.total_steps))
    return (
        f"{line}: its decay for {before.total_steps} steps began at step {decay_start}; a wsd run "
        f"is extended better from a checkpoint before that"
    )


def get_cosine_schedule_with_warmup(
    optimizer: torch.optim.Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_lr_ratio: float = 0.1,
) -> LambdaLR:
    """cosine_lr_schedule as a LambdaLR: factors of the optimizer's own lr.

    `min_lr_ratio` is clamped to [0, 1]. After `num_training_steps` the rate stays at its minimum.
    """
    min_lr_ratio = min(1.0, max(0.0, min_lr_ratio))

    def factor(step: int) -> float:
        return cosine_lr_schedule(step, 1.0, min_lr_ratio, num_warmup_steps, num_training_steps)

    return LambdaLR(optimizer, factor)
