"""Checkpoints: never half-written, their damage detected, loadable without running code.

A checkpoint is a torch.save file of tensors and plain values, readable with
`torch.load(path, weights_only=True)`; or, of a model that is sharded over several processes, a
directory `....dcp`. What stands in it is here; how it is written, and its damage found, is in
checkpoint_file.py, and in parallel/sharded.py.
"""

import math
import operator
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fastlm.checkpoint_file import remove_stale_temporaries as remove_stale_temporaries
from fastlm.checkpoint_file import storable, write_checkpoint
from fastlm.checkpoint_reading import (
    FORMAT_VERSION,
    MODEL_KEYS,
    OPTIMIZER_KEYS,
    count_of,
    first_of,
    holds_optimizer_state,
    iteration_of,
    mapped_checkpoint,
    peek,
    read_checkpoint,
)
from fastlm.checkpoint_reading import read_values as read_values
from fastlm.errors import CheckpointError, NewerFormatError
from fastlm.foreign_state import (
    check_optimizer_state,
    first_line,
    is_number,
    own_name,
    shortened,
    weight_differences,
)
from fastlm.hardware import is_out_of_memory
from fastlm.kernels.collect import is_dtensor
from fastlm.parallel.commit import SUFFIX, is_sharded
from fastlm.parallel.together import Group, together

Reader = Callable[[str | os.PathLike], dict[str, Any]]  # read_checkpoint, or read_values


