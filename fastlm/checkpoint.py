"""Checkpoints: one file, never half-written, its damage detected, loadable without running code.

A checkpoint is a torch.save file of tensors and plain values, readable with
`torch.load(path, weights_only=True)`. What stands in it is here; how the file is written, and its
damage found, is in checkpoint_file.py.
"""

import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fastlm.checkpoint_file import digest_holds, inflates, write_checkpoint
from fastlm.checkpoint_file import remove_stale_temporaries as remove_stale_temporaries
from fastlm.errors import CheckpointError
from fastlm.foreign_state import (
    check_optimizer_state,
    first_line,
    is_number,
    shape_of,
    shortened,
    strip_prefixes,
)
from fastlm.hardware import is_out_of_memory

FORMAT_VERSION = 1
_MODEL_KEYS = ("model_state", "model_state_dict", "model")
_OPTIMIZER_KEYS = ("optimizer_state", "optimizer_state_dict", "optimizer")
_ITERATION_KEYS = ("iteration", "step", "iter_num")


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    out: str | os.PathLike | IO[bytes],
    **extra: Any,
) -> None:
    """Writes model, optimizer and `iteration` (completed steps, the index of the next) to `out`.

    Keys: model_state, optimizer_state (unless None), iteration, format_version, and those of
    `extra` (tensors and plain values only). Parameter names never carry a wrapper's prefix.
    A path is written under a temporary name, synced and renamed: at every moment there is the old
    file or the whole new one. Raises OutputError if it cannot be written.
    """
    payload = checkpoint_payload(model, optimizer, iteration, **extra)
    if isinstance(out, str | os.PathLike):
        write_checkpoint(payload, Path(out))
    else:
        torch.save(payload, out)


def checkpoint_payload(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, iteration: int, **extra: Any
) -> dict[str, Any]:
    """What save_checkpoint writes; its tensors are the model's and the optimizer's own."""
    payload = {
        "format_version": FORMAT_VERSION,
        "model_state": unwrap(model).state_dict(),
        "iteration": iteration,
        **extra,
    }
    if optimizer is not None:
        payload["optimizer_state"] = optimizer.state_dict()
    return payload


def load_checkpoint(
    model: nn.Module | str | os.PathLike | IO[bytes],
    optimizer: torch.optim.Optimizer | nn.Module | None = None,
    src: str | os.PathLike | IO[bytes] | torch.optim.Optimizer | None = None,
) -> int:
    """Restores `model`, and `optimizer` unless None, from `src`; returns the stored iteration.

    Takes (model, optimizer, src) and (src, model, optimizer), src a path or a binary file; this
    module's keys, those of nanoGPT and of the GPT tutorial (model_state_dict, step, …); names with
    the prefixes of torch.compile and DistributedDataParallel. Raises CheckpointError for a missing
    or damaged file and for another model's or optimizer's, before anything is changed. Warns if the
    file holds no state for `optimizer`.
    """
    if not isinstance(model, nn.Module):
        model, optimizer, src = optimizer, src, model
    payload = read_checkpoint(src)
    iteration = iteration_of(payload)
    model_state = _fitting_state(model, payload)
    if optimizer is not None and holds_optimizer_state(payload):
        restore_optimizer(optimizer, payload, model)
    elif optimizer is not None:
        warnings.warn(
            f"{src}: holds no optimizer state; the optimizer stays as it is. Pass optimizer=None "
            f"to load weights alone",
            stacklevel=2,
        )
    unwrap(model).load_state_dict(model_state)
    return iteration


def iteration_of(payload: Mapping[str, Any]) -> int:
    """The stored step number; 0 if there is none. Raises CheckpointError for what is no number."""
    return _count(_first(payload, _ITERATION_KEYS), "step number") or 0


def holds_optimizer_state(payload: Mapping[str, Any]) -> bool:
    """False for weights alone."""
    return _first(payload, _OPTIMIZER_KEYS) is not None


