"""Sharded checkpoints: a directory that all ranks write, each the parts it holds, or none of it.

torch.distributed.checkpoint (DCP) writes and reads the tensors, in its safetensors storage: files
of numbers and a JSON header. With the plain values in JSON too (commit.py, where the directory is
described), no pickle is written and none is read. Any number of ranks may read it, each what it
needs of every tensor.
"""

import contextlib
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.tensor import distribute_tensor

from fastlm.checkpoint_file import check_space
from fastlm.data.staging import locked, sync
from fastlm.errors import OutputError, UserError
from fastlm.foreign_state import shortened
from fastlm.kernels.collect import is_dtensor, local_part
from fastlm.parallel.commit import (
    Place,
    commit,
    decoded,
    encoded,
    partial_of,
    read_commit,
    readable,
    sha256,
    verify,
)
from fastlm.parallel.together import Group, gathered, rank_in, size_of, together

_FILE_BYTES = 1 << 28  # about; safetensors makes a file in memory before it is written

Like = Callable[[Place], Tensor | None]
T = TypeVar("T")


def write_sharded(
    payload: Mapping[str, Any],
    path: str | os.PathLike,
    *,
    group: Group = None,
    read_back: bool = False,
) -> None:
    """Writes `payload` (fastlm.checkpoint.checkpoint_payload) to the directory `path`.

    Collective: every rank of `group` calls it, from any thread, with a gloo group that nothing else
    uses meanwhile. Of a DTensor each rank writes its part; a Tensor, the same on all, one rank.
    read_back: the directory gets its name only when the digests, read from the disk again, hold.

    At every moment there is the old checkpoint or the whole new one, or, killed between two
    renames, the old one under a name from which remove_leftovers takes it back. Raises OutputError
    on every rank if one cannot write; no part of it stays.
    """
    path = Path(path)
    partial = partial_of(path)
    rank = rank_in(group)

    def on_rank_0(function: Callable[[], T]) -> T | None:
        return together(group, lambda: function() if rank == 0 else None)

    with contextlib.ExitStack() as lock:
        try:
            tensors: dict[str, Tensor] = {}
            values = together(group, lambda: encoded(payload, tensors))
            needed = sum(gathered(group, _bytes_of(tensors, rank)))
            on_rank_0(lambda: _begin(path, needed, lock))
            # One matrix under two names is written once. Rank 0 has a part of every matrix.
            aliases = gathered(group, _aliases(tensors))[0]
            _save({name: t for name, t in tensors.items() if name not in aliases}, partial, group)
            own = together(group, lambda: _digests(partial, rank, read_back))
            files = {name: entry for part in gathered(group, own) for name, entry in part.items()}
            content = {"files": files, "aliases": aliases, "values": values}
            on_rank_0(lambda: commit(path, content))
        except BaseException as error:
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)  # no rank writes there any more
            if isinstance(error, OSError) and not isinstance(error, UserError):
                where = f" on rank {getattr(error, 'rank', rank)}" if group is not None else ""
                raise OutputError(
                    f"{path}: cannot be written ({error.strerror or error}{where}); make room "
                    f"there or choose another directory"
                ) from error
            raise


def read_sharded(
    path: str | os.PathLike,
    like: Like | None = None,
    *,
    skip: Collection[str] = (),
    check: Callable[[dict[str, Any]], None] | None = None,
    group: Group = None,
) -> dict[str, Any]:
    """The payload that was written, every file's digest checked.

    like: place -> the parameter to which the tensor there belongs. One of its shape is read to its
    device, and of a DTensor the part that this rank holds; others, and small ones, are whole and
    on the CPU.
    skip: keys of the payload whose tensors are not read: they are on the meta device.
    check: is called with the payload before its tensors are read, for their shapes and dtypes.

    Collective: the ranks of `group` share the hashing, and CheckpointError is raised on all of
    them, for a directory that is missing, uncommitted or damaged.
    """
    path = Path(path)
    content = together(group, lambda: readable(path, lambda: read_commit(path)))
    ranks = rank_in(group), size_of(group)
    together(group, lambda: readable(path, lambda: verify(path, content["files"], *ranks)))

    def read() -> dict[str, Any]:
        reader = HuggingFaceStorageReader(str(path))
        infos = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}

        def at(stored: str | Tensor, place: Place) -> Tensor:
            device = "meta" if place[0] in skip else "cpu"
            if isinstance(stored, Tensor):
                return stored.to(device)
            name = content["aliases"].get(stored, stored)
            if name not in tensors:
                tensors[name] = _empty(name, infos[name], like and like(place), device)
            return tensors[name]

        payload = decoded(content["values"], at)
        if check is not None:
            check(payload)
        _load({name: tensor for name, tensor in tensors.items() if not tensor.is_meta}, reader)
        return payload

    return together(group, lambda: readable(path, read))


