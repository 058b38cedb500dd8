"""What a run will take, told before it starts: memory, time, and room for its checkpoints.

Bytes and seconds. P parameters, B batch, T context length, V vocabulary.
"""

import time
import weakref
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm.config import TrainingConfig
from fastlm.data.loader import TrainLoader
from fastlm.hardware import autocast, synchronize
from fastlm.measure import allocated_bytes
from fastlm.model import TransformerLM, count_parameters, training_flops_per_token
from fastlm.model_loss import ModelLoss
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_plan
from fastlm.step import TrainStep, create_model, create_optimizer

_LAYERS = (2, 3)  # a model of so many tells what each further one takes
# What a run on a CPU has allocated beside its tensors, over what this process has: batches, logs, a
# picture, blocks of the heap that are not full. 0.14 to 0.22 GiB (two cores, models of 8 layers).
_OF_A_RUN = 226 << 20


@dataclass
class Sizes:
    """What of the model's size follows without running anything. `cfg`: of one process."""

    parameters: int
    weights: int
    moments: int  # of the optimizer
    flops_per_token: int

    @classmethod
    def of(cls, cfg: TrainingConfig) -> "Sizes":
        """Raises ConfigError, as the run would."""
        model = create_model(cfg, meta=True)
        moments = 0
        for group in create_optimizer(model, cfg).param_groups:
            count = 1 if "momentum" in group else 2  # Muon's, AdamW's
            moments += 4 * count * sum(p.numel() for p in group["params"])
        P = count_parameters(model)
        return cls(P, 4 * P, moments, training_flops_per_token(model, cfg.context_len))

    @property
    def checkpoint(self) -> int:
        return self.weights + self.moments

    def disk(self, cfg: TrainingConfig) -> int:
        """The most that the run's checkpoints take at a time: the numbered ones that are kept, the
        best, one that is being written, the final one, and the weights alone."""
        numbered = (cfg.total_steps - 1) // cfg.ckpt_every if cfg.ckpt_every else 0
        if cfg.ckpt_minutes is not None:
            numbered = max(numbered, cfg.keep_last)
        kept = min(numbered, cfg.keep_last + 1) if cfg.keep_last else numbered
        return (kept + 2) * self.checkpoint + self.weights


@dataclass
class Memory:
    """The most that a training step needs, not compiled; compiled it is usually less."""

    weights: int
    moments: int
    working: int  # gradients, activations, and the scratch of the output head
    copy: int  # of what a checkpoint holds, in the host's memory while it is written
    process: int  # Python, torch, this package, and what a run has beside its tensors

    def on(self, device: torch.device) -> int:
        """The bytes that must be free on `device` before the process starts."""
        needed = self.weights + self.moments + self.working
        return needed if device.type == "cuda" else needed + self.copy + self.process


def memory_needed(cfg: TrainingConfig, sizes: Sizes, device: torch.device) -> Memory:
    """Runs forward and backward of small models on tensors without content."""
    few, more = (_peak(replace(cfg, num_layers=n), device) for n in _LAYERS)
    working = more + (cfg.num_layers - _LAYERS[1]) * (more - few)
    return Memory(
        weights=sizes.weights,
        moments=sizes.moments,
        working=working,
        copy=0 if cfg.sync_save else sizes.checkpoint,
        process=(allocated_bytes() or 0) + _OF_A_RUN,
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, for as long as they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, count: int) -> None:
        self.now -= count


class _ForwardAndBackward(nn.Module):
    """Both in one call: checkpointed blocks look up their weights again in backward."""

    def __init__(self, loss: ModelLoss):
        super().__init__()
        self.loss = loss

    def forward(self, x: Tensor, items: Tensor) -> None:
        self.loss(x, x, items).backward()


def _model(cfg: TrainingConfig, *, meta: bool = False) -> TransformerLM:
    model = create_model(cfg, meta=meta)
    if cfg.doc_mask:
        model.document_end = 0  # any token: a mask costs the same wherever documents end
    return model


