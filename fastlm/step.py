"""The training step: model, optimizer, forward and backward in micro-batches, clipping, update.

B batch, T context length, V vocabulary.
"""

import contextlib
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlm.checkpoint import load_checkpoint, restore_optimizer, restore_scaler
from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.loader import TrainLoader
from fastlm.data.sampler import mixed
from fastlm.data.step_loader import StepLoader
from fastlm.errors import CompileError, ConfigError
from fastlm.evaluate import evaluating
from fastlm.hardware import select_device, select_dtype, synchronize
from fastlm.kernels.collect import is_dtensor
from fastlm.model import TransformerLM
from fastlm.model_config import ModelConfig
from fastlm.model_interface import embedding_tables, hidden_matrices, model_class
from fastlm.model_loss import ModelLoss
from fastlm.muon import Muon
from fastlm.optim import AdamW
from fastlm.parallel.world import ALONE, World
from fastlm.parallel.wrap import micro_step
from fastlm.run.guard import Guard

IGNORED = -100  # the label of no target


def set_seed(seed: int) -> None:
    """Seeds random, numpy, and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def create_model_and_optimizer(
    cfg: TrainingConfig, ckpt_path_to_resume: str | None = None
) -> tuple[TransformerLM, AdamW, int]:
    """(model, optimizer, start_step) on cfg.device, restored from a checkpoint if one is given."""
    model = create_model(cfg)
    optimizer, start_step = create_optimizer(model, cfg), 0
    if ckpt_path_to_resume is not None:
        print(f"[resume] Loading checkpoint from {ckpt_path_to_resume}")
        start_step = load_checkpoint(model, optimizer, ckpt_path_to_resume)
    return model, optimizer, start_step


def create_optimizer(model: nn.Module, cfg: TrainingConfig) -> AdamW:
    """The optimizer of `model` that cfg.optimizer names: matrices are decayed and vectors (norms'
    weights, biases) are not, unless cfg.weight_decay_all. Muon has the matrices of the blocks. With
    embedding_lr_scale other than 1, embeddings that no head shares are a group of their own.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    hidden = hidden_matrices(model) if cfg.optimizer == "muon" else []
    if cfg.optimizer == "muon" and not hidden:
        raise ConfigError(
            f"optimizer='muon': {type(model).__name__} has no matrix inside an nn.ModuleList "
            f"for it to train; use --optimizer adamw"
        )
    scale = cfg.embedding_lr_scale
    tables = embedding_tables(model) if scale != 1 else []
    if scale != 1 and not tables:
        raise ConfigError(
            f"embedding_lr_scale={scale}: {type(model).__name__} has no nn.Embedding that is "
            f"trained; leave it out"
        )
    heads = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    tables = [p for p in tables if id(p) not in heads]
    taken = {id(p) for p in hidden + tables}
    parameters = [p for p in parameters if id(p) not in taken]
    decayed = [p for p in parameters if cfg.weight_decay_all or p.dim() >= 2]
    others = [p for p in parameters if not (cfg.weight_decay_all or p.dim() >= 2)]
    decay = {"weight_decay": cfg.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": decayed, **decay},
        {"params": others, "weight_decay": 0.0},
        {"params": tables, **decay, "lr_scale": scale},
        {"params": hidden, **decay, "lr_scale": cfg.muon_lr / cfg.lr_max, "momentum": 0.95},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = dict(
        lr=cfg.lr_max,
        betas=cfg.betas,
        eps=cfg.eps,
        max_grad_norm=cfg.grad_clip_norm or None,
        # Also without clipping: a NaN must not reach the weights, and the norm is logged.
        skip_nonfinite=True,
    )
    if not hidden:
        return AdamW(groups, **options)
    dtype = select_dtype(cfg.dtype, hidden[0].device)
    # float16 has too few small numbers for a Gram matrix.
    dtype = torch.float32 if dtype == torch.float16 else dtype
    return Muon(groups, **options, matmul_dtype=dtype)


def create_model(cfg: TrainingConfig, *, meta: bool = False) -> TransformerLM:
    """A new model of cfg's size on cfg.device; or, without memory, on the meta device."""
    with torch.device("meta") if meta else contextlib.nullcontext():
        model = TransformerLM.from_config(ModelConfig.of_settings(vars(cfg)))
    return model if meta else model.to(select_device(cfg.device))


def restart_at_documents(model: nn.Module, data: Data, cfg: TrainingConfig) -> None:
    """cfg.doc_mask: the model's attention ends where the data's documents do.

    Raises ConfigError for data that does not say which token ends one, and for models of others.
    """
    if not cfg.doc_mask:
        if model_class(model) is None and model.document_end is not None:
            raise ConfigError(
                "doc_mask=False: the model has a document_end, as a checkpoint of --doc-mask; set "
                "doc_mask=True, or model.document_end = None"
            )
        return
    if model_class(model) is not None:
        raise ConfigError(
            f"doc_mask=True: {type(model).__name__} is no TransformerLM; mask the attention in it, "
            f"and leave doc_mask out"
        )
    end = data.end_of_text
    if end is None or data.unmarked:
        raise ConfigError(
            f"doc_mask=True: {(data.unmarked or ['the data'])[0]} has no manifest that says "
            f"which token ends a document; prepare it with python -m fastlm.prepare"
        )
    model.document_end = end


class TrainStep:
    """Runs training steps of one model on one device, or on one of each rank's."""

    def __init__(
        self,
        loss: ModelLoss,
        optimizer: AdamW,
        loader: TrainLoader,
        cfg: TrainingConfig,
        world: World = ALONE,
        wrapped: nn.Module | None = None,  # what spreads `loss` over the ranks
    ):
        self.loss, self.wrapped, self.optimizer = loss, wrapped or loss, optimizer
        self.loader, self.world = loader, world
        self.step_loader = StepLoader(loader, ahead=cfg.prefetch)
        self.model, self.dtype, self.device = loss.model, loss.dtype, loader.device
        self.grad_accum, self.seed = cfg.grad_accum, cfg.seed
        # In a step, on all ranks.
        self.samples = loader.batch_size * cfg.grad_accum * world.size  # windows
        self.tokens = self.samples * loader.context_len
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.guard = Guard(cfg.guard, self.device, cfg.vocab_size)
        optimizer.register_step_pre_hook(lambda *_: self.guard.hand_over(optimizer))
        self.good = torch.ones((), dtype=torch.bool, device=self.device)  # the last step was taken
        self.compile_seconds = 0.0
        self._compile = cfg.compile

    def run(
        self, first_sample: int, lr: float, stop: Callable[[], bool] = lambda: False
    ) -> Tensor | None:
        """One optimizer step on the samples from `first_sample` on. Returns the mean loss of its
        targets on all ranks, 0-d on the device; NaN of no targets, as long prompts may leave none.

        Nothing here waits for the device: read the loss, self.good (was the step taken?) and
        optimizer.last_grad_norm when they are wanted. `stop` is asked before each micro-batch: if
        it says yes, the step is dropped, nothing has changed, and None comes back. (Where a model
        changes buffers in its forward, as BatchNorm does, they keep what the step's micro-batches
        before it have left in them; so they do of a step that the guard skips.)
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        batch_size, world = self.loader.batch_size, self.world
        samples = [
            first_sample + (micro * world.size + world.rank) * batch_size
            for micro in range(self.grad_accum)
        ]
        following = [sample + self.samples for sample in samples]
        batches = self.step_loader.batches(samples, following)
        targets = world.sum(torch.stack([(y != IGNORED).sum() for _, y in batches]).sum())
        loss = torch.zeros((), device=self.device)
        for micro, (sample, (x, y)) in enumerate(zip(samples, batches, strict=True)):
            if stop():
                self.drop()
                return None
            # What is random is a function of the samples: a run that is resumed, on however many
            # ranks, draws the same.
            _seed(mixed(self.seed, sample), self.device)
            with micro_step(self.wrapped, last=micro == self.grad_accum - 1):
                micro_loss = self.wrapped(x, y, targets)
                self.scaler.scale(micro_loss).backward()
            loss += micro_loss.detach()
        world.sum(loss)
        self.guard.judge(loss)
        self.optimizer.last_grad_norm = None
        self.scaler.unscale_(self.optimizer)  # does nothing without float16
        self.scaler.step(self.optimizer)
        self.scaler.update()
        loss = torch.where(targets > 0, loss, torch.nan)
        self.good = self.guard.record(loss, self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def drop(self) -> None:
        """Undoes what a step that does not come to its end has done."""
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def is_sharded(self) -> bool:
        """Does each rank hold a part of the weights (FSDP2)?"""
        return any(is_dtensor(parameter) for parameter in self.model.parameters())

    def restore(self, payload: Mapping[str, Any], path: Path) -> None:
        """All of a checkpoint: moments, loss scale, guard; and the weights in a world of several,
        where each rank reads its part of the file, now. Alone, the payload has been loaded."""
        groups = self.optimizer.param_groups
        # Its state brings the settings of the run before; this run's are those that it was given.
        names = ("betas", "eps", "weight_decay", "momentum", "lr_scale")
        settings = [{name: g[name] for name in names if name in g} for g in groups]
        if self.world.size == 1:
            restore_optimizer(self.optimizer, payload, self.model)
        else:
            load_checkpoint(self.model, self.optimizer, path, group=self.world.cpu_group)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        restore_scaler(self.scaler, payload)
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

            def goes_on() -> bool:
                more = time.perf_counter() < deadline or len(durations) < 5
                return more and not (durations and stop())

            while self.world.decide(goes_on):
                start = time.perf_counter()
                self.run(len(durations) * self.samples, lr=0.0)
                synchronize(self.device)
                durations.append(time.perf_counter() - start)
        return float(np.quantile(durations, 0.25))

    @contextlib.contextmanager
    def _unchanged(self):
        """Undoes what steps of lr = 0 do: moments, loss scale, what the guard counts, and buffers,
        which BatchNorm, for one, changes in each forward. Weights stay as is."""
        if self.optimizer.state:
            raise RuntimeError("the optimizer has state already: warm up before loading it")
        scale, guard = self.scaler.state_dict(), self.guard
        buffers = [
            (module, name, buffer, buffer.clone())
            for module in self.model.modules()
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self.guard = Guard("off", self.device)
        try:
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
        with torch.no_grad():
            for module, name, buffer, value in buffers:
                # A forward may have put another there. Expanded memory cannot be written to.
                same = torch.equal(buffer, value)
                setattr(module, name, buffer if same else buffer.copy_(value))
        self.optimizer.state.clear()
        if scale:
            self.scaler.load_state_dict(scale)


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the generators that a micro-batch on `device` draws from."""
    # Not torch.manual_seed: for devices that are not there it takes 0.1 ms.
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _is_compile_failure(error: Exception) -> bool:
    modules = [cls.__module__ for cls in type(error).__mro__]
    return any(name.startswith(("torch._dynamo", "torch._inductor")) for name in modules)


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
