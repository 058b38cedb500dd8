"""AdamW over multi-tensor kernels, for whatever device there are kernels: the class itself.

Imports torch and siblings only. fastlm.AdamW runs it on CPUs and GPUs, drop_in.AdamW on GPUs alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .collect import (
    GROUP,
    Collected,
    StepOptions,
    check_dtype,
    collect_step,
    has_remainder,
)
from .optimizer_state import (
    REFUSED_OPTIONS,
    check_group,
    check_options,
    checked_state_dict,
    joined,
    new_states,
    split_into,
    unwrap_loaded,
)

_TORCHS_CHOICES = ("foreach", "fused", "capturable")  # among its implementations: no matter here


class ParameterPosition(NamedTuple):
    group: int  # of param_groups
    index: int  # in the group
    name: str | None  # if the optimizer was given named_parameters()


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the defaults of GPT training, clipping, and skipping of bad steps.

    The mathematics and the state dict are torch.optim.AdamW's (formula: fastlm/ops/adamw.py); state
    dicts load both ways. One kernel updates all tensors, in fp32 with constants of fp64: over 1,000
    steps its RMS error against fp64 is at most 1.05 times that of torch's for-loop. Moments are
    float32, also of bfloat16 and float16 parameters (float64 of float64 ones). Defaults that differ
    from torch's: betas (0.9, 0.95), weight_decay 0.

    max_grad_norm: the gradients enter the step clipped to this global L2 norm: over all groups and,
        for DTensors, over all ranks. The gradients themselves stay as they are; no host sync. All
        parameters must be on one device. With FSDP1 or ZeroRedundancyOptimizer, which give each
        rank a part as a tensor of its own, clip outside. Lightning's Trainer refuses its own
        gradient_clip_val with this class, as with torch's fused=True: set max_grad_norm instead.
    skip_nonfinite: a step whose norm is NaN or infinite leaves parameters, moments and step counter
        as they were. Default: on if max_grad_norm is set.
    param_precision: "split" keeps, beside each bfloat16 parameter, the lower 16 bits of its float32
        value (int16, `state[p]["remainder"]`): a run has the bits of a float32 run with the same
        gradients, in 2 + 2 bytes. `master_weights()` are those float32 values.
    impl: "auto", "cpp" (CPU), "triton" (CUDA, ROCm) or "torch": torch.optim.AdamW's own step, with
        its moments; clipping then changes the gradients, and the norm is read on the host. Other
        devices run "torch". Arguments that choose among torch's implementations (fused, foreach,
        capturable) are accepted and do nothing.

    After a step with a norm, `last_grad_norm` is the norm before clipping: a 0-d tensor on the
    device, so that reading it, and nothing else, waits for the device; `first_nonfinite()` tells
    whose gradient made it NaN or infinite.

    lr may be a tensor, which is read on its device: a CUDA graph's replay sees it change. Take one
    step before the capture, or it raises; other hyperparameters keep the values of the capture.
    DTensors cannot be captured.
    """

    last_grad_norm: Tensor | None = None
    # As torch's constructor says for fused=True: a GradScaler then hands its scale and found_inf to
    # the step, which it would otherwise read on the host.
    _step_supports_amp_scaling = True

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
        for name in torch_options:
            if name not in (*_TORCHS_CHOICES, *REFUSED_OPTIONS):
                raise TypeError(f"{type(self).__name__} has no argument {name!r}")
        check_options(torch_options, "AdamW")
        if skip_nonfinite is None:
            skip_nonfinite = max_grad_norm is not None
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self.param_precision, self._impl = param_precision, impl
        self._forget()
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @staticmethod
    def kernels_for(device: torch.device, impl: str) -> Any:
        """The module with the kernels for tensors on `device`; ValueError if there are none.

        Its functions are sum_squares, step and scale_gradients (kernels/adamw.py).
        """
        raise NotImplementedError

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
        try:
            self._check_last_group()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_last_group(self) -> None:
        group = self.param_groups[-1]
        check_group(group, f"group {len(self.param_groups) - 1}")
        for option in ("max_grad_norm", "skip_nonfinite", "param_precision", "impl"):
            if option in group:
                raise ValueError(
                    f"{option} is the optimizer's, not a group's: pass it to AdamW "
                    f"beside the groups (ZeroRedundancyOptimizer puts its arguments into groups; "
                    f"its ranks hold parts of the parameters: clip before its step)"
                )
        for param in group["params"]:
            self.kernels_for(param.device, self._impl)
            _check_parameter(param, self._split, self._takes_norm)
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
        self.state.update(zip(new, new_states(new, self._split), strict=True))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, of torch.optim.AdamW, or of the seeds' optimizers.

        Moments keep at least float32, whatever the parameters' dtype. ValueError, with nothing
        changed, if the loaded values do not fit the dtype here.
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
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        # What kernel modules keep from step to step (TensorTable.cache).
        self._caches: dict[Any, dict] = {}
        # Of the last step's tables: SquareSum.bad, and each row's (group, index).
        self._last: list[tuple[Tensor | int, Any]] = []

    @torch.no_grad()
    def master_weights(self) -> list[Tensor]:
        """Every parameter, group by group, as exactly as the optimizer knows it.

        If param_precision="split" keeps a bf16 parameter's float32 master: that one, as a new
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
        for i, group in enumerate(self.param_groups):
            check_group(group, f"group {i}")
        self._update()
        return loss

    def _update(self) -> None:
        self._update_collected(self._collect())

    def _collect(self) -> Collected:
        # Read afresh at every step: whatever has become of parameters, gradients and state is seen.
        self._create_state([p for p in self._params() if p.grad is not None])
        return collect_step(self.param_groups, self.state, self._split, self._caches)

    def _update_collected(self, collected: Collected) -> None:
        tables = collected.tables
        kernels = [self.kernels_for(table.device, self._impl) for table in tables]
        square_sum = None
        if self._takes_norm and tables:
            square_sum, bad = collected.square_sum(kernels)
            self._last = [(b, table.rows[:, GROUP:]) for b, table in zip(bad, tables, strict=True)]
        norms = [
            k.step(table, self._options(table.device), square_sum)
            for k, table in zip(kernels, tables, strict=True)
        ]
        if square_sum is not None:
            self.last_grad_norm = max(norms, key=Tensor.element_size)  # float64 if one is
        collected.write_back()
        # A backward through the values from before must raise, as after torch's own steps.
        increment_version(collected.updated)

    @property
    def last_bad_row(self) -> Tensor | int:
        """The first row of the last step's tables, end to end, whose gradient was not finite; -1 if
        there was none on this rank. Kept on the device; for first_nonfinite(row)."""
        if len(self._last) == 1:
            return self._last[0][0]
        row, begin = -1, sum(len(positions) for _, positions in self._last)
        for bad, positions in reversed(self._last):
            begin -= len(positions)
            row = torch.where(torch.as_tensor(bad) >= 0, bad + begin, row)
        return row

    def first_nonfinite(self, row: int | None = None) -> ParameterPosition | None:
        """The first parameter whose gradient held NaN or infinity in the last step, if there is
        one on this rank. Waits for the device.

        row: the `last_bad_row` of an earlier step, in which the same parameters had gradients.
        """
        if not self._takes_norm:
            raise RuntimeError("first_nonfinite() needs max_grad_norm or skip_nonfinite")
        if row is not None:
            found = []
            for _, positions in self._last:
                found += [positions[row]] if 0 <= row < len(positions) else []
                row -= len(positions)
        else:
            found = [positions[bad] for bad, positions in self._last if bad >= 0]
        if not found:
            return None
        group, index = min(tuple(map(int, position)) for position in found)
        names = self.param_groups[group].get("param_names")
        return ParameterPosition(group, index, names[index] if names else None)

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


def _check_parameter(param: Tensor, split: bool, takes_norm: bool) -> None:
    if torch.nn.parameter.is_lazy(param):
        shape = "not known yet"
    else:
        shape = tuple(param.shape)
        overlaps = zip(param.stride(), param.shape, strict=True)
        if any(stride == 0 and size > 1 for stride, size in overlaps):
            raise ValueError(f"a parameter (shape {shape}) overlaps itself: it was expanded")
    check_dtype(param, f"a parameter (shape {shape})")
    if split and param.dtype == torch.float16:
        raise TypeError(
            f'param_precision="split" takes bfloat16 parameters (and full ones), not float16 '
            f"(shape {shape})"
        )
    if takes_norm and getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            "max_grad_norm and skip_nonfinite would take the norm of this rank's shards alone: "
            "with FullyShardedDataParallel leave them out and call model.clip_grad_norm_(max_norm) "
            "before step(), or use fully_shard (FSDP2)"
        )
