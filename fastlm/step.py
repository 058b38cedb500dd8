"""The training step: model, optimizer, forward and backward in micro-batches, clipping, update.

B batch, T context length, V vocabulary.
"""

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checkpoint import (
    load_checkpoint,
    random_state,
    restore_optimizer,
    restore_random_state,
    restore_scaler,
)
from fastlm.config import TrainingConfig
from fastlm.data.loader import TrainLoader
from fastlm.errors import CompileError
from fastlm.evaluate import evaluating
from fastlm.hardware import autocast, check_compiler, select_device, select_dtype, synchronize
from fastlm.model import TransformerLM
from fastlm.model_interface import compile_blocks, has_fused_head, prepare_model
from fastlm.ops.cross_entropy import cross_entropy_loss
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss
from fastlm.optim import AdamW
from fastlm.run.guard import Guard


def set_seed(seed: int) -> None:
    """Seeds random, numpy, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def create_model_and_optimizer(
    cfg: TrainingConfig, ckpt_path_to_resume: str | None = None, model: nn.Module | None = None
) -> tuple[nn.Module, AdamW, int]:
    """(model, optimizer, start_step) on cfg.device, restored from a checkpoint if one is given.

    model: the caller's own (fastlm/model_interface.py says what it must have), in place of a
    TransformerLM of cfg's size. Parameters that require no gradient are not trained.

    Matrices are decayed and vectors (the norms' weights) are not, unless cfg.weight_decay_all.
    """
    model = create_model(cfg) if model is None else prepare_model(model, cfg)
    parameters = [p for p in model.parameters() if p.requires_grad]
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
        self.fused = has_fused_head(model)
        self._output = self._model_output
        if cfg.compile:
            check_compiler(device)
            # Shapes are fixed: a graph for each mode, and no recompilation for a changed size.
            if cfg.compile_scope == "block":
                compile_blocks(model)
            else:
                self._output = torch.compile(self._model_output, dynamic=False)

    def _model_output(self, x: Tensor) -> Tensor:
        """x: (B, T) -> (B, T, D) in the matmuls' dtype; without a fused head logits: (B, T, V)."""
        with autocast(self.device, self.dtype):
            return self.model.hidden(x).to(self.dtype) if self.fused else self.model(x)

    def __call__(self, x: Tensor, y: Tensor, **options) -> Tensor:
        """x, y: (B, T) -> linear_cross_entropy_loss (cross_entropy_loss) with its `options`.

        Computed outside the compiled graph, so the upstream gradient is 1 and precomputed gradients
        are returned without another pass.
        """
        output = self._output(x)
        if not self.fused:
            return cross_entropy_loss(output, y, **options)
        head = self.model.lm_head
        return linear_cross_entropy_loss(output, head.weight, y, bias=head.bias, **options)

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
        self.guard = Guard(cfg.guard, self.device)
        optimizer.register_step_pre_hook(lambda *_: self.guard.hand_over(optimizer))
        self.good = torch.ones((), dtype=torch.bool, device=self.device)  # the last step was taken
        self._before: dict[str, Tensor] | None = None  # random state before an unfinished step
        self.compile_seconds = 0.0
        self._compile = cfg.compile

    def run(
        self, first_sample: int, lr: float, stop: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """One optimizer step on the samples from `first_sample` on. Returns the mean loss of its
        tokens, 0-d on the device.

        Nothing here waits for the device: read the loss, self.good (was the step taken?) and
        optimizer.last_grad_norm when they are wanted. `stop` is asked before each micro-batch: if
        it says yes, the step is dropped, nothing has changed, and None comes back.
        """
        self._before = random_state(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.device)
        for micro_step in range(self.grad_accum):
            if stop():
                self.drop()
                return None
            x, y = self.loader.batch(first_sample + micro_step * self.loader.batch_size)
            micro_loss = self.loss(x, y, num_items=self.tokens)
            self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        self.guard.judge(loss)
        self.optimizer.last_grad_norm = None
        self.scaler.unscale_(self.optimizer)  # does nothing without float16
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.good = self.guard.record(loss, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        self._before = None
        return loss

    def drop(self) -> None:
        """Undoes what a step that does not come to its end has done."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._before is not None:
            restore_random_state({"random_state": self._before}, self.device)
            self._before = None

    def restore(self, payload: Mapping[str, Any]) -> None:
        """All of a checkpoint but the weights: moments, loss scale, random state, guard."""
        groups = self.optimizer.param_groups
        # Its state brings the settings of the run before; this run's are those that it was given.
        settings = [{name: g[name] for name in ("betas", "eps", "weight_decay")} for g in groups]
        restore_optimizer(self.optimizer, payload, self.model)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        restore_scaler(self.scaler, payload)
        restore_random_state(payload, self.device)
        if payload.get("guard") is not None:
            self.guard.load_state_dict(payload["guard"])

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

    def seconds_per_step(
        self, *, seconds: float = 6.0, stop: Callable[[], bool] = lambda: False
    ) -> float:
        """Measures a step over `seconds`, five steps at least or until `stop`; changes nothing.

        The lower quartile: what else the machine does in these seconds slows some steps many times
        over, and none down to less than it takes.
        """
        durations: list[float] = []
        with self._unchanged():
            deadline = time.perf_counter() + seconds
            while time.perf_counter() < deadline or len(durations) < 5:
                if durations and stop():
                    break
                start = time.perf_counter()
                self.run(len(durations) * self.samples, lr=0.0)
                synchronize(self.device)
                durations.append(time.perf_counter() - start)
        return float(np.quantile(durations, 0.25))

    @contextlib.contextmanager
    def _unchanged(self):
        """Undoes what steps of lr = 0 do: moments, random state, loss scale, what the guard counts.
        Weights stay as is."""
        if self.optimizer.state:
            raise RuntimeError("the optimizer has state already: warm up before loading it")
        scale, guard = self.scaler.state_dict(), self.guard
        self.guard = Guard("off", self.device)
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
        finally:
            self.guard = guard
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