def placed(payload: Mapping[str, Any], like: Like) -> dict[str, Any]:
    """`payload`, of a file that each rank has mapped, with copies of its tensors as `like` has it.

    like: as in read_sharded. A rank copies its own part of what is to be a DTensor; the tensors of
    one memory stay one.
    """
    copies: dict[tuple, Tensor] = {}

    def copied(value: Any, place: Place) -> Any:
        if isinstance(value, Mapping):
            return {key: copied(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(copied(item, (*place, i)) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        param = like(place)
        if param is not None and (param.shape != value.shape or not is_dtensor(param)):
            param = None
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride(), id(param))
        if memory not in copies:
            if param is not None:
                # Without communication: every rank has the whole, and takes its part.
                value = distribute_tensor(
                    value, param.device_mesh, param.placements, src_data_rank=None
                )
            copies[memory] = value.clone()
        return copies[memory]

    return copied(payload, ())


# Writing


def _bytes_of(tensors: Mapping[str, Tensor], rank: int) -> int:
    """What this rank will write, about: a Tensor is written by one rank."""
    mine = [t for t in tensors.values() if is_dtensor(t) or rank == 0]
    return sum(local_part(tensor).nbytes for tensor in mine)


def _begin(path: Path, needed: int, lock: contextlib.ExitStack) -> None:
    """Makes the partial directory and locks it, until `lock` is closed."""
    partial = partial_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(needed, path.parent)
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    lock.enter_context(locked(partial))


def _aliases(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Second names of one matrix (tied weights) -> the first."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in tensors.items():
        local = local_part(tensor)
        if local.numel():
            memory = (local.data_ptr(), local.dtype, local.shape, local.stride(), local.device)
            if first.setdefault(memory, name) != name:
                aliases[name] = first[memory]
    return aliases


def _save(tensors: dict[str, Tensor], partial: Path, group: Group) -> None:
    """DCP's part. Raises what failed on the lowest rank that failed."""
    file_of, file, filled = {}, 1, 0
    for name, tensor in tensors.items():
        file_of[name] = file
        filled += tensor.nbytes // (size_of(group) if is_dtensor(tensor) else 1)
        if filled >= _FILE_BYTES:
            file, filled = file + 1, 0
    writer = HuggingFaceStorageWriter(str(partial), file_of, save_distributed=True)
    # What is on a GPU is copied tensor by tensor: the overlapping copy would make a CUDA context on
    # GPU 0 in a background thread of every rank.
    writer.per_thread_copy_ahead = 0
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    try:
        with _quiet():
            dcp.save(contiguous, storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        failure = _cause(error)
        if isinstance(failure, OSError | MemoryError):
            raise failure from error
        raise


def _digests(partial: Path, rank: int, read_back: bool) -> dict[str, list]:
    """{name: [bytes, SHA-256]} of the files that this rank has written, once they are synced."""
    digests = {}
    for file in sorted(partial.glob(f"shard-{rank + 1:05d}-*.safetensors")):
        sync(file)  # DCP's own fsync comes before the last bytes leave Python's buffer
        digests[file.name] = [file.stat().st_size, sha256(file)]
        if read_back and sha256(file, from_disk=True) != digests[file.name][1]:
            raise OSError(errno.EIO, f"{file.name}: read back, its SHA-256 does not match")
    return digests


# Reading


def _empty(name: str, info: Any, like: Tensor | None, device: str) -> Tensor:
    """A tensor to read `name` into. info: a TensorStorageMetadata."""
    values = sum(chunk.sizes.numel() for chunk in info.chunks)
    if values != info.size.numel():
        raise ValueError(f"{shortened(name)} has {values} of {info.size.numel()} values")
    dtype = info.properties.dtype
    if device == "meta" or like is None or like.shape != info.size:
        return torch.empty(info.size, dtype=dtype, device=device)
    return torch.empty_like(like.detach(), dtype=dtype)


def _load(tensors: dict[str, Tensor], reader: HuggingFaceStorageReader) -> None:
    try:
        with _quiet():
            # Each rank for itself: what fails on one leaves none waiting.
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: CheckpointException) -> BaseException:
    """What failed on the lowest of the ranks that failed; its attribute `rank` tells which."""
    rank, (failure, _) = min(error.failures.items())
    failure.rank = rank
    return failure


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process writes or reads: that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to")
        yield
