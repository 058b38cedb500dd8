"""A TransformerLM from what is on the disk: a checkpoint, a run, or a directory of transformers."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastlm.checkpoint import newest_readable, read_checkpoint, restore_model
from fastlm.errors import CheckpointError
from fastlm.huggingface import is_model_directory, sliding_window
from fastlm.model import TransformerLM
from fastlm.model_config import ModelConfig
from fastlm.model_interface import check_model_class
from fastlm.parallel.commit import is_sharded


def from_pretrained(
    path: str | os.PathLike,
    *,
    max_seq_len: int | None = None,
    device: torch.device | str = "cpu",
) -> TransformerLM:
    """The model in a directory of transformers: config.json and safetensors, one file or several.

    Llama 2 and 3, SmolLM2, Mistral, Qwen 2.5 and Qwen 3; its logits are transformers' own but for
    rounding. fp32 whatever the files hold, and in eval mode. Also takes a checkpoint of
    fastlm.train, or a run's directory. Nothing is downloaded.

    max_seq_len: the longest window that it shall take. Default: what config.json says, or as far
    as a sliding window of attention makes no difference, which a warning tells.
    Raises CheckpointError, naming the file and the setting, for what is missing, damaged or has no
    place in a TransformerLM: other model types, other RoPE scalings, biases elsewhere, windows
    shorter than max_seq_len, quantized weights.
    """
    return load_model(path, device, max_seq_len=max_seq_len)[0]


def load_model(
    ckpt: str | os.PathLike, device: torch.device | str, *, max_seq_len: int | None = None
) -> tuple[TransformerLM, dict[str, Any]]:
    """(model in eval mode, checkpoint content): what from_pretrained takes."""
    path = Path(ckpt)
    if path.is_dir() and not is_sharded(path) and not is_model_directory(path):
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        path, payload = newest_readable(directory)
    else:
        payload = read_checkpoint(path)
    check_model_class(payload, path)
    config = payload.get("config")
    needed = {"vocab_size", "d_model", "num_heads", "num_layers", "d_ff", "rope_theta"}
    needed |= {"context_len", "tie_embeddings"}
    if not isinstance(config, dict) or not needed <= config.keys():  # nanoGPT's has other names
        raise CheckpointError(f"{path}: holds no model config; it was not written by fastlm.train")
    architecture = replace(
        ModelConfig.of_settings(config), dropout=0.0, activation_checkpointing=False
    )
    longest = architecture.max_seq_len if max_seq_len is None else max_seq_len
    window = sliding_window(payload.get("huggingface_config", {}))
    if max_seq_len is None and window is not None and window < longest:
        warnings.warn(
            f"{path}: sliding_window={window}: windows of attention are not supported; max_seq_len "
            f"is {window}, up to which they make no difference, and not {longest}",
            stacklevel=3,
        )
        longest = window
    check_window(payload, path, longest)
    with torch.device("meta"):
        model = TransformerLM.from_config(replace(architecture, max_seq_len=longest))
    model.to_empty(device=device)
    model.init_rope()
    restore_model(model, payload)
    if config.get("doc_mask"):
        model.document_end = payload.get("end_of_text")
    return model.eval(), payload


def check_window(payload: dict[str, Any], path: str | os.PathLike, max_seq_len: int) -> None:
    """Raises CheckpointError if a directory of transformers has shorter windows of attention."""
    window = sliding_window(payload.get("huggingface_config", {}))
    if window is not None and window < max_seq_len:
        raise CheckpointError(
            f"{path}: sliding_window={window}: windows of attention are not supported, and make "
            f"no difference only up to a context of {window}, not {max_seq_len}"
        )
