"""TrainingConfig: every setting of a run, for Python, TOML files and the command line alike.

The comment behind a field is its help text (`python -m fastlm.train --help`).
"""

import os
from dataclasses import dataclass
from typing import Literal

from fastlm.errors import ConfigError
from fastlm.model import check_heads, default_d_ff


@dataclass
class TrainingConfig:
    """Every setting of a run. Raises ConfigError, naming the setting, for an invalid one."""

    # === Data / batching ===
    data: tuple[str, ...] = ()
    """A prepared directory (python -m fastlm.prepare), or token files (.bin, .npy). Default: the
    Python standard library's own source."""
    val_data: tuple[str, ...] = ()
    """Validation token files. Default: the manifest's, else the end of the training tokens."""
    data_dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"] | None = None
    """Dtype of raw .bin files without a manifest (default uint16)."""
    batch_size: int = 32
    """Windows in a (micro-)batch."""
    context_len: int = 256
    """Tokens in a window."""
    grad_accum: int = 1
    """Micro-batches in a step."""
    vocab_size: int = 10000
    """Token ids lie below it. Taken from the data's manifest if there is one."""

    # === Model architecture ===
    num_layers: int = 12
    """Transformer blocks."""
    num_heads: int = 16
    """Attention heads; d_model must be divisible by it."""
    d_model: int = 1024
    """Width of the residual stream."""
    d_ff: int | None = None
    """Width of the feed-forward layer. Default: 8/3 of d_model, rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    """Base of the rotary positions' wavelengths."""
    tie_embeddings: bool = False
    """One matrix for the embedding and the output head."""
    dropout: float = 0.0
    """On the embedding, the attention weights and the residual branches."""

    # === Training steps ===
    total_steps: int = 10_000
    """Optimizer steps of the whole run."""
    train_minutes: float | None = None
    """Choose total_steps so that training takes about this long, by a calibration at the start.
    Without effect if total_steps is set on the command line or in a file."""
    max_minutes: float | None = None
    """Save and stop after this much training time, finished or not."""
    log_every: int = 50
    """Steps between log lines."""
    eval_every: int = 500
    """Steps between evaluations. 0: only after the last step."""
    eval_batches: int = 20
    """Fixed validation batches in each evaluation (the last one reads all validation data)."""
    ckpt_every: int = 1000
    """Steps between checkpoints. 0: only after the last step."""

    # === Optimizer (AdamW) ===
    lr_max: float = 3e-4
    """Learning rate after the warm-up."""
    lr_min: float = 3e-5
    """Learning rate at the end."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay."""
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
    cosine_iters: int = 10000
    """After this many steps the rate is lr_min. Follows total_steps unless set."""

    # === Hardware ===
    device: str = "auto"
    """auto, cpu, cuda, cuda:0, mps."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the matmuls; weights stay float32. auto: bfloat16 if the hardware has it."""
    compile: bool = False
    """torch.compile the training and the evaluation step."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, a third more work."""

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
    """Checkpoint whose weights the model starts with; the optimizer and the step start anew."""
    eval_only: bool = False
    """Evaluate the checkpoint of --resume or --init-from and stop."""
    overwrite: bool = False
    """Allow a target_dir that already holds checkpoints."""

    def __post_init__(self):
        if self.d_ff is None:
            self.d_ff = self.cal_d_ff(self.d_model)
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
        positive = (
            "batch_size context_len grad_accum vocab_size num_layers num_heads d_model d_ff "
            "total_steps log_every eval_batches lr_max eps rope_theta"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be positive")
        not_negative = "eval_every ckpt_every lr_min weight_decay grad_clip_norm warmup_iters seed"
        for name in not_negative.split():
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must not be negative")
        for name in ("train_minutes", "max_minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas={self.betas}: both must lie in [0, 1)")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout}: it must lie in [0, 1)")
        if self.lr_min > self.lr_max:
            raise ConfigError(f"lr_min={self.lr_min}: it must not be above lr_max={self.lr_max}")
        for name, values in (
            ("schedule", ("cosine", "wsd")),
            ("guard", ("skip", "rollback", "off")),
            ("dtype", ("auto", "float32", "bfloat16", "float16")),
        ):
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r}: it must be {', '.join(values)}")
        try:
            check_heads(self.d_model, self.num_heads)
        except ValueError as error:
            raise ConfigError(str(error)) from error
