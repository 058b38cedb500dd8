"""AdamW's state: its initial values, checks of what is loaded, the fp32 master of bf16 weights.

Imports torch and siblings only.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .collect import (
    has_remainder,
    is_dtensor,
    local_part,
    moment_dtype,
    placed_as,
    position_name,
)

REFUSED_OPTIONS = ("amsgrad", "maximize", "differentiable")
_KEYS = ("step", "exp_avg", "exp_avg_sq", "remainder")


class _Pool:
    """Places small tensors side by side in blocks of 64 kB: a step over thousands of scattered ones
    takes a sixth longer."""

    def __init__(self) -> None:
        self.rest = torch.zeros(0, device="cpu")

    def zeros(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = shape.numel()
        size = -(-numel // 16) * 16 if shape else 1  # vectors start at multiples of 64 bytes
        if (self.rest.dtype, self.rest.device) != (dtype, device) or len(self.rest) < size:
            self.rest = torch.zeros(1 << 14, dtype=dtype, device=device)
        part, self.rest = self.rest[:numel], self.rest[size:]
        return part.view(shape)


def new_states(params: Sequence[Tensor], split: bool) -> list[dict[str, Tensor]]:
    """State before the first step: zeros, the moments in each parameter's shape."""
    states: list[dict[str, Tensor]] = [{} for _ in params]
    for key in _KEYS:  # a step goes over the tensors key by key, too
        pool = _Pool()
        for param, state in zip(params, states, strict=True):
            dtype = torch.int16 if key == "remainder" else moment_dtype(param)
            if key == "step":
                state[key] = pool.zeros(torch.Size(), torch.float32, param.device)
            elif key == "remainder" and not has_remainder(param, split):
                continue
            elif is_dtensor(param) or not (param.is_contiguous() and 0 < param.numel() <= 1 << 12):
                state[key] = torch.zeros_like(param, dtype=dtype)
            else:
                state[key] = pool.zeros(param.shape, dtype, param.device)
    return states


def check_options(options: dict[str, Any], what: str) -> None:
    """ValueError for an option of torch's class that `what` sets and this one does not have."""
    for name in REFUSED_OPTIONS:
        if options.get(name):
            raise ValueError(
                f"{what}: {name}={options[name]} is not supported; torch.optim.AdamW has it"
            )
    if options.get("weight_decay") and not options.get("decoupled_weight_decay", True):
        raise ValueError(
            f"{what}: weight_decay={options['weight_decay']} with decoupled_weight_decay=False, as "
            f"torch.optim.Adam's, is not supported; AdamW's is decoupled: drop that option"
        )


def check_group(group: dict[str, Any], what: str) -> None:
    check_options(group, what)
    for name in ("lr", "betas", "eps", "weight_decay"):
        if name not in group:
            raise ValueError(f"{what} has no {name!r}, which AdamW needs")


class Kept:
    """A tensor that torch's load_state_dict leaves alone: it casts state to the weights' dtype."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def checked_state_dict(
    state_dict: dict[str, Any], groups: Sequence[dict], split: bool
) -> dict[str, Any]:
    """`state_dict` with its tensors converted for these parameters, and Kept.

    It may come from this class, torch.optim.AdamW or the seeds' optimizers. Raises ValueError,
    before anything has changed, if something would be lost: values that the dtype here cannot hold,
    a remainder without param_precision="split", entries that AdamW does not have.
    """
    # Which of torch's implementations ran is the other optimizer's affair.
    own = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    saved_groups = [{**group, **own} for group in state_dict["param_groups"]]
    for i, group in enumerate(saved_groups):
        check_group(group, f"group {i} of the state dict")
    saved_ids = [i for group in saved_groups for i in group["params"]]
    params = [
        (param, position_name(groups, g, i))
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    ]
    state = dict(state_dict["state"])
    if len(saved_ids) == len(params):  # else torch says what is wrong
        for saved_id, (param, what) in zip(saved_ids, params, strict=True):
            if state.get(saved_id):
                state[saved_id] = _converted(state[saved_id], param, split, what)
    return {**state_dict, "state": state, "param_groups": saved_groups}


def _converted(entry: dict[str, Any], param: Tensor, split: bool, what: str) -> dict[str, Any]:
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"the state of {what} has {key!r}, which AdamW does not")
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in entry:
            raise ValueError(f"the state of {what} has no {key!r}")
    remainder = entry.get("remainder")
    kept = has_remainder(param, split)
    if remainder is not None and not kept and bool((remainder != 0).any()):
        raise ValueError(
            f"the state of {what} holds the lower half of its float32 weights: load it with "
            f'param_precision="split" and bfloat16 parameters, or export master_weights()'
        )
    step = float(entry["step"])
    if step != float(torch.tensor(step, dtype=torch.float32, device="cpu")):
        raise ValueError(f"the step counter of {what}, {entry['step']}, is no float32 number")
    result: dict[str, Any] = {"step": torch.tensor(step, dtype=torch.float32, device="cpu")}
    for key in ("exp_avg", "exp_avg_sq"):
        result[key] = Kept(_exactly(entry[key], param, moment_dtype(param), f"{key} of {what}"))
    if kept:
        # Without a remainder the weights are their own fp32 master.
        if remainder is None:
            remainder = torch.zeros_like(param, dtype=torch.int16)
        result["remainder"] = Kept(_exactly(remainder, param, torch.int16, f"remainder of {what}"))
    return result


def _exactly(value: Any, param: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """A copy of `value` in `dtype`, on the device and in the layout of `param`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is no tensor but {type(value).__name__}")
    if value.shape != param.shape:
        raise ValueError(f"{what} has shape {tuple(value.shape)}, not {tuple(param.shape)}")
    if value.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"{what} has dtype {value.dtype}, not {dtype}")
    result = torch.empty_like(param, dtype=dtype).copy_(value)
    if torch.promote_types(value.dtype, dtype) != dtype:
        back = local_part(result).to(value.dtype)
        here = local_part(value).to(back.device)
        if not bool(((back == here) | (here != here)).all()):
            raise ValueError(
                f"{what} is {value.dtype} with values that {dtype} cannot hold: loading would "
                f"lose them; convert it yourself if that is meant"
            )
    return result


def unwrap_loaded(state: Any, params: Sequence[Tensor]) -> None:
    """Ends a load: unwraps Kept tensors, moves step counters to the parameters' devices."""
    for param in params:
        entry = state.get(param) or {}
        for key, value in entry.items():
            entry[key] = value.tensor if isinstance(value, Kept) else value.to(param.device)


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master: the bf16 `param` is its upper half, rounded, the int16 `remainder` its lower
    one."""
    high, rest = local_part(param.detach()), local_part(remainder)
    bits = (high.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)
    return placed_as(bits.view(torch.float32), param)


def split_into(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Writes the fp32 `master` into a bf16 parameter and its int16 remainder."""
    bits = local_part(master).to(torch.float32).contiguous().view(torch.int32)
    # NaN becomes the quiet one: others would round to an infinity or, all bits set, to -0.
    bits = torch.where(bits.view(torch.float32).isnan(), 0x7FC00000, bits)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    local_part(param.detach()).copy_(high)
    local_part(remainder).copy_(bits.to(torch.int16))
