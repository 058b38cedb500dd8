"""Checkpoints: one file, never half-written, its damage detected, loadable without running code.

A checkpoint is a torch.save file of tensors and plain values, readable with
`torch.load(path, weights_only=True)`. Its SHA-256 stands in the zip archive's comment, where every
reader ignores it and a bit flipped anywhere in the file, padding included, is found.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from fastlm.errors import CheckpointError

FORMAT_VERSION = 1
_PREFIXES = ("_orig_mod.", "module.")  # torch.compile's and DistributedDataParallel's wrappers
_COMMENT_TAG = b"sha256:"
_COMMENT_SIZE = len(_COMMENT_TAG) + 64
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
    file or the whole new one.
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
    out.parent.mkdir(parents=True, exist_ok=True)
    # ".tmp" at the end: what a killed process leaves behind is never taken for a checkpoint.
    handle, temporary = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            _write_with_digest(payload, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp's 0600 would lock colleagues out
        os.replace(temporary, out)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(out.parent)


def load_checkpoint(
    model: nn.Module | str | os.PathLike | IO[bytes],
    optimizer: torch.optim.Optimizer | nn.Module | None = None,
    src: str | os.PathLike | IO[bytes] | torch.optim.Optimizer | None = None,
) -> int:
    """Restores `model`, and `optimizer` unless None, from `src`; returns the stored iteration.

    Takes (model, optimizer, src) and (src, model, optimizer), src a path or a binary file; this
    module's keys, those of nanoGPT and of the GPT tutorial (model_state_dict, step, …); names with
    the prefixes of torch.compile and DistributedDataParallel. Raises CheckpointError for a missing
    or damaged file and for another architecture's, before anything is changed.
    """
    if not isinstance(model, nn.Module):
        model, optimizer, src = optimizer, src, model
    payload = read_checkpoint(src)
    restore_model(model, payload)
    state = _first(payload, _OPTIMIZER_KEYS)
    if optimizer is not None and state is not None:
        try:
            optimizer.load_state_dict(state)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{src}: its optimizer state does not fit: {error}") from error
    return iteration_of(payload)


def iteration_of(payload: Mapping[str, Any]) -> int:
    """The stored step number; 0 where there is none."""
    return int(_first(payload, _ITERATION_KEYS) or 0)


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
    state = _first(payload, _MODEL_KEYS)
    state = payload if state is None else state
    state = {_strip_prefixes(name): tensor for name, tensor in state.items()}
    model = unwrap(model)
    expected = model.state_dict()
    differences = [
        f"{name} is {_shape(state.get(name))}, not {_shape(expected.get(name))}"
        for name in sorted(expected.keys() | state.keys())
        if _shape(state.get(name)) != _shape(expected.get(name))
    ]
    if differences:
        more = f" and {len(differences) - 1} more" if len(differences) > 1 else ""
        raise CheckpointError(
            f"the checkpoint is of another architecture: {differences[0]}{more}; set the model's "
            f"size as the checkpoint's run did"
        )
    model.load_state_dict(state)


def checkpoint_files(directory: str | os.PathLike, prefix: str | None = None) -> list[Path]:
    """The resumable checkpoints {prefix}_{step}.pt and {prefix}_final.pt, newest first.

    prefix None: any.
    """
    name = re.compile((".+" if prefix is None else re.escape(prefix)) + r"_(\d+|final)\.pt")
    directory = Path(directory)
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if name.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


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


def _shape(tensor: torch.Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


class _HashingWriter:
    """Passes writes on and hashes them, so that saving reads nothing back."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _write_with_digest(payload: dict[str, Any], file: IO[bytes]) -> None:
    writer = _HashingWriter(file)
    torch.save(payload, writer)
    # A zip file ends with the length of its comment (two bytes, 0 so far) and the comment.
    comment = _COMMENT_TAG + writer.sha256.hexdigest().encode()
    file.seek(-2, os.SEEK_END)
    file.write(len(comment).to_bytes(2, "little") + comment)


def _digest_holds(path: Path) -> bool:
    """Does the file match its digest? True for a file without one."""
    size = path.stat().st_size
    if size < _COMMENT_SIZE + 2:
        return True
    with open(path, "rb") as file:
        file.seek(size - _COMMENT_SIZE - 2)
        tail = file.read()
        length, comment = int.from_bytes(tail[:2], "little"), tail[2:]
        tagged = comment.startswith(_COMMENT_TAG)
        if not tagged and length != _COMMENT_SIZE:
            return True
        if not tagged or length != _COMMENT_SIZE:
            return False  # one of the two is damaged
        sha256, left = hashlib.sha256(), size - _COMMENT_SIZE - 2
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


def _sync_directory(directory: Path) -> None:
    """Makes a rename in `directory` survive a power failure (where directories can be synced)."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows cannot open a directory
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