def read_checkpoint(src: str | os.PathLike | IO[bytes]) -> dict[str, Any]:
    """The checkpoint's content on the CPU, its digest checked (other programs' files have none).

    Raises CheckpointError for a file that is missing, damaged, none, or compressed, which could
    fill the memory from a few bytes.
    """
    is_path = isinstance(src, str | os.PathLike)
    try:
        if is_path and not Path(src).is_file():
            raise CheckpointError(f"{src}: no such checkpoint")
        if is_path and not digest_holds(Path(src)):
            raise CheckpointError(f"{src}: is damaged (its SHA-256 does not match)")
        if is_path and inflates(Path(src)):
            raise CheckpointError(f"{src}: is compressed, which no checkpoint is; save it again")
        payload = torch.load(src, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises anything: pickle, zip, key, decode errors
        raise CheckpointError(f"{src}: is no readable checkpoint ({first_line(error)})") from error
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{src}: is no checkpoint but a {type(payload).__name__}")
    return dict(payload)


def restore_model(model: nn.Module, payload: Mapping[str, Any]) -> None:
    """Loads the weights of a checkpoint, or of a bare state dict."""
    unwrap(model).load_state_dict(_fitting_state(model, payload))


def restore_optimizer(
    optimizer: torch.optim.Optimizer, payload: Mapping[str, Any], model: nn.Module | None = None
) -> None:
    """Loads the optimizer state of a checkpoint that holds one. `model` names its parameters.

    Raises CheckpointError, the optimizer unchanged, if a moment has another shape than its
    parameter, stands under another name, or a setting is none.
    """
    stored = _first(payload, _OPTIMIZER_KEYS)
    named = [] if model is None else unwrap(model).named_parameters()
    before = optimizer.state, optimizer.param_groups
    try:
        check_optimizer_state(optimizer, stored, {id(p): strip_prefixes(n) for n, p in named})
        optimizer.load_state_dict(stored)
    except Exception as error:  # a foreign state dict raises anything: attribute, index errors, …
        optimizer.state, optimizer.param_groups = before
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit: {first_line(error)}; group the "
            f"parameters as its run did"
        ) from error


def restore_scaler(scaler: torch.amp.GradScaler, payload: Mapping[str, Any]) -> None:
    """Sets the loss scale to a checkpoint's, if it has one. Raises CheckpointError for no scale."""
    stored = payload.get("scaler")
    if stored is None or (isinstance(stored, Mapping) and not stored):  # without float16
        return
    try:
        for key in ("scale", "growth_factor", "backoff_factor", "growth_interval"):
            if not is_number(stored[key]) or not stored[key] > 0:
                raise ValueError(f"{key} is {shortened(stored[key])}")
        if _count(stored["_growth_tracker"], "growth tracker") is None:
            raise ValueError("it has no growth tracker")
        scaler.load_state_dict(dict(stored))
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's loss scale cannot be restored ({first_line(error)})"
        ) from error


