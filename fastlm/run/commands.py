"""The commands that a run prints: each works when it is pasted into a shell."""

import os
import shlex
from pathlib import Path

from fastlm.checkpoint import list_checkpoints
from fastlm.config import TrainingConfig
from fastlm.parallel.world import ALONE, World


def resume_flags(cfg: TrainingConfig) -> str:
    """The flags of fastlm.train that find the newest checkpoint of cfg's run.

    The checkpoint brings the settings back, but not where files go and on what device it runs.
    """
    flags: dict[str, str | None] = {"resume": cfg.target_dir}
    if not _same(cfg.ckpt_dir, cfg.target_dir, "checkpoints"):
        flags = {"resume": None, "target-dir": cfg.target_dir, "ckpt-dir": cfg.ckpt_dir}
    if not _same(cfg.log_dir, cfg.target_dir, "logs"):
        flags["log-dir"] = cfg.log_dir
    prefixes = {file.prefix for file in list_checkpoints(cfg.ckpt_dir)}
    if prefixes - {TrainingConfig.ckpt_save_prefix}:
        flags["ckpt-save-prefix"] = cfg.ckpt_save_prefix
    if cfg.device != TrainingConfig.device:
        flags["device"] = cfg.device
    return " ".join(_flag(name, value) for name, value in flags.items())


def resume_command(cfg: TrainingConfig, world: World = ALONE) -> str:
    """The command that goes on with cfg's run, from the directory in which it ran, by as many
    processes. Where several machines find each other, only their users know."""
    start = "python"
    if world.size > 1:
        machines = world.size // world.local_size
        across = f"--nnodes {machines} … " if machines > 1 else ""
        start = f"torchrun {across}--nproc-per-node {world.local_size}"
    return f"{start} -m fastlm.train {resume_flags(cfg)}"


def generate_command(checkpoint: Path, cfg: TrainingConfig, *, tokenizer: bool) -> str:
    """The command that samples from `checkpoint`; without a tokenizer a prompt is token ids."""
    flags = [_flag("ckpt", str(checkpoint)), '--prompt "..."' if tokenizer else "--prompt 0"]
    if cfg.device != TrainingConfig.device:
        flags.append(_flag("device", cfg.device))
    return f"python -m fastlm.generate {' '.join(flags)}"


def _same(path: str | None, target_dir: str, name: str) -> bool:
    return path == os.path.join(target_dir, name)


def _flag(name: str, value: str | None) -> str:
    if value is None:
        return f"--{name}"
    # Behind a space, a value that begins with a dash would be another flag.
    return f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"