def _peak(cfg: TrainingConfig, device: torch.device) -> int:
    """Of forward and backward of a micro-batch, its gradients included, with the head's scratch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    loss = ModelLoss(_model(cfg, meta=True), device, replace(cfg, compile=False))
    both = _ForwardAndBackward(loss)
    shapes = {**dict(both.named_parameters()), **dict(both.named_buffers())}
    with FakeTensorMode():
        tensors = {
            name: torch.empty(
                tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad
            )
            for name, tensor in shapes.items()
        }
        x = torch.zeros(cfg.batch_size, cfg.context_len, dtype=torch.int64, device=device)
        items = torch.ones((), dtype=torch.int64, device=device)
        with _LiveBytes() as live:
            for _ in range(min(cfg.grad_accum, 2)):  # the second finds the gradients of the first
                functional_call(both, tensors, (x, items))
        hidden = torch.empty(x.numel(), cfg.d_model, dtype=loss.dtype, device=device)
        with autocast(device, loss.dtype):
            weight = tensors["loss.model.token_embeddings.weight"]
            plan = linear_cross_entropy_plan(hidden, weight, fp8=cfg.fp8_head)
    return live.peak + plan.extra_bytes


@dataclass
class StepTime:
    """Seconds of a step of the whole model, not compiled."""

    seconds: float
    layers: tuple[int, ...]  # of the models that were timed
    batch_size: int  # of their micro-batch


def step_time(
    cfg: TrainingConfig, device: torch.device, ceiling: float, memory: int | None
) -> StepTime | None:
    """Times steps of models of a few layers, with as large a micro-batch as takes about a second.

    ceiling: FLOP/s of matmuls; memory: bytes that may be used. None: one window of one such model
    would take too long, or too much memory.
    """
    layers = _LAYERS if cfg.num_layers > _LAYERS[1] else (cfg.num_layers,)
    largest = replace(cfg, num_layers=layers[-1])
    of_model = Sizes.of(largest)
    seconds_of_window = 2 * of_model.flops_per_token * cfg.context_len / ceiling
    batch_size = cfg.batch_size
    while batch_size > 1 and batch_size * seconds_of_window > 0.7:
        batch_size //= 2
    largest = replace(largest, batch_size=batch_size, grad_accum=1)
    needed = memory_needed(largest, of_model, device).on(device)
    if batch_size * seconds_of_window > 2.5 or (memory is not None and needed > memory):
        return None
    micro, update = [], []
    for count in layers:
        for times, seconds in zip((micro, update), _timed(largest, count, device), strict=True):
            times.append(seconds)
    whole = []
    for times in (micro, update):
        each = (times[-1] - times[0]) / max(1, layers[-1] - layers[0])
        whole.append(times[-1] + (cfg.num_layers - layers[-1]) * max(each, 0.0))
    windows = cfg.batch_size * cfg.grad_accum
    return StepTime(whole[0] * windows / batch_size + whole[1], layers, batch_size)


def _timed(cfg: TrainingConfig, layers: int, device: torch.device) -> tuple[float, float]:
    """(seconds of a micro-batch, seconds of the update) of a model of so many layers."""
    cfg = replace(cfg, num_layers=layers, compile=False, tokens_per_step=None)
    model = _model(cfg)
    optimizer = create_optimizer(model, cfg)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 8 * cfg.context_len + 8)
    loader = TrainLoader(tokens, cfg.batch_size, cfg.context_len, seed=0, device=device)
    runner = TrainStep(ModelLoss(model, device, cfg), optimizer, loader, cfg)
    stamps: list[float] = []

    def stamp(*_) -> None:
        synchronize(device)
        stamps.append(time.perf_counter())

    optimizer.register_step_pre_hook(stamp)
    optimizer.register_step_post_hook(stamp)
    micro, update = [], []
    deadline = time.perf_counter() + 2.0
    for index in range(6):
        if index > 1 and time.perf_counter() > deadline:
            break
        synchronize(device)
        begin = time.perf_counter()
        runner.run(0, lr=0.0)
        synchronize(device)
        if index:  # the first one is slower
            whole, step = time.perf_counter() - begin, stamps[-1] - stamps[-2]
            micro.append(whole - step)
            update.append(step)
    return min(micro), min(update)
