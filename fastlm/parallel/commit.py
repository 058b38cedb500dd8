"""commit.json of a sharded checkpoint: what makes a directory of shards a checkpoint.

    {prefix}_500.dcp/
        shard-00001-model-00001-of-00001.safetensors    written by rank 0
        shard-00002-model-00001-of-00001.safetensors    written by rank 1, ...
        commit.json     size and SHA-256 of each file, and the checkpoint's plain values

It is written last, into ....dcp.partial, which then gets its name. Its values are JSON: to read
them runs no code. JSON has neither tuples nor keys that are no strings: those, and tensors, are
objects with one key that begins with "$": {"$tuple": [...]}, {"$dict": [[key, value], ...]},
{"$tensor": name}, and, where it is small enough to stand here, {"$values": [dtype, shape, values]}.

Imports nothing of torch.distributed, which takes a second: to list checkpoints must be quick.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastlm.data.staging import locked, sync
from fastlm.errors import CheckpointError, NewerFormatError, OutputError
from fastlm.foreign_state import first_line, shortened
from fastlm.kernels.collect import is_dtensor

SUFFIX = ".dcp"
COMMIT = "commit.json"
_FORMAT = 1
_SMALL = 128  # values of a tensor
_HEAD = b'{"sha256": "'  # then 64 digits: the SHA-256 of all that stands behind them
_FILE_NAME = re.compile(r"[\w-]+\.safetensors")
_LEFTOVER = re.compile(rf"(.+{re.escape(SUFFIX)})\.(partial|replaced)", re.DOTALL)

Place = tuple[Any, ...]  # in a payload: the keys that lead there
T = TypeVar("T")


def is_sharded(path: str | os.PathLike) -> bool:
    """Is it the directory of a sharded checkpoint, whole or damaged?"""
    # os.path's functions say no of what is no path at all.
    named = os.fspath(path).endswith(SUFFIX)
    return os.path.isdir(path) and (named or os.path.isfile(os.path.join(path, COMMIT)))


def read_header(path: str | os.PathLike) -> dict[str, Any]:
    """The plain values and small tensors, None for others; only commit.json is read and checked.

    Raises CheckpointError.
    """

    def small(stored: str | Tensor, place: Place) -> Tensor | None:
        return stored if isinstance(stored, Tensor) else None

    path = Path(path)
    return readable(path, lambda: decoded(read_commit(path)["values"], small))


def partial_of(path: Path) -> Path:
    """The name under which `path` is written."""
    return path.with_name(f"{path.name}.partial")


def remove_sharded(path: str | os.PathLike) -> None:
    """Deletes a sharded checkpoint; a process killed meanwhile leaves a leftover, no damaged one.

    Raises OSError.
    """
    partial = partial_of(Path(path))
    shutil.rmtree(partial, ignore_errors=True)
    os.rename(path, partial)
    shutil.rmtree(partial)


def remove_leftovers(directory: str | os.PathLike) -> list[Path]:
    """Deletes what processes that died in a save have left in `directory`; returns those paths.

    A checkpoint that one of them was about to replace gets its name back. What a living process
    writes is locked, and stays; so does everything on a file system without locks.
    """
    removed = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(Path(directory).iterdir()):
            if (match := _LEFTOVER.fullmatch(path.name)) and path.is_dir():
                with contextlib.suppress(OSError), locked(path, wait=False):
                    target = path.with_name(match[1])
                    if match[2] == "replaced" and not target.exists():
                        path.rename(target)
                    else:
                        shutil.rmtree(path)
                        removed.append(path)
    return removed


def commit(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` as commit.json into `path`'s partial directory, which then gets its name.

    content: {"files": {name: [bytes, SHA-256]}, "values": encoded, ...}. Raises OSError, and
    OutputError if a file is not there.
    """
    partial = partial_of(path)
    for name, (size, _) in content["files"].items():
        file = partial / name
        if not file.is_file() or file.stat().st_size != size:
            raise OutputError(
                f"{path}: rank 0 does not see {name}, which another rank has written; choose a "
                f"directory that all ranks share"
            )
    body = b'", ' + json.dumps({"format": _FORMAT, **content}).encode()[1:]
    with open(partial / COMMIT, "wb") as file:
        file.write(_HEAD + hashlib.sha256(body).hexdigest().encode() + body)
        file.flush()
        os.fsync(file.fileno())
    sync(partial)
    # No rename replaces a full directory: an older checkpoint of this name steps aside.
    aside = path.with_name(f"{path.name}.replaced")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    os.rename(partial, path)
    sync(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def read_commit(path: Path) -> dict[str, Any]:
    """The content of commit.json. Raises CheckpointError if it is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        raw = (path / COMMIT).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is no whole checkpoint (it has no {COMMIT})") from error
    end = len(_HEAD) + 64
    digest = hashlib.sha256(raw[end:]).hexdigest().encode()
    if not raw.startswith(_HEAD) or raw[len(_HEAD) : end] != digest:
        raise CheckpointError(f"{path / COMMIT}: is damaged (its SHA-256 does not match)")
    content = json.loads(raw)
    if content["format"] != _FORMAT:
        raise NewerFormatError(
            f"{path}: is of format {shortened(content['format'])}, not {_FORMAT}; update fastlm"
        )
    return content


def verify(path: Path, files: Mapping[str, list], rank: int, ranks: int) -> None:
    """Every file is there, and none besides; this rank hashes its share of them.

    Raises CheckpointError, which names the file.
    """
    for name in files:
        if not _FILE_NAME.fullmatch(name):
            raise CheckpointError(f"{path / COMMIT}: names a file {shortened(name)}")
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in files:  # the reader would take it for a part
            raise CheckpointError(f"{file}: does not belong to this checkpoint; remove it")
    for index, (name, (size, digest)) in enumerate(sorted(files.items())):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{file}: is damaged ({file.stat().st_size:,} bytes, not {size:,})"
            )
        if index % ranks == rank and sha256(file) != digest:
            raise CheckpointError(f"{file}: is damaged (its SHA-256 does not match)")


def sha256(path: Path, *, from_disk: bool = False) -> str:
    """In hexadecimal. from_disk: not of what memory keeps of a file that has been synced."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        if from_disk:
            with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def readable(path: Path, function: Callable[[], T]) -> T:
    """function(), and whatever it raises, but for a lack of memory, as a CheckpointError."""
    try:
        return function()
    except (CheckpointError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file raises anything: key, value, decode, OS errors
        raise CheckpointError(f"{path}: is no readable checkpoint ({first_line(error)})") from error


def encoded(payload: Mapping[str, Any], tensors: dict[str, Tensor]) -> Any:
    """`payload` for json.dumps; its tensors, but for small ones, are added to `tensors`.

    They are named by the keys that lead to them, joined by "/". Raises TypeError for a value that
    is neither plain (None, bool, int, float, str, list, tuple, dict) nor a tensor.
    """

    def walk(value: Any, place: Place) -> Any:
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Tensor) and _is_small(value):
            flat = value.detach().flatten()
            flat = flat.double() if flat.is_floating_point() else flat  # exact, of every dtype
            return {"$values": [str(value.dtype), list(value.shape), flat.tolist()]}
        if isinstance(value, Tensor):
            name = "/".join(map(str, place))
            if name in tensors:
                raise TypeError(f"two tensors are named {name}")
            tensors[name] = value
            return {"$tensor": name}
        if isinstance(value, list | tuple):
            items = [walk(item, (*place, i)) for i, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("$") for key in value):
                return {key: walk(item, (*place, key)) for key, item in value.items()}
            return {"$dict": [[walk(k, place), walk(v, (*place, k))] for k, v in value.items()]}
        raise TypeError(
            f"{'/'.join(map(str, place))} is a {type(value).__name__}, which no checkpoint holds"
        )

    return walk(payload, ())


def _is_small(tensor: Tensor) -> bool:
    """A counter, the last norms: what a reader of the plain values wants, too."""
    return tensor.numel() <= _SMALL and not (is_dtensor(tensor) or tensor.is_complex())


def decoded(value: Any, tensor: Callable[[str | Tensor, Place], Any], place: Place = ()) -> Any:
    """What `encoded` was given; tensor: (name, or a small tensor itself; place) -> what stands
    there."""
    if isinstance(value, list):
        return [decoded(item, tensor, (*place, i)) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensor(value["$tensor"], place)
    if "$values" in value:
        name, shape, flat = value["$values"]
        dtype = getattr(torch, name.removeprefix("torch."))
        return tensor(torch.tensor(flat, dtype=dtype, device="cpu").reshape(shape), place)
    if "$tuple" in value:
        return tuple(decoded(value["$tuple"], tensor, place))
    items = value.items()
    if "$dict" in value:
        items = [(decoded(key, tensor, place), item) for key, item in value["$dict"]]
    return {key: decoded(item, tensor, (*place, key)) for key, item in items}