def _fitting_state(model: nn.Module, payload: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, names without prefixes, checked against those of `model`."""
    stored = _first(payload, _MODEL_KEYS)
    stored = payload if stored is None else stored
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"the checkpoint holds no weights but a {type(stored).__name__}")
    odd = [name for name in stored if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"the checkpoint holds weights without a name: {shortened(odd[0])}")
    state = {strip_prefixes(name): tensor for name, tensor in stored.items()}
    expected = unwrap(model).state_dict()
    differences = [
        f"{shortened(name, quoted=False)} is {shape_of(state.get(name))}, not "
        f"{shape_of(expected.get(name))}"
        for name in sorted(expected.keys() | state.keys())
        if shape_of(state.get(name)) != shape_of(expected.get(name))
    ]
    differences = differences or _unreadable(state, expected) or _untied(state, expected)
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another architecture: {differences[0]}{more}; set the model's "
            f"size as the checkpoint's run did"
        )
    return state


def _unreadable(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Weights of the right shape that cannot be copied into the model's."""
    return [
        f"{name} is of {state[name].dtype} on {state[name].device}, not of {tensor.dtype}"
        for name, tensor in expected.items()
        if isinstance(tensor, torch.Tensor) and not _can_be_copied(state[name], tensor)
    ]


def _can_be_copied(source: torch.Tensor, target: torch.Tensor) -> bool:
    if source.device.type == "meta" != target.device.type:  # without memory
        return False
    both_real = source.is_floating_point() and target.is_floating_point()
    return both_real or source.dtype == target.dtype


def _untied(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    """Names under which the model has one matrix and the checkpoint two different ones."""
    first_name: dict[tuple, str] = {}
    result = []
    for name, tensor in expected.items():
        if tensor.data_ptr() == 0:  # empty, or without memory (the meta device)
            continue
        first = first_name.setdefault((tensor.data_ptr(), tensor.shape), name)
        a, b = state[first], state[name]
        # Saved tied, they share their memory here too (NaNs would not be equal).
        differ = a.data_ptr() != b.data_ptr() and (a.dtype != b.dtype or not torch.equal(a, b))
        if first != name and differ:
            result.append(f"{first} and {name} are two matrices, not one")
    return result


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint in a run's directory, known by its name and what it says of itself."""

    path: Path
    prefix: str
    step: float  # completed steps; of an unreadable file its name's, infinite for _final and _model
    run_id: str | None  # None: written by another program, or unreadable
    saved_at: float  # seconds since the epoch; of other programs' the file's time
    readable: bool


def list_checkpoints(
    directory: str | os.PathLike, prefix: str | None = None, names: str = r"\d+|final"
) -> list[CheckpointFile]:
    """The files {prefix}_{name}.pt in `directory`, newest first.

    prefix None: any. names: pattern of what stands behind it. A run's files are ordered by their
    steps, and runs (a prefix and a run id) by the time that they have stored: a file's own time is
    another after `cp -r`. Only the pickled record is read, milliseconds for a file of any size; an
    unreadable one counts as the latest run's of its prefix.
    """
    directory = Path(directory)
    form = re.compile(f"({'.+' if prefix is None else re.escape(prefix)})_({names})\\.pt")
    if not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        name = form.fullmatch(path.name)
        # What does not exist is a link without its target: it is reported, not overlooked.
        if name and (path.is_file() or not path.exists()):
            found.append(_described(path, *name.groups()))
    newest: dict[tuple, float] = {}
    for file in found:
        if file.readable:
            run = (file.prefix, file.run_id)
            newest[run] = max(newest.get(run, 0.0), file.saved_at)

    def age(file: CheckpointFile) -> tuple:
        times = {run: time for run, time in newest.items() if run[0] == file.prefix}
        run = (file.prefix, file.run_id)
        if not file.readable:
            run = max(times, key=times.get, default=run)
        return (-times.get(run, file.saved_at), str(run), -file.step, -file.saved_at)

    return sorted(found, key=age)


def _described(path: Path, prefix: str, name: str) -> CheckpointFile:
    saved_at = path.lstat().st_mtime
    try:
        # Mapped, the tensors are not read. A damaged file raises anything.
        header = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        step = float(iteration_of(header))
    except Exception:
        step = float(name) if name.isdecimal() else math.inf
        return CheckpointFile(path, prefix, step, None, saved_at, False)
    run_id, stored = header.get("run_id"), header.get("saved_at")
    return CheckpointFile(
        path,
        prefix,
        step,
        run_id if isinstance(run_id, str) else None,
        stored if type(stored) is float and math.isfinite(stored) else saved_at,
        True,
    )


def checkpoint_files(directory: str | os.PathLike, prefix: str | None = None) -> list[Path]:
    """The resumable checkpoints {prefix}_{step}.pt and {prefix}_final.pt, newest first.

    prefix None: any. The order is that of list_checkpoints.
    """
    return [file.path for file in list_checkpoints(directory, prefix)]


def newest_readable(
    directory: str | os.PathLike, prefix: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run, and its content; says which ones it passed over."""
    for path in checkpoint_files(directory, prefix):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            print(f"[resume] {error}; trying the one before it")
    raise CheckpointError(
        f"{directory}: holds no readable checkpoint {prefix or '*'}_<step>.pt or _final.pt"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _first(payload: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((payload[key] for key in keys if key in payload), None)


def _count(value: Any, what: str) -> int | None:
    """`value` as a number of things; other programs store tensors and floats, too."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and shape_of(value) == "()":
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise CheckpointError(f"the checkpoint's {what} is none: {shortened(value)}")
