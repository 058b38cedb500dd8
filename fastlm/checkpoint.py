"""Checkpoints: one file, never half-written, its damage detected, loadable without running code.

A checkpoint is a torch.save file of tensors and plain values, readable with
`torch.load(path, weights_only=True)`. Its SHA-256 stands in the zip archive's comment, where every
reader ignores it and a bit flipped anywhere in the file, padding included, is found.
"""

import hashlib
import math
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fastlm.data.staging import sync
from fastlm.errors import CheckpointError, OutputError

FORMAT_VERSION = 1
_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's wrappers
_COMMENT_TAG = b"sha256:"
_COMMENT_SIZE = len(_COMMENT_TAG) + 64
_ZIP_END, _ZIP_END_SIZE = b"PK\5\6", 22  # a zip file's last record, which the comment follows
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
    payload = {
        "format_version": FORMAT_VERSION,
        "model_state": unwrap(model).state_dict(),
        "iteration": iteration,
        **extra,
    }
    if optimizer is not None:
        payload["optimizer_state"] = optimizer.state_dict()
    if not isinstance(out, str | os.PathLike):
        torch.save(payload, out)
        return
    out = Path(out)
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # ".tmp" at the end: what a killed process leaves behind is never taken for a checkpoint.
        handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            _write_with_digest(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would lock colleagues out
        os.replace(temporary, out)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"{out}: cannot be written ({error.strerror}); make room there or choose another "
                f"directory"
            ) from error
        raise
    sync(out.parent)


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
    model_state = _fitting_state(model, payload)
    if optimizer is not None and holds_optimizer_state(payload):
        restore_optimizer(optimizer, payload)
    elif optimizer is not None:
        warnings.warn(
            f"{src}: holds no optimizer state; the optimizer stays as it is. Pass optimizer=None "
            f"to load weights alone",
            stacklevel=2,
        )
    unwrap(model).load_state_dict(model_state)
    return iteration_of(payload)


def iteration_of(payload: Mapping[str, Any]) -> int:
    """The stored step number; 0 if there is none."""
    return int(_first(payload, _ITERATION_KEYS) or 0)


def holds_optimizer_state(payload: Mapping[str, Any]) -> bool:
    """False for weights alone."""
    return _first(payload, _OPTIMIZER_KEYS) is not None


def read_checkpoint(src: str | os.PathLike | IO[bytes]) -> dict[str, Any]:
    """The checkpoint's content on the CPU, its digest checked (other programs' files have none)."""
    is_path = isinstance(src, str | os.PathLike)
    if is_path and not Path(src).is_file():
        raise CheckpointError(f"{src}: no such checkpoint")
    try:
        if is_path and not _digest_holds(Path(src)):
            raise CheckpointError(f"{src}: is damaged (its SHA-256 does not match)")
        payload = torch.load(src, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file raises anything: pickle, zip, key, decode errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{src}: is no readable checkpoint ({reason})") from error
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{src}: is no checkpoint but a {type(payload).__name__}")
    return dict(payload)


def restore_model(model: nn.Module, payload: Mapping[str, Any]) -> None:
    """Loads the weights of a checkpoint, or of a bare state dict."""
    unwrap(model).load_state_dict(_fitting_state(model, payload))


def restore_optimizer(optimizer: torch.optim.Optimizer, payload: Mapping[str, Any]) -> None:
    """Loads the optimizer state of a checkpoint that holds one."""
    try:
        optimizer.load_state_dict(_first(payload, _OPTIMIZER_KEYS))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"the checkpoint's optimizer state does not fit: {error}; group the parameters as its "
            f"run did"
        ) from error


def _fitting_state(model: nn.Module, payload: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The weights in a checkpoint, names without prefixes, checked against those of `model`."""
    state = _first(payload, _MODEL_KEYS)
    state = payload if state is None else state
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the checkpoint holds no weights but a {type(state).__name__}")
    state = {_strip_prefixes(str(name)): tensor for name, tensor in state.items()}
    expected = unwrap(model).state_dict()
    differences = [
        f"{name} is {_shape(state.get(name))}, not {_shape(expected.get(name))}"
        for name in sorted(expected.keys() | state.keys())
        if _shape(state.get(name)) != _shape(expected.get(name))
    ]
    differences = differences or _untied(state, expected)
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another architecture: {differences[0]}{more}; set the model's "
            f"size as the checkpoint's run did"
        )
    return state


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
        if first != name and a.data_ptr() != b.data_ptr() and not torch.equal(a, b):
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


def _strip_prefixes(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _shape(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(tuple(value.shape))
    return "missing" if value is None else f"a {type(value).__name__}"


class _HashingWriter:
    """Passes writes on and hashes them, so that saving reads nothing back."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _write_with_digest(payload: dict[str, Any], file: IO[bytes]) -> None:
    writer = _HashingWriter(file)
    try:
        torch.save(payload, writer)
    except Exception as error:
        if writer.error is not None:  # torch's own says "unexpected pos", not that the disk is full
            raise writer.error from error
        raise
    # A zip file ends with the length of its comment (two bytes, 0 so far) and the comment.
    comment = _COMMENT_TAG + writer.sha256.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(comment).to_bytes(2, "little") + comment)


def _digest_holds(path: Path) -> bool:
    """Does the file match its digest? True for a file without one."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - _ZIP_END_SIZE - 0xFFFF))  # where zip readers look for the end too
        tail = file.read()
        end = tail.rfind(_ZIP_END)
        if end < 0 or len(tail) < end + _ZIP_END_SIZE:
            return True  # no zip file; torch.load says what is wrong
        length = int.from_bytes(tail[end + _ZIP_END_SIZE - 2 : end + _ZIP_END_SIZE], "little")
        comment = tail[end + _ZIP_END_SIZE :]
        if length != len(comment):
            return False  # cut within the comment, or something stands behind it
        if not comment.startswith(_COMMENT_TAG):
            return length != _COMMENT_SIZE  # of that size it is ours, its tag damaged
        sha256, left = hashlib.sha256(), size - length - 2
        file.seek(0)
        while left:
            block = file.read(min(left, 1 << 22))
            sha256.update(block)
            left -= len(block)
        sha256.update(b"\0\0")  # the comment's length, as it was when it was hashed
    return comment == _COMMENT_TAG + sha256.hexdigest().encode()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