def save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    iteration: int,
    out: str | os.PathLike | IO[bytes],
    **extra: Any,
) -> None:
    """Writes model, optimizer and `iteration` (completed steps, the index of the next) to `out`.

    Keys: model_state, optimizer_state (unless None), iteration, format_version, and those of
    `extra`. Parameter names never carry a wrapper's prefix. NumPy's numbers are stored as Python's.
    A path is written under a temporary name, synced and renamed: at every moment there is the old
    file or the whole new one. Raises OutputError if it cannot be written, TypeError for what is no
    tensor nor plain value, ValueError for an `iteration` that is no number of steps.
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
    try:
        steps = int(operator.index(iteration))  # also NumPy's, and a tensor's
    except TypeError:
        steps = -1
    if not 0 <= steps < 1 << 63:
        raise ValueError(
            f"iteration={shortened(iteration)}: it must be the number of completed steps"
        )
    payload = {
        "format_version": FORMAT_VERSION,
        "model_state": unwrap(model).state_dict(),
        "iteration": steps,
        **extra,
    }
    if optimizer is not None:
        payload["optimizer_state"] = optimizer.state_dict()
    return storable(payload)


def load_checkpoint(
    model: nn.Module | str | os.PathLike | IO[bytes],
    optimizer: torch.optim.Optimizer | nn.Module | None = None,
    src: str | os.PathLike | IO[bytes] | torch.optim.Optimizer | None = None,
    *,
    group: Group = None,
) -> int:
    """Restores `model`, and `optimizer` unless None, from `src`; returns the stored iteration.

    Takes (model, optimizer, src) and (src, model, optimizer), src a path or a binary file; this
    module's keys, those of nanoGPT and of the GPT tutorial (model_state_dict, step, …); names with
    the prefixes of torch.compile and DistributedDataParallel. Raises CheckpointError for a missing
    or damaged file and for another model's or optimizer's, before anything is changed. Warns if the
    file holds no state for `optimizer`.

    A model under FSDP2 (DTensors) reads its part, of a file or of a directory. group: a gloo group
    of the processes that call this together: they share the checks, and an error is one on all.
    """
    if not isinstance(model, nn.Module):
        model, optimizer, src = optimizer, src, model
    if src is None:
        raise TypeError("load_checkpoint has no source: (model, optimizer or None, path or file)")
    payload = read_checkpoint_for(model, optimizer, src, group=group)
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


def read_checkpoint_for(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    src: str | os.PathLike | IO[bytes],
    *,
    group: Group = None,
) -> dict[str, Any]:
    """The checkpoint's content for restore_model and restore_optimizer: DTensors where `model` and
    `optimizer` have them. optimizer None: its tensors are not read.

    group and errors: as for load_checkpoint.
    """
    weights = unwrap(model).state_dict()
    sharded = isinstance(src, str | os.PathLike) and is_sharded(src)
    if not (sharded or group or any(map(is_dtensor, weights.values()))):
        return read_checkpoint(src)
    from fastlm.parallel.sharded import placed, read_sharded

    groups = [] if optimizer is None else optimizer.param_groups
    params = dict(enumerate(p for group in groups for p in group["params"]))

    def like(place: tuple) -> torch.Tensor | None:
        if len(place) == 2 and place[0] in MODEL_KEYS:
            return weights.get(own_name(str(place[1]), weights))
        if len(place) == 4 and place[0] in OPTIMIZER_KEYS and place[1] == "state":
            return params.get(place[2])
        return None

    if sharded:
        unread = () if optimizer is not None else OPTIMIZER_KEYS
        check = partial(_fitting_state, model, values=False)
        payload = read_sharded(src, like, skip=unread, check=check, group=group)
    else:
        payload = placed(mapped_checkpoint(src, group), like)
    together(group, lambda: _fitting_state(model, payload))
    return payload


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
    stored = first_of(payload, OPTIMIZER_KEYS)
    named = [] if model is None else unwrap(model).named_parameters()
    before = optimizer.state, optimizer.param_groups
    try:
        check_optimizer_state(optimizer, stored, {id(p): name for name, p in named})
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
        if count_of(stored["_growth_tracker"], "growth tracker") is None:
            raise ValueError("it has no growth tracker")
        scaler.load_state_dict(dict(stored))
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's loss scale cannot be restored ({first_line(error)})"
        ) from error


def _fitting_state(
    model: nn.Module, payload: Mapping[str, Any], *, values: bool = True
) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, names without prefixes, checked against those of `model`.

    values: they have been read; else only names, shapes and dtypes count.
    """
    stored = first_of(payload, MODEL_KEYS)
    stored = payload if stored is None else stored
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"the checkpoint holds no weights but a {type(stored).__name__}")
    odd = [name for name in stored if not isinstance(name, str)]
    if odd:
        raise CheckpointError(f"the checkpoint holds weights without a name: {shortened(odd[0])}")
    expected = unwrap(model).state_dict()
    state = {own_name(name, expected): tensor for name, tensor in stored.items()}
    if len(state) != len(stored):
        raise CheckpointError("the checkpoint holds weights twice, with a prefix and without")
    differences = weight_differences(state, expected, values=values)
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another architecture: {differences[0]}{more}; set the model's "
            f"size as the checkpoint's run did"
        )
    return state


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
    """The checkpoints {prefix}_{name}.pt and .dcp in `directory`, newest first.

    prefix None: any. names: pattern of what stands behind it. A run's files are ordered by their
    steps, and runs (a prefix and a run id) by the time that they have stored: a file's own time is
    another after `cp -r`. Only plain values are read, milliseconds for any size; an unreadable one
    counts as the latest run's of its prefix.
    """
    directory = Path(directory)
    form = re.compile(f"({'.+' if prefix is None else re.escape(prefix)})_({names})\\.(?:pt|dcp)")
    if not directory.is_dir():
        return []
    found = []
    for path in sorted(directory.iterdir()):
        name = form.fullmatch(path.name)
        # What does not exist is a link without its target: it is reported, not overlooked.
        whole = path.is_dir() if path.suffix == SUFFIX else path.is_file()
        if name and (whole or not path.exists()):
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
        header = peek(path)
        step = float(iteration_of(header))
    except Exception:  # a damaged file raises anything
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
    """The resumable checkpoints {prefix}_{step} and {prefix}_final, .pt and .dcp, newest first.

    prefix None: any. The order is that of list_checkpoints.
    """
    return [file.path for file in list_checkpoints(directory, prefix)]


def newest_readable(
    directory: str | os.PathLike, prefix: str | None = None, read: Reader = read_checkpoint
) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint of a run, and its content; says which ones it passed over."""
    for path in checkpoint_files(directory, prefix):
        try:
            return path, read(path)
        except NewerFormatError:
            raise  # it is whole: a run that went on from an older one would lose its steps
        except CheckpointError as error:
            print(f"[resume] {error}; trying the one before it")
    raise CheckpointError(
        f"{directory}: holds no readable checkpoint {prefix or '*'}_<step>.pt or _final.pt"
    )


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DistributedDataParallel, DataParallel."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        parallel = nn.parallel.DistributedDataParallel | nn.DataParallel
        if inner is None and isinstance(model, parallel):
            inner = model.module
        if inner is None:
            return model
        model = inner
