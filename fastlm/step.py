"""The training step: model, optimizer, forward and backward in micro-batches, clipping, update.

B batch, T context length, V vocabulary.
"""

import contextlib
import random
import time

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checkpoint import load_checkpoint
from fastlm.config import TrainingConfig
from fastlm.data.loader import TrainLoader
from fastlm.errors import CompileError
from fastlm.evaluate import evaluating
from fastlm.hardware import autocast, check_compiler, select_device, select_dtype, synchronize
from fastlm.model import TransformerLM
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss
from fastlm.optim import AdamW


def set_seed(seed: int) -> None:
    """Seeds random, numpy, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def create_model_and_optimizer(
    cfg: TrainingConfig, ckpt_path_to_resume: str | None = None
) -> tuple[TransformerLM, AdamW, int]:
    """(model, optimizer, start_step) on cfg.device, restored from a checkpoint if one is given.

    Matrices are decayed and vectors (the norms' weights) are not, unless cfg.weight_decay_all.
    """
    model = create_model(cfg)
    parameters = list(model.parameters())
    decayed = [p for p in parameters if cfg.weight_decay_all or p.dim() >= 2]
    others = [p for p in parameters if not (cfg.weight_decay_all or p.dim() >= 2)]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}]
    if others:
        groups.append({"params": others, "weight_decay": 0.0})
    optimizer = AdamW(
        groups,
        lr=cfg.lr_max,
        betas=cfg.betas,
        eps=cfg.eps,
        max_grad_norm=cfg.grad_clip_norm or None,
        # Also without clipping: a NaN must not reach the weights, and the norm is logged.
        skip_nonfinite=True,
    )
    start_step = 0
    if ckpt_path_to_resume is not None:
        print(f"[resume] Loading checkpoint from {ckpt_path_to_resume}")
        start_step = load_checkpoint(model, optimizer, ckpt_path_to_resume)
    return model, optimizer, start_step


def create_model(cfg: TrainingConfig) -> TransformerLM:
    """A new model of cfg's size on cfg.device."""
    return TransformerLM(
        vocab_size=cfg.vocab_size,
        d_model=cfg.d_model,
        num_heads=cfg.num_heads,
        num_layers=cfg.num_layers,
        max_seq_len=cfg.context_len,
        d_ff=cfg.d_ff,
        rope_theta=cfg.rope_theta,
        tie_embeddings=cfg.tie_embeddings,
        dropout=cfg.dropout,
        activation_checkpointing=cfg.activation_checkpointing,
    ).to(select_device(cfg.device))


class ModelLoss:
    """The loss of a model's head over its hidden states, both in cfg.dtype; the loss is fp32."""

    def __init__(self, model: nn.Module, device: torch.device, cfg: TrainingConfig):
        self.model, self.device = model, device
        self.dtype = select_dtype(cfg.dtype, device)
        self._hidden = self._hidden_states
        if cfg.compile:
            check_compiler(device)
            # Shapes are fixed: a graph for each mode, and no recompilation for a changed size.
            self._hidden = torch.compile(self._hidden_states, dynamic=False)

    def _hidden_states(self, x: Tensor) -> Tensor:
        """x: (B, T) -> (B, T, D) in the matmuls' dtype."""
        with autocast(self.device, self.dtype):
            return self.model.hidden(x).to(self.dtype)

    def __call__(self, x: Tensor, y: Tensor, **options) -> Tensor:
        """x, y: (B, T) -> linear_cross_entropy_loss with its `options`.

        Computed outside the compiled graph, so the upstream gradient is 1 and precomputed gradients
        are returned without another pass.
        """
        head = self.model.lm_head
        return linear_cross_entropy_loss(self._hidden(x), head.weight, y, bias=head.bias, **options)

    def summed(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y: (B, T) -> sum of the B * T losses in nats, fp32."""
        return self(x, y, reduction="sum")


class TrainStep:
    """Runs training steps of one model on one device."""

    def __init__(
        self, model: nn.Module, optimizer: AdamW, loader: TrainLoader, cfg: TrainingConfig
    ):
        self.model, self.optimizer, self.loader = model, optimizer, loader
        self.device = loader.device
        self.loss = ModelLoss(model, self.device, cfg)
        self.dtype = self.loss.dtype
        self.grad_accum = cfg.grad_accum
        self.samples = loader.batch_size * cfg.grad_accum  # windows in a step
        self.tokens = self.samples * loader.context_len  # in a step
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.compile_seconds = 0.0
        self._compile = cfg.compile

    def run(self, first_sample: int, lr: float) -> Tensor:
        """One optimizer step on the samples from `first_sample` on. Returns the mean loss of its
        tokens, 0-d on the device.

        Nothing here waits for the device: read the loss, and optimizer.last_grad_norm, when they
        are wanted.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.device)
        for micro_step in range(self.grad_accum):
            x, y = self.loader.batch(first_sample + micro_step * self.loader.batch_size)
            micro_loss = self.loss(x, y, num_items=self.tokens)
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        self.scaler.unscale_(self.optimizer)  # does nothing without float16
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def warm_up(self) -> None:
        """Compiles the training and the evaluation graph, before the clock runs; changes nothing.

        To be called before any step, and before optimizer state is loaded.
        """
        start = time.perf_counter()
        with self._unchanged():
            for _ in range(2):
                self.run(0, lr=0.0)
            with evaluating(self.model):
                self.loss.summed(*self.loader.batch(0))
            synchronize(self.device)
        self.compile_seconds = time.perf_counter() - start if self._compile else 0.0

    def seconds_per_step(self, *, seconds: float = 6.0) -> float:
        """Measures a step over `seconds`, five steps at least; changes nothing.

        The lower quartile: what else the machine does in these seconds slows some steps many times
        over, and none down to less than it takes.
        """
        durations: list[float] = []
        with self._unchanged():
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline or len(durations) < 5:
                start = time.perf_counter()
                self.run(len(durations) * self.samples, lr=0.0)
                synchronize(self.device)
                durations.append(time.perf_counter() - start)
        return float(np.quantile(durations, 0.25))

    @contextlib.contextmanager
    def _unchanged(self):
        """Undoes what steps of lr = 0 do: moments, random state, loss scale. Weights stay as is."""
        if self.optimizer.state:
            raise RuntimeError("the optimizer has state already: warm up before loading it")
        scale = self.scaler.state_dict()
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        except Exception as error:
            if not (self._compile and _is_compile_failure(error)):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), "no reason")
            raise CompileError(
                f"--compile failed ({reason.strip()[:300]}); check that the C++ compiler works, "
                f"or drop --compile"
            ) from error
        self.optimizer.state.clear()
        if scale:
            self.scaler.load_state_dict(scale)


def _is_compile_failure(error: Exception) -> bool:
    modules = [cls.__module__ for cls in type(error).__mro__]
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
