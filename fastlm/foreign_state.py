"""What a checkpoint of unknown origin may hold: checks of an optimizer's state, and plain words."""

import math
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from fastlm.kernels.collect import local_part

_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's wrappers
# In every optimizer that has them: the settings, and the moments of the parameter's shape.
_NEVER_NEGATIVE = ("lr", "betas", "eps", "weight_decay", "momentum")
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")


def check_optimizer_state(
    optimizer: torch.optim.Optimizer, stored: Any, names: Mapping[int, str]
) -> None:
    """Raises ValueError, naming the parameter, unless `stored` is a state dict for `optimizer`.

    names: id(parameter) -> its name, where it is known. State dicts map by position: parameters in
    another order would get one another's moments, if their names or shapes did not tell.
    """
    stored = stored if isinstance(stored, Mapping) else {}
    groups, state = stored.get("param_groups"), stored.get("state")
    if (
        not isinstance(state, Mapping)
        or not isinstance(groups, list)
        or not all(map(_lists, groups))
    ):
        raise ValueError("it is no state dict of an optimizer")
    sizes = [len(group["params"]) for group in groups]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise ValueError(f"it has groups of {shortened(sizes)} parameters, not of {expected}")
    ids = [saved_id for group in groups for saved_id in group["params"]]
    if not all(isinstance(i, int | str) for i in ids) or len(set(ids)) != len(ids):
        raise ValueError("its parameters are not numbered")
    for g, (group, own) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        _check_settings(group, own, g)
        stored_names = group.get("param_names")
        if stored_names == own.get("param_names"):  # given to both by the caller, as he likes
            stored_names = None
        for i, (saved_id, param) in enumerate(zip(group["params"], own["params"], strict=True)):
            name = names.get(id(param), f"parameter {i} of group {g}")
            if id(param) in names and isinstance(stored_names, list) and i < len(stored_names):
                there = stored_names[i]
                if not isinstance(there, str) or own_name(there, {name}) != name:
                    raise ValueError(f"its {shortened(there)} stands where {name} is here")
            _check_entry(state.get(saved_id, {}), param, name)


def _lists(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), list)


def _check_settings(group: Mapping[str, Any], own: Mapping[str, Any], g: int) -> None:
    """The numbers of a group: learning rate, betas, …"""
    for key, value in own.items():
        if key in ("params", "param_names") or not isinstance(value, float | int | tuple | list):
            continue
        if isinstance(value, bool):
            continue
        if key not in group:
            raise ValueError(f"its group {g} has no {key}")
        stored = group[key]
        several = isinstance(value, tuple | list)
        if several and not (isinstance(stored, tuple | list) and len(stored) == len(value)):
            raise ValueError(f"{key} of its group {g} is {shortened(stored)}")
        least = 0 if key in _NEVER_NEGATIVE else -math.inf
        limit = 1 if key == "betas" else math.inf
        pairs = zip(stored, value, strict=True) if several else [(stored, value)]
        for number, here in pairs:
            as_here = number is None and here is None
            if not as_here and not (is_number(number) and least <= number < limit):
                raise ValueError(f"{key} of its group {g} is {shortened(stored)}")


def _check_entry(entry: Any, param: Tensor, name: str) -> None:
    """What is stored of one parameter."""
    if not isinstance(entry, Mapping):
        raise ValueError(f"the state of {name} is a {type(entry).__name__}")
    for key in _MOMENTS:
        moment = entry.get(key)
        if isinstance(moment, Tensor) and moment.device.type == "meta":
            raise ValueError(f"{key} of {name} has no memory")
        if moment is not None and shape_of(moment) != shape_of(param):
            raise ValueError(f"{key} of {name} is {shape_of(moment)}, not {shape_of(param)}")
    step = entry.get("step", 0)
    if not is_number(step) or step < 0:
        raise ValueError(f"the step of {name} is {shortened(step)}")


def weight_differences(
    state: Mapping[str, Any], expected: Mapping[str, Any], *, values: bool = True
) -> list[str]:
    """What keeps the weights `state` from being loaded in the place of `expected`; usually nothing.

    values: compares the values of matrices that are one in the model, too.
    """
    shapes = [
        f"{shortened(name, quoted=False)} is {shape_of(state.get(name))}, not "
        f"{shape_of(expected.get(name))}"
        for name in sorted(expected.keys() | state.keys())
        if shape_of(state.get(name)) != shape_of(expected.get(name))
    ]
    return shapes or _unreadable(state, expected) or (_untied(state, expected) if values else [])


def _unreadable(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Weights of the right shape that cannot be copied into the model's."""
    return [
        f"{name} is of {state[name].dtype} on {state[name].device}, not of {tensor.dtype}"
        for name, tensor in expected.items()
        if isinstance(tensor, Tensor) and not _can_be_copied(state[name], tensor)
    ]


def _can_be_copied(source: Tensor, target: Tensor) -> bool:
    if source.device.type == "meta" != target.device.type:  # without memory
        return False
    both_real = source.is_floating_point() and target.is_floating_point()
    return both_real or source.dtype == target.dtype


def _untied(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names under which the model has one matrix and the checkpoint two different ones."""
    first_name: dict[tuple, str] = {}
    result = []
    for name, tensor in expected.items():
        if not isinstance(tensor, Tensor):  # of a module's get_extra_state
            continue
        address = local_part(tensor).data_ptr()
        if address == 0:  # empty, or without memory (the meta device)
            continue
        first = first_name.setdefault((address, tensor.shape), name)
        a, b = local_part(state[first]), local_part(state[name])
        # Saved tied, they share their memory here too (NaNs would not be equal).
        differ = a.data_ptr() != b.data_ptr() and (a.dtype != b.dtype or not torch.equal(a, b))
        if first != name and differ:
            result.append(f"{first} and {name} are two matrices, not one")
    return result


def own_name(stored: str, known: Container[str]) -> str:
    """A stored name as the model knows it: without the prefixes of wrappers around the model that
    was saved, but for those that its own names begin with."""
    while stored not in known and stored.startswith(_PREFIXES):
        stored = stored.split(".", 1)[1]
    return stored


def is_number(value: Any) -> bool:
    """A finite real number, or a tensor of one."""
    if isinstance(value, Tensor):
        plain = shape_of(value) == "()" and not value.is_complex()
        return plain and value.device.type != "meta" and bool(torch.isfinite(value))
    return isinstance(value, int | float) and abs(value) < math.inf


def shape_of(value: Any) -> str:
    """The shape of a plain tensor, in words; or what else `value` is."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided or value.is_quantized:
            return "no plain tensor"
        return str(tuple(value.shape))
    return "missing" if value is None else f"a {type(value).__name__}"


def shortened(value: Any, *, quoted: bool = True) -> str:
    """`value` for a line of text: its start if it is long, escapes for what does not print."""
    if isinstance(value, str):
        text = value[:80] + "…" * (len(value) > 80)
        return ascii(text) if quoted or not text.isprintable() else text
    if isinstance(value, Tensor):
        return f"a tensor of shape {shape_of(value)}"
    if type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 256):
        return repr(value)
    if isinstance(value, list | tuple) and len(value) < 9 and all(type(v) is int for v in value):
        return f"[{', '.join(shortened(v) for v in value)}]"
    return f"a {type(value).__name__}"


def first_line(error: BaseException) -> str:
    """What went wrong, without torch.load's advice to run whatever code a file holds."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", text):
        return f"it holds a {found[1]}, which torch.load(weights_only=True) refuses"
    lines = [line.strip() for line in text.splitlines() if "weights_only" not in line]
    return next(filter(None, lines), type(error).__name__)[:300]
