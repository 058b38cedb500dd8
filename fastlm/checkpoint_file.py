"""A checkpoint's file: whole or not there at all, its damage detected, its leftovers removable.

A save writes {directory}/.{name}.{8 characters}.tmp, locked (flock) as long as its process lives,
syncs it, and renames it. The SHA-256 of all that stands before it is the zip archive's comment,
where every reader ignores it and a bit flipped anywhere in the file, padding included, is found.
"""

import contextlib
import copy
import errno
import fcntl
import hashlib
import os
import re
import secrets
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fastlm.data.staging import sync
from fastlm.errors import OutputError
from fastlm.parallel.commit import is_sharded, remove_leftovers, remove_sharded

_COMMENT_TAG = b"sha256:"
_COMMENT_SIZE = len(_COMMENT_TAG) + 64
_ZIP_END, _ZIP_END_SIZE = b"PK\5\6", 22  # a zip file's last record, which the comment follows
_TEMPORARY = re.compile(r"\..+\.pt\.[a-z0-9_]{8}\.tmp", re.DOTALL)


# What torch.load(weights_only=True) reads; of these types exactly, as a subclass is stored as code.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray)
_PLAIN += (torch.dtype, torch.device, torch.layout, torch.Size)
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)


def storable(value: Any, name: str = "") -> Any:
    """`value` as a checkpoint can hold it: NumPy's numbers as Python's, all else as it is.

    Raises TypeError, naming the place, for what can be saved and never loaded.
    """
    if isinstance(value, np.generic):
        value = value.item()
    of_torch = isinstance(value, Tensor) and type(value).__module__.split(".")[0] == "torch"
    if of_torch or type(value) in _PLAIN:
        return value
    if type(value) not in _CONTAINERS:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise TypeError(
            f"{name or 'this'} is a {kind}: a checkpoint holds tensors, "
            f"numbers, strings, and dicts, lists and tuples of them"
        )
    if not isinstance(value, dict):
        return type(value)(storable(item, f"{name}[{i}]") for i, item in enumerate(value))
    changed = copy.copy(value)  # an OrderedDict of weights has attributes
    changed.clear()
    for key, item in value.items():
        place = f"{name}[{key!r}]" if name else str(key)
        changed[storable(key, f"a key of {name}")] = storable(item, place)
    return changed


def write_checkpoint(payload: dict[str, Any], path: Path, *, read_back: bool = False) -> None:
    """Writes `payload` to `path`: at every moment there is the old file or the whole new one.

    read_back: the file gets its name only when its digest, read from the disk again, holds.

    Raises OutputError if it cannot be written, or would not fit; no part of it stays.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_space(payload_bytes(payload), path.parent)
        handle, temporary = _locked_temporary(path)
        with os.fdopen(handle, "wb") as file:
            _write_with_digest(payload, file)
            file.flush()
            os.fsync(file.fileno())
            if read_back:
                _check_written(file, temporary)
            os.replace(temporary, path)
            temporary = None
        sync(path.parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OutputError(
                f"{path}: cannot be written ({error.strerror or error}); make room there or choose "
                f"another directory"
            ) from error
        raise


def remove_stale_temporaries(directory: str | os.PathLike) -> list[Path]:
    """Deletes what processes that died in a save have left in `directory`; returns those paths.

    A file whose writer lives is locked, and stays. So does everything on a file system without
    locks, where nobody can tell. The directories of sharded checkpoints likewise.
    """
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(Path(directory).iterdir()):
            if _TEMPORARY.fullmatch(path.name):
                with contextlib.suppress(OSError):  # locked, gone by now, or not ours to delete
                    handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        path.unlink()
                        removed.append(path)
                    finally:
                        os.close(handle)
    return removed + remove_leftovers(directory)


def remove_checkpoint(path: Path) -> None:
    """Deletes a checkpoint, a file or a directory, if it is there. Raises OSError."""
    if is_sharded(path):
        remove_sharded(path)
    else:
        path.unlink(missing_ok=True)


def digest_holds(path: Path) -> bool:
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
        while left > 0:
            block = file.read(min(left, 1 << 22))
            if not block:
                return False  # it has become shorter
            sha256.update(block)
            left -= len(block)
        sha256.update(b"\0\0")  # the comment's length, as it was when it was hashed
    return comment == _COMMENT_TAG + sha256.hexdigest().encode()


def inflates(path: Path) -> bool:
    """Does it hold more than its own size, compressed or overlapping? torch.save writes neither."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size


def payload_bytes(payload: Any) -> int:
    """About how large the file of `payload` will be: its tensors' memory, each counted once."""
    storages = {}
    for tensor in _tensors(payload):
        if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def check_space(needed: int, directory: Path) -> None:
    """Raises OSError if `needed` bytes do not fit: a disk filled to its end stops the logs too."""
    try:
        status = os.statvfs(directory)
    except OSError:  # not every file system can tell; the writes will
        return
    blocks = status.f_bfree if os.geteuid() == 0 else status.f_bavail  # root may use the reserve
    free = blocks * status.f_frsize
    if needed > free and status.f_blocks:  # 0: it does not tell either
        raise OSError(
            errno.ENOSPC, f"it needs {needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free"
        )


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked for as long as it is open.

    Its ".tmp" is at the end: what a killed process leaves is never taken for a checkpoint.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        # Not by mkstemp, whose 0600 would lock colleagues out: the umask decides.
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # not every network file system has locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if temporary.exists():
            return handle, temporary
        os.close(handle)  # remove_stale_temporaries came between the two calls


def _check_written(file: IO[bytes], path: Path) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        # From the disk, not from memory. Synced pages can go.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not digest_holds(path):
        raise OSError(errno.EIO, "read back, its SHA-256 does not match")


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
