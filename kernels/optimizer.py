"""AdamW over multi-tensor kernels, for whatever device there are kernels: the class itself.

Imports torch and siblings only. fastlm.AdamW runs it on CPUs and GPUs, drop_in.AdamW on GPUs alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from . import shards
from .collect import Collected, collect_step, write_back
from .optimizer_state import (
    checked_state_dict,
    has_remainder,
    joined,
    new_states,
    split_into,
    unwrap_loaded,
)
from .table_watch import TableWatch
from .tensor_table import CODE, GRAD, GradientSums, StepOptions, TensorTable

_TORCHS_CHOICES = ("foreach", "fused", "capturable")  # among its implementations: no matter here
_REFUSED = ("amsgrad", "maximize", "differentiable")


class StepKernels(Protocol):
    """What there is for a device; kernels/adamw.py and kernels/clip_grad_norm.py say how."""

    takes_tensors: bool  # from table.keep, where others take pointers: tables are used once

    def square_sums(self, table: TensorTable, *, by_class: bool = False) -> GradientSums: ...

    def step(
        self, table: TensorTable, options: StepOptions, sums: GradientSums | None
    ) -> Tensor | None: ...


class ParameterPosition(NamedTuple):
    group: int  # of param_groups
    index: int  # in the group
    name: str | None  # where the optimizer was given named_parameters()


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW's mathematics, groups, hooks and state dicts, without its step.

    A subclass says where the kernels are (`kernels_for`).
    """

    last_grad_norm: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool | None = None,
        param_precision: str = "native",
        impl: str = "auto",
        **torch_options: Any,
    ):
        if max_grad_norm is not None:
            if not float(max_grad_norm) > 0:
                raise ValueError(f"max_grad_norm={max_grad_norm}: it must be positive, or None")
            max_grad_norm = float(max_grad_norm)
        if param_precision not in ("native", "split"):
            raise ValueError(f"param_precision={param_precision!r}: it must be 'native' or 'split'")
        for name, value in torch_options.items():
            if name not in (*_TORCHS_CHOICES, *_REFUSED):
                raise TypeError(f"AdamW has no argument {name!r}")
            if name in _REFUSED and value:
                raise ValueError(f"{name}={value} is not supported; torch.optim.AdamW has it")
        if skip_nonfinite is None:
            skip_nonfinite = max_grad_norm is not None
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.param_precision, self._impl = param_precision, impl
        self._forget_tables()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        # As torch's constructor says for fused=True: a GradScaler then hands its scale and its
        # found_inf to the step, where it would otherwise read them on the host.
        self._step_supports_amp_scaling = True

    # What subclasses say

    @staticmethod
    def kernels_for(device: torch.device, impl: str) -> StepKernels:
        """The kernels for tensors on `device`; ValueError where there are none."""
        raise NotImplementedError

    new_watch: Callable[..., Any] = TableWatch  # or what has its interface

    # Parameters and state

    @property
    def _split(self) -> bool:
        return self.param_precision == "split"

    @property
    def _takes_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._forget_tables()
        try:
            self._check_last_group()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_last_group(self) -> None:
        group = self.param_groups[-1]
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{option}={group[option]} is not supported")
        for option in ("max_grad_norm", "skip_nonfinite", "param_precision", "impl"):
            if option in group:
                raise ValueError(f"{option} is the optimizer's, not a group's: pass it to AdamW")
        for param in group["params"]:
            shape = tuple(param.shape)
            if param.dtype not in CODE:
                raise TypeError(
                    f"a parameter (shape {shape}) has dtype {param.dtype}: it must be float32, "
                    f"bfloat16, float16 or float64"
                )
            if self._split and param.dtype == torch.float16:
                raise TypeError(
                    f'param_precision="split" takes bfloat16 parameters (and full ones), not '
                    f"float16 (shape {shape})"
                )
            overlaps = zip(param.stride(), param.shape, strict=True)
            if any(stride == 0 and size > 1 for stride, size in overlaps):
                raise ValueError(f"a parameter (shape {shape}) overlaps itself: it was expanded")
            self.kernels_for(param.device, self._impl)
        if len({id(p) for p in group["params"]}) != len(group["params"]):
            raise ValueError("a parameter stands in its group twice: it would be updated twice")
        if self._takes_norm and len({p.device for p in self._params()}) > 1:
            raise ValueError("max_grad_norm and skip_nonfinite need all parameters on one device")

    @torch.no_grad()
    def init_state(self) -> None:
        """Creates the state of every parameter now, which a first step would do.

        For checkpoints that are loaded into existing state (torch.distributed.checkpoint).
        """
        self._create_state(self._params())

    def _create_state(self, params: Sequence[Tensor]) -> None:
        new = [p for p in params if not self.state.get(p)]
        for param, entry in zip(new, new_states(new, self._split), strict=True):
            self.state[param] = entry

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of torch.optim.AdamW, or of the seeds' optimizers.

        Moments keep at least float32, whatever the parameters' dtype. ValueError, with nothing
        changed, where the loaded values do not fit the dtype here.
        """
        # Last and first among the hooks, so that users' hooks see what torch would show them.
        before = self.register_load_state_dict_pre_hook(
            lambda _, state: checked_state_dict(state, self.param_groups, self._split)
        )
        after = self.register_load_state_dict_post_hook(
            lambda _: unwrap_loaded(self.state, self._params()), prepend=True
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __getstate__(self) -> dict[str, Any]:
        # torch's holds groups, state and defaults only: a copy could not step.
        names = ("max_grad_norm", "skip_nonfinite", "param_precision", "_impl")
        names += ("_step_supports_amp_scaling",)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_tables()

    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """Every parameter, group by group, as exactly as the optimizer knows it.

        Where param_precision="split" keeps a bf16 parameter's float32 master: that one, as a new
        tensor. Other parameters are themselves.
        """
        weights = []
        for p in self._params():
            weight = p.detach()
            if has_remainder(p, self._split):
                entry = self.state.get(p)
                weight = joined(p, entry["remainder"]) if entry else weight.float()
            weights.append(weight)
        return weights

    @torch.no_grad()
    def load_master_weights(self, weights: Sequence[Tensor]) -> None:
        """Sets every parameter to the tensor of `weights` at its place, as master_weights() orders
        them; bf16 parameters of param_precision="split" keep all of a float32 tensor."""
        params = self._params()
        if [w.shape for w in weights] != [p.shape for p in params]:
            raise ValueError(f"weights must be {len(params)} tensors of the parameters' shapes")
        self._create_state(params)
        for p, weight in zip(params, weights, strict=True):
            if has_remainder(p, self._split):
                split_into(weight.to(p.device), p, self.state[p]["remainder"])
            else:
                p.copy_(weight)

    # The step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter with a gradient; returns the closure's loss, or None."""
        if torch.compiler.is_compiling():
            # What is written through addresses cannot be traced: the graph ends before, and goes
            # on after.
            return torch.compiler.disable(self._step)(closure)
        return self._step(closure)

    @torch.no_grad()
    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        collected = self._collect()
        for table in collected.tables:
            kernels = self.kernels_for(table.device, self._impl)
            sums = None
            if self._takes_norm:
                sums = self._last_sums = self._square_sums(kernels, table, collected.classes)
                self._last_positions = collected.positions[0]
            norm = kernels.step(table, self._options(table.device), sums)
            if self._takes_norm:
                self.last_grad_norm = norm
        if self._takes_norm and not collected.tables:  # no gradient at all
            device = next((p.device for p in self._params()), None)
            zero = torch.zeros((), dtype=torch.float32, device=device)
            self.last_grad_norm, self._last_sums = zero, None
        write_back(collected)
        # A backward through the values from before must raise, as after torch's own steps.
        increment_version(collected.updated)
        self._let_go_of_gradients(collected)
        return loss

    def first_nonfinite(self) -> ParameterPosition | None:
        """The first parameter whose gradient held NaN or infinity in the last step, if there is
        one on this rank. Waits for the device."""
        if not self._takes_norm:
            raise RuntimeError("gradients are looked at where max_grad_norm or skip_nonfinite is")
        bad = -1 if self._last_sums is None else int(self._last_sums.bad)
        if bad < 0:
            return None
        group, index = self._last_positions[bad]
        names = self.param_groups[group].get("param_names")
        return ParameterPosition(group, index, names[index] if names else None)

    def _square_sums(self, kernels: StepKernels, table: TensorTable, classes: list) -> GradientSums:
        if all(of_class is None for of_class in classes):
            return kernels.square_sums(table)
        sums = kernels.square_sums(table, by_class=True)
        return GradientSums(shards.add_over_ranks(sums.values, classes), sums.bad)

    def _options(self, device: torch.device) -> StepOptions:
        hyper = []
        for group in self.param_groups:
            lr = group["lr"]
            if not (isinstance(lr, Tensor) and lr.device == device):
                lr = float(lr)
            beta1, beta2 = group["betas"]
            hyper.append(
                (lr, float(beta1), float(beta2), float(group["eps"]), float(group["weight_decay"]))
            )
        scaler = {}
        for name in ("grad_scale", "found_inf"):
            value = getattr(self, name, None)
            scaler[name] = None if value is None else value.to(device, non_blocking=True)
        return StepOptions(hyper, self.max_grad_norm, self.skip_nonfinite, **scaler)

    # Tables, which are kept from step to step where nothing but the gradients' places changes

    def _forget_tables(self) -> None:
        self._collected: Collected | None = None
        self._watch: Any = None
        self._last_sums: GradientSums | None = None
        self._last_positions: list[tuple[int, int]] = []

    def _collect(self) -> Collected:
        if self._watch is not None:
            groups, state = self._watched
            unreplaced = groups is self.param_groups and state is self.state
            if unreplaced and self._watch.refresh() != "stale":
                return self._collected
        self._create_state([p for p in self._params() if p.grad is not None])
        self._collected, self._watch = None, None
        collected = collect_step(self.param_groups, self.state, self._split)
        if collected.plain and collected.tables:
            (table,) = collected.tables
            if self.kernels_for(table.device, self._impl).takes_tensors:
                return collected
            self._collected = collected
            self._watched = self.param_groups, self.state
            self._watch = self.new_watch(*self._watched, collected.rows, table.pointers)
        return collected

    def _let_go_of_gradients(self, collected: Collected) -> None:
        for table in collected.tables:
            if self._collected is collected and table.keep and table.keep[0][GRAD] is not None:
                table.keep = [(*row[:GRAD], None, *row[GRAD + 1 :]) for row in table.keep]
