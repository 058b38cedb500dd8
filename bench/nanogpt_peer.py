"""nanoGPT's own model, as a peer. No code of it is here: NANOGPT names a checkout of it, else it is
looked for in nanoGPT/ beside the repository."""

import contextlib
import importlib.util
import io
import os
import sys
from pathlib import Path

import torch
from peer_model import PeerStep, decay_groups
from torch import nn

from fastlm import TrainingConfig

ABSENT = "nanoGPT is left out: no checkout; NANOGPT=DIR names one"


def nanogpt_folder() -> Path | None:
    """The folder with its model.py; None if there is none."""
    beside = Path(__file__).resolve().parents[2] / "nanoGPT"
    folder = Path(os.environ.get("NANOGPT") or beside)
    return folder if (folder / "model.py").is_file() else None


def nanogpt_model(folder: Path, cfg: TrainingConfig) -> nn.Module:
    """Its GPT of cfg's layers, heads, width, vocabulary and context, without biases: (x, y) to
    (logits, loss)."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    sizes = module.GPTConfig(
        block_size=cfg.context_len,
        vocab_size=cfg.vocab_size,
        n_layer=cfg.num_layers,
        n_head=cfg.num_heads,
        n_embd=cfg.d_model,
        bias=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it says its size
        return module.GPT(sizes).to(cfg.device)


def nanogpt_step(model: nn.Module, dtype: torch.dtype, **options) -> PeerStep:
    """Its loop's step. Its train.py takes neither autocast nor the fused AdamW on a CPU; here it
    has both."""
    return PeerStep(model, decay_groups(model, weight_decay=0.1), dtype, **options)
