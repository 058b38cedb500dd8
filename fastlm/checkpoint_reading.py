"""What stands in a checkpoint, read without running code, on the CPU or without its tensors.

`group`, where it is taken: a gloo group of the processes that call a function together. They share
the checks, and an error of one is raised on all.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils._pytree import tree_map_only

from fastlm.checkpoint_file import digest_holds, inflates
from fastlm.errors import CheckpointError, NewerFormatError
from fastlm.foreign_state import first_line, shape_of, shortened
from fastlm.huggingface import is_model_directory, read_model_directory
from fastlm.parallel.commit import is_sharded, read_header
from fastlm.parallel.together import Group, rank_in, together

# What save_checkpoint writes as format_version. Raised when a reader of the number before would
# misread a file, not for a key more.
FORMAT_VERSION = 1
# fastlm's keys first, then those of other programs.
MODEL_KEYS = ("model_state", "model_state_dict", "model")
OPTIMIZER_KEYS = ("optimizer_state", "optimizer_state_dict", "optimizer")
_ITERATION_KEYS = ("iteration", "step", "iter_num")


def iteration_of(payload: Mapping[str, Any]) -> int:
    """The stored step number; 0 if there is none. Raises CheckpointError for what is no number."""
    return count_of(first_of(payload, _ITERATION_KEYS), "step number") or 0


def holds_optimizer_state(payload: Mapping[str, Any]) -> bool:
    """False for weights alone."""
    return first_of(payload, OPTIMIZER_KEYS) is not None


def read_checkpoint(src: str | os.PathLike | IO[bytes]) -> dict[str, Any]:
    """The checkpoint's content on the CPU, its digest checked (other programs' files have none).

    Of a model directory of transformers, too (huggingface.py). Raises CheckpointError for a file
    that is missing, damaged, none, of a newer format, or compressed, which could fill the memory
    from a few bytes.
    """
    if isinstance(src, str | os.PathLike) and is_sharded(src):
        from fastlm.parallel.sharded import read_sharded  # takes a second

        return read_sharded(src)
    if isinstance(src, str | os.PathLike) and is_model_directory(src):
        return read_model_directory(src)
    _check_file(src)
    return _loaded(src)


def read_values(src: str | os.PathLike, *, group: Group = None) -> dict[str, Any]:
    """The checkpoint's content, with the model's and the optimizer's tensors on the meta device.

    For what must be known before there is a model. group and errors: as for load_checkpoint.
    """
    large = (*MODEL_KEYS, *OPTIMIZER_KEYS)
    if is_sharded(src):
        from fastlm.parallel.sharded import read_sharded

        return read_sharded(src, skip=large, group=group)
    return {
        key: tree_map_only(
            torch.Tensor, lambda t, key=key: t.to("meta") if key in large else t.clone(), value
        )
        for key, value in mapped_checkpoint(src, group).items()
    }


def peek(path: Path) -> dict[str, Any]:
    """The content, its digest unchecked and its tensors unread: mapped, or None of a directory.

    Raises whatever torch.load raises of a damaged file.
    """
    if is_sharded(path):
        return read_header(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def mapped_checkpoint(src: str | os.PathLike, group: Group) -> dict[str, Any]:
    """The content of a file that the processes of `group` map and one has checked."""
    if is_model_directory(src):
        return together(group, lambda: read_model_directory(src))
    together(group, lambda: _check_file(src) if rank_in(group) == 0 else None)
    return together(group, lambda: _loaded(src, mmap=True))


def _check_file(src: str | os.PathLike | IO[bytes]) -> None:
    """Raises CheckpointError unless torch.load may try it."""
    if not isinstance(src, str | os.PathLike):
        return
    try:
        if not Path(src).is_file():
            raise CheckpointError(f"{src}: no such checkpoint")
        if not digest_holds(Path(src)):
            raise CheckpointError(f"{src}: is damaged (its SHA-256 does not match)")
        if inflates(Path(src)):
            raise CheckpointError(f"{src}: is compressed, which no checkpoint is; save it again")
    except CheckpointError:
        raise
    except Exception as error:  # a damaged zip directory raises anything
        raise CheckpointError(f"{src}: is no readable checkpoint ({first_line(error)})") from error


def _loaded(src: str | os.PathLike | IO[bytes], **options: Any) -> dict[str, Any]:
    try:
        payload = torch.load(src, map_location="cpu", weights_only=True, **options)
    except Exception as error:  # a damaged file raises anything: pickle, zip, key, decode errors
        raise CheckpointError(f"{src}: is no readable checkpoint ({first_line(error)})") from error
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{src}: is no checkpoint but a {type(payload).__name__}")
    found = payload.get("format_version")
    if "model_state" in payload and isinstance(found, int) and found > FORMAT_VERSION:
        raise NewerFormatError(
            f"{src}: is of format {found}, and this fastlm reads up to {FORMAT_VERSION}; update "
            f"fastlm"
        )
    return dict(payload)


def first_of(payload: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((payload[key] for key in keys if key in payload), None)


def count_of(value: Any, what: str) -> int | None:
    """`value` as a number of things; other programs store tensors and floats, too."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu" and shape_of(value) == "()":
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value is None or (type(value) is int and 0 <= value < 1 << 63):
        return value
    raise CheckpointError(f"the checkpoint's {what} is none: {shortened(value)}")
