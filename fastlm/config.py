"""TrainingConfig: every setting of a run, for Python, TOML files and the command line alike.

The comment behind a field is its help text (`python -m fastlm.train --help`).
"""

import math
import os
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_origin

import numpy as np

from fastlm.errors import ConfigError, shown
from fastlm.model_config import ModelConfig, default_d_ff
from fastlm.run.profiler import parse_span

# Integers lie below 2 to these powers, so that no tensor's size overflows 64 bits and building the
# layers does not take for ever before memory runs out.
_POWERS = {"seed": 64, "num_layers": 14, "num_heads": 24, "d_model": 24, "d_ff": 24}
_POWERS |= {"context_len": 31, "vocab_size": 31, "num_kv_heads": 24, "head_dim": 24}
_STEP_TOKENS_POWER = 56
TRACKERS = ("tensorboard", "wandb", "trackio", "csv")


@dataclass
class TrainingConfig:
    """Every setting of a run. Raises ConfigError, naming the setting, for an invalid one.

    d_ff, cosine_iters, ckpt_dir and log_dir follow others where they are None, and are filled in.
    dataclasses.replace keeps what was filled in: give it None for what should follow again.
    """

    # === Data / batching ===
    data: tuple[str, ...] = ()
    """A prepared directory (python -m fastlm.prepare), or token files (.bin, .npy). A mixture:
    PATH:WEIGHT for each. Default: the Python standard library's own source."""
    val_data: tuple[str, ...] = ()
    """Validation token files; several sets, each logged: NAME=PATH each. Default: the manifest's,
    else the end of the training tokens."""
    data_dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Dtype of raw token files, which do not say (default uint16, for .bin alone)."""
    batch_size: int = 32
    """Windows in a (micro-)batch."""
    context_len: int = 256
    """Tokens in a window."""
    grad_accum: int = 1
    """Micro-batches of each process in a step."""
    tokens_per_step: int | None = None
    """Tokens in a step, on all processes together: sets grad_accum."""
    prefetch: bool = True
    """Read the next step's batches while a step runs."""
    doc_mask: bool = False
    """Attention restarts at each document: no token sees the documents before its own in a window.
    By PyTorch's attention with a mask, which takes more time and memory."""
    vocab_size: int = 10000
    """Token ids lie below it. Taken from the data's manifest if there is one."""

    # === Model architecture ===
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads; without head_dim, d_model must be divisible by it."""
    num_kv_heads: int | None = None
    """Heads of keys and values, which num_heads / num_kv_heads heads share. Default: num_heads."""
    head_dim: int | None = None
    """Width of a head, even. Default: d_model / num_heads."""
    d_model: int = 1024
    """Width of the residual stream."""
    d_ff: int | None = None
    """Width of the feed-forward layer. Default: 8/3 of d_model, rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary positions' wavelengths."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3's scaling of the rotary positions: factor, low_freq_factor, high_freq_factor, and the
    context_len before it."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Biases of the projections to queries, keys and values."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the output head."""
    dropout: float = 0.0
    """On the embedding, the attention weights and the residual branches."""
    qk_norm: bool = False
    """Normalise queries and keys: steadier at high learning rates."""
    qk_norm_weight: bool = False
    """With qk_norm: a trained weight for each place in a head."""
    value_residual: bool = False
    """Mix each block's values with the first block's, by two trained weights a block."""
    embedding_residual: bool = False
    """Mix what enters each block with the token's embedding, by two trained weights a block."""

    # === Training steps ===
    total_steps: int = 10_000
    """Optimizer steps of the whole run."""
    train_minutes: float | None = None
    """Choose total_steps so that training takes about this long, by a calibration at the start.
    Without effect if total_steps is set on the command line or in a file; a resumed run keeps the
    length that was chosen."""
    max_epochs: float | None = None
    """Limits what train_minutes chooses to so many passes over the training data: of a small text
    a model remembers more and predicts less with each."""
    max_minutes: float | None = None
    """Save and stop after this much training time, finished or not."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int = 500
    """Steps between evaluations. 0: only after the last step."""
    eval_batches: int = 20
    """Fixed validation batches in each evaluation."""
    sample_every: int = 0
    """Steps between samples of text, in the log and the trackers. 0: only after the last step."""
    final_eval_tokens: int = 10_000_000
    """Validation targets of the last evaluation, in windows spread evenly over the data. 0: all, as
    --eval-only does by default."""
    ckpt_every: int = 1000
    """Steps between checkpoints. 0: only after the last step."""
    ckpt_minutes: float | None = None
    """Save also when this many minutes of wall clock have passed since the last save."""
    keep_last: int = 3
    """Numbered checkpoints to keep, beside the best by validation loss and the final. 0: all."""
    sync_save: bool = False
    """Wait for each save to be written. Default: training goes on, beside a copy in memory."""

    # === Optimizer ===
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon: Muon for the matrices inside the blocks, AdamW for all else."""
    lr_max: float = 3e-4
    """Learning rate after the warm-up."""
    muon_lr: float = 0.02
    """Muon's learning rate after the warm-up; it goes up and down with AdamW's."""
    embedding_lr_scale: float = 1.0
    """The learning rate of embeddings in times of AdamW's. One that is tied to the head keeps
    AdamW's."""
    lr_min: float = 3e-5
    """Learning rate at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay, AdamW's and Muon's."""
    weight_decay_all: bool = False
    """Decay every parameter. Default: matrices only, no norm weights."""
    grad_clip_norm: float = 1.0
    """Global L2 norm the gradients are clipped to. 0: no clipping."""

    guard: Literal["skip", "rollback", "off"] = "skip"
    """What happens to a step whose loss is far above those before it or not finite. skip: it leaves
    the weights as they are; rollback: after ten in a row, too, back to the last good checkpoint and
    on with other data; off: only what is not finite is skipped."""

    # === Scheduler ===
    schedule: Literal["cosine", "wsd"] = "cosine"
    """cosine; or wsd: constant, with a linear decay over the last fifth."""
    warmup_iters: int = 200
    """Steps of linear warm-up."""
    cosine_iters: int | None = None
    """After this many steps the rate is lr_min. Default: total_steps."""

    # === Hardware ===
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the matmuls; weights stay float32. auto: bfloat16 if it is faster there."""
    tf32: bool = True
    """On CUDA with dtype float32: matmuls on tensor cores, which read 10 bits of mantissa."""
    residual_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the residual stream. auto: bfloat16 on CUDA if the matmuls' is, else float32."""
    attention: Literal["auto", "cudnn", "flash", "fa3"] = "auto"
    """Attention's kernel on CUDA. auto: torch's choice; fa3: FlashAttention 3, whose package
    flash_attn_interface must be installed."""
    joint_projections: bool = False
    """In training, one matmul for queries, keys and values, and one for the feed-forward's w1 and
    w3. Weights and checkpoints stay as they are. For CUDA: 2 % faster, a tenth more memory; CPUs
    are slower with it."""
    fp8_head: bool = False
    """In training, compute logits from float8 numbers, on NVIDIA GPUs from Ada and Hopper on:
    faster, and less exact. Evaluations do not."""
    compile: bool = False
    """torch.compile the training and the evaluation step."""
    compile_mode: Literal["default", "max-autotune-no-cudagraphs"] = "default"
    """max-autotune-no-cudagraphs: time several kernels for each matmul while compiling."""
    compile_scope: Literal["model", "block"] | None = None
    """What is compiled as a whole: the model, or each of its blocks, which share what is compiled.
    block: compiling takes as long for many blocks as for one; steps may be a little slower, but
    several processes exchange gradients meanwhile. Default: the model in one process, else blocks.
    """
    deterministic: bool = False
    """On CUDA: let torch choose the algorithms that give the same bits each time, and stop with an
    error at an operation that has none. A CPU gives the same bits without it."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more work."""

    profile: str | None = None
    """A:B writes a torch.profiler trace of the steps A to B - 1 beside the log, on CUDA also a
    snapshot of the memory. With train_minutes the last step is known, and an A behind it refused,
    only after the calibration."""

    # === Several processes (torchrun) ===
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process has the whole model; fsdp: a part of weights, gradients and moments."""
    fsdp_reshard: bool = True
    """fsdp: drop a block's weights after its forward and gather them again for backward: less
    memory, half as much communication again."""

    # === Run ===
    seed: int = 0
    """Decides the initial weights, the order of the data and the dropout."""
    target_dir: str = "./TrainLoopFiles"
    """Where checkpoints and logs go. On the command line: runs/<preset>-<time>."""
    ckpt_dir: str | None = None
    """Default: target_dir/checkpoints."""
    ckpt_save_prefix: str = "checkpoint"
    """Checkpoints are {prefix}_{step}.pt, {prefix}_final.pt and {prefix}_model.pt."""
    log_dir: str | None = None
    """Default: target_dir/logs."""
    log_save_prefix: str = "train"
    """The log is {prefix}.log, the picture {prefix}_loss_curve.png."""
    ckpt_path_to_resume: str | None = None
    """Checkpoint to continue from, optimizer, step and all. On the command line also: --resume."""
    init_from: str | None = None
    """What the model starts with: a checkpoint's weights, or a directory of Hugging Face's
    transformers (config.json, safetensors). On the command line its architecture, too, unless flags
    say otherwise. The optimizer and the step start anew. A resumed run ignores it."""
    eval_only: bool = False
    """Evaluate the checkpoint of --resume or --init-from and stop."""
    track: tuple[str, ...] = ()
    """Shown beside the log by tensorboard, wandb, trackio or csv; several: --track csv,wandb."""
    overwrite: bool = False
    """Allow a target_dir that already holds checkpoints."""
    allow_data_change: bool = False
    """Resume although data, seed or context_len differ from the checkpoint's: the run goes on at
    the same sample number, in another order or other data."""

    def __post_init__(self):
        for name, value in vars(self).items():
            several = isinstance(value, tuple | list)
            setattr(self, name, tuple(map(_plain, value)) if several else _plain(value))
        self._check_ranges()
        self.track = tuple(name for names in self.track for name in names.split(",") if name)
        if self.d_ff is None:
            self.d_ff = self.cal_d_ff(self.d_model)
        if self.cosine_iters is None and self.train_minutes is None:  # else it waits for them
            self.cosine_iters = self.total_steps
        if self.ckpt_dir is None:
            self.ckpt_dir = os.path.join(self.target_dir, "checkpoints")
        if self.log_dir is None:
            self.log_dir = os.path.join(self.target_dir, "logs")
        self.validate()

    @staticmethod
    def cal_d_ff(d_m: int) -> int:
        """8/3 * d_m, rounded up to a multiple of 64."""
        return default_d_ff(d_m)

    def validate(self) -> None:
        """Raises ConfigError, naming the first invalid setting, its value and what is valid."""
        self._check_ranges()
        positive = (
            "batch_size context_len grad_accum vocab_size num_layers num_heads d_model d_ff "
            "total_steps log_every eval_batches lr_max muon_lr eps rope_theta norm_eps "
            "embedding_lr_scale"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: it must be positive")
        not_negative = (
            "eval_every ckpt_every keep_last lr_min weight_decay grad_clip_norm warmup_iters seed "
            "final_eval_tokens sample_every"
        )
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: it must not be negative")
        optional = "train_minutes max_epochs max_minutes ckpt_minutes tokens_per_step"
        for name in optional.split():
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={shown(getattr(self, name))}: it must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}: both must lie in [0, 1)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: it must lie in [0, 1)")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ConfigError(
                "optimizer='muon' with parallel='fsdp': Muon needs whole matrices; use "
                "--parallel ddp, or --optimizer adamw"
            )
        if self.fp8_head and (self.vocab_size % 16 or self.d_model % 16):
            raise ConfigError(
                f"fp8_head with vocab_size={self.vocab_size}, d_model={self.d_model}: both must be "
                f"multiples of 16; a larger vocab_size pads it"
            )
        if self.lr_min > self.lr_max:
            raise ConfigError(
                f"lr_min={self.lr_min}: it must not be above lr_max={self.lr_max}; set both"
            )
        for field in fields(self):  # Literal[...], or Literal[...] | None
            optional = type(None) in get_args(field.type)
            hint = get_args(field.type)[0] if optional else field.type
            value, values = getattr(self, field.name), (*[None] * optional, *get_args(hint))
            if get_origin(hint) is Literal and value not in values:
                raise ConfigError(
                    f"{field.name}={value!r}: it must be {', '.join(map(str, values))}"
                )
        for name in self.track:
            if name not in TRACKERS:
                raise ConfigError(f"track={shown(name)}: it must be of {', '.join(TRACKERS)}")
        if self.batch_size * self.grad_accum * self.context_len >= 2**_STEP_TOKENS_POWER:
            raise ConfigError(
                f"batch_size={self.batch_size} * grad_accum={self.grad_accum} * "
                f"context_len={self.context_len}: a step must have less than "
                f"2^{_STEP_TOKENS_POWER} tokens"
            )
        for name in ("ckpt_save_prefix", "log_save_prefix"):
            prefix = getattr(self, name)
            if not prefix or "/" in prefix or "\\" in prefix or len(os.fsencode(prefix)) > 200:
                raise ConfigError(
                    f"{name}={shown(prefix)}: it must be the beginning of a file's name, without "
                    f"/ and of at most 200 bytes"
                )
        for name in ("target_dir", "ckpt_dir", "log_dir", "ckpt_path_to_resume", "init_from"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name}='': it must name a path; leave it out for the default")
        if self.profile is not None:
            begin, _ = parse_span(self.profile)
            if begin >= self.total_steps and self.train_minutes is None:
                raise ConfigError(
                    f"profile={self.profile!r}: it begins behind the last step, "
                    f"{self.total_steps - 1}"
                )
        try:
            ModelConfig.of_settings(vars(self))
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def with_vocabulary(self, vocab_size: int, origin: str) -> "TrainingConfig":
        """With the size of the data's vocabulary. One that was asked for, or is a resumed run's, by
        the setting's `origin`, stays: it may be padded. Raises ConfigError if it is too small."""
        if not origin.startswith(("command line", "file", "checkpoint")):
            return replace(self, vocab_size=vocab_size)
        if self.vocab_size < vocab_size:
            fix = "leave it out, or pad it to a larger number"
            if origin.endswith("--init-from"):
                fix = f"prepare the data with the tokenizer of {self.init_from}"
            raise ConfigError(
                f"vocab_size={self.vocab_size} is less than the {vocab_size} of the data's "
                f"tokenizer; {fix}"
            )
        return self

    def accumulated(self, processes: int) -> "TrainingConfig":
        """With the grad_accum that tokens_per_step asks for on so many processes.

        Raises ConfigError if they do not divide it.
        """
        if self.tokens_per_step is None:
            return self
        micro_batches = self.batch_size * self.context_len * processes
        accum = max(1, round(self.tokens_per_step / micro_batches))
        if accum * micro_batches != self.tokens_per_step:
            raise ConfigError(
                f"tokens_per_step={self.tokens_per_step}: batch_size={self.batch_size} * "
                f"context_len={self.context_len} * {processes} processes = {micro_batches} does "
                f"not divide it; the nearest is {accum * micro_batches}"
            )
        return replace(self, grad_accum=accum)

    def _check_ranges(self) -> None:
        """What no setting may be, whichever it is."""
        for name, value in vars(self).items():
            texts = value if isinstance(value, tuple) else (value,)
            if not all(_can_be_a_path(text) for text in texts if isinstance(text, str)):
                raise ConfigError(f"{name}={shown(value)}: holds a character that no path can have")
            if isinstance(value, float) and math.isinf(value):
                raise ConfigError(f"{name}={value}: it must be finite")
            power = _POWERS.get(name, 63)
            if isinstance(value, int) and value >= 2**power:
                raise ConfigError(f"{name}={shown(value)}: it must be below 2^{power}")


def _plain(value: object) -> object:
    """NumPy's numbers as Python's: no log and no checkpoint takes them."""
    of_numpy = isinstance(value, np.generic | np.ndarray) and value.ndim == 0
    return value.item() if of_numpy else value


def _can_be_a_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
