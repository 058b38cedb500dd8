"""AdamW's state: what it starts as, what may be loaded into it, the fp32 master of bf16 weights.

Imports torch and siblings only.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import shards
from .collect import moment_dtype, position_name

_KEYS = ("step", "exp_avg", "exp_avg_sq", "remainder")
_POOLED = 1 << 14  # elements; larger ones do not come by the thousand


def new_states(params: Sequence[Tensor], split: bool) -> list[dict[str, Tensor]]:
    """State of parameters that have had no step: zeros."""
    keys = ("exp_avg", "exp_avg_sq")
    states: list[dict[str, Tensor]] = [{"step": step} for step in step_counters(params)]
    with_remainder = [i for i, param in enumerate(params) if has_remainder(param, split)]
    for key in (*keys, "remainder"):
        rows = range(len(params)) if key in keys else with_remainder
        dtypes = [moment_dtype(params[i]) if key in keys else torch.int16 for i in rows]
        made = zeros_like_each([params[i] for i in rows], dtypes)
        for i, tensor in zip(rows, made, strict=True):
            states[i][key] = tensor
    return states


def zeros_like_each(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """For each parameter zeros of its shape and layout; those of small ones share their memory.

    Thousands of tensors lie scattered otherwise, and so does what torch keeps about each: a step
    of 2,000 small tensors takes an eighth longer.
    """
    pooled: dict[tuple, list[int]] = {}
    made: list[Tensor | None] = [None] * len(params)
    for i, (param, dtype) in enumerate(zip(params, dtypes, strict=True)):
        ordinary = not shards.is_dtensor(param) and param.is_contiguous()
        if ordinary and 0 < param.numel() <= _POOLED:
            pooled.setdefault((param.device, dtype), []).append(i)
        else:
            made[i] = torch.zeros_like(param, dtype=dtype)
    for (device, dtype), rows in pooled.items():
        # Each starts at a multiple of 64 bytes or more, for wide accesses.
        sizes = [-(-params[i].numel() // 64) * 64 for i in rows]
        pool = torch.zeros(sum(sizes), dtype=dtype, device=device)
        for i, part in zip(rows, pool.split(sizes), strict=True):
            made[i] = part[: params[i].numel()].view(params[i].shape)
    return made  # type: ignore[return-value]


def has_remainder(param: Tensor, split: bool) -> bool:
    return split and param.dtype == torch.bfloat16


def step_counters(params: Sequence[Tensor]) -> list[Tensor]:
    """A zero for each parameter, on its device; one tensor a device holds them."""
    devices = [shards.local_part(param).device for param in params]
    counters = {
        device: iter(torch.zeros(n, dtype=torch.float32, device=device).unbind())
        for device, n in Counter(devices).items()
    }
    return [next(counters[device]) for device in devices]


class Kept:
    """A tensor that torch's load_state_dict leaves alone: it casts state to the weights' dtype."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def checked_state_dict(
    state_dict: dict[str, Any], groups: Sequence[dict], split: bool
) -> dict[str, Any]:
    """`state_dict` with its tensors converted for these parameters, and Kept.

    Of this class, of torch.optim.AdamW or of the seeds' optimizers. ValueError, before anything has
    changed, where something would be lost: values that the dtype here cannot hold, a remainder
    without param_precision="split", entries that AdamW does not have.
    """
    saved_groups = state_dict["param_groups"]
    for i, group in enumerate(saved_groups):
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise ValueError(f"the state dict's group {i} has {option}=True: not supported")
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
    # Which of torch's implementations ran is the other optimizer's affair.
    own = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
    return {
        **state_dict,
        "state": state,
        "param_groups": [{**group, **own} for group in saved_groups],
    }


def _converted(entry: dict[str, Any], param: Tensor, split: bool, what: str) -> dict[str, Any]:
    unknown = [key for key in entry if key not in _KEYS]
    missing = [key for key in _KEYS[:3] if key not in entry]
    if unknown or missing:
        raise ValueError(
            f"the state of {what} has {unknown[0]!r}, which AdamW does not"
            if unknown
            else f"the state of {what} has no {missing[0]!r}"
        )
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
        # Weights that came without a remainder are their own fp32 master.
        if remainder is None:
            remainder = torch.zeros((), dtype=torch.int16, device=param.device)
        result["remainder"] = Kept(
            _exactly(remainder, param, torch.int16, f"remainder of {what}", scalar=True)
        )
    return result


def _exactly(
    value: Any, param: Tensor, dtype: torch.dtype, what: str, scalar: bool = False
) -> Tensor:
    """A copy of `value` in `dtype`, on the device and in the layout of `param`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} is no tensor but {type(value).__name__}")
    if value.shape != param.shape and not (scalar and value.dim() == 0):
        raise ValueError(f"{what} has shape {tuple(value.shape)}, not {tuple(param.shape)}")
    if value.is_floating_point() != dtype.is_floating_point:
        raise ValueError(f"{what} has dtype {value.dtype}, not {dtype}")
    result = torch.empty_like(param, dtype=dtype).copy_(value)
    if torch.promote_types(value.dtype, dtype) != dtype:
        back = shards.local_part(result).to(value.dtype)
        here = shards.local_part(value).to(back.device)
        if not bool(((back == here) | (here != here)).all()):
            raise ValueError(
                f"{what} is {value.dtype} with values that {dtype} cannot hold: loading would "
                f"lose them; convert it yourself if that is meant"
            )
    return result


def unwrap_loaded(state: Any, params: Sequence[Tensor]) -> None:
    """The end of a load: Kept tensors become plain, step counters views into one tensor again."""
    loaded = [param for param in params if state.get(param)]
    for param, counter in zip(loaded, step_counters(loaded), strict=True):
        entry = state[param]
        for key, value in entry.items():
            if isinstance(value, Kept):
                entry[key] = value.tensor
        entry["step"] = counter.copy_(entry["step"])


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The fp32 master whose upper half is the bf16 `param`, rounded, and whose lower half is the
    int16 `remainder`."""
    high, rest = shards.local_part(param.detach()), shards.local_part(remainder)
    bits = (high.view(torch.int16).to(torch.int32) << 16) + rest.to(torch.int32)
    return shards.like(bits.view(torch.float32), param)


def split_into(master: Tensor, param: Tensor, remainder: Tensor) -> None:
    """Writes the fp32 `master` into a bf16 parameter and its int16 remainder."""
    bits = shards.local_part(master).to(torch.float32).contiguous().view(torch.int32)
    # NaN becomes the quiet one: others would round to an infinity or, all bits set, to -0.
    bits = torch.where(bits.view(torch.float32).isnan(), 0x7FC00000, bits)
    high = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    shards.local_part(param.detach()).copy_(high)
    shards.local_part(remainder).copy_(bits.to(torch.int16))
