"""Writing token ids into shard files, hashed on the way."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from fastlm.data.manifest import Shard


class ShardWriter:
    """Raw little-endian ids into `{prefix}_00000.bin`, `_00001.bin`, ... of `shard_tokens` each.

    Holds no tokens back and creates a file only for a token that goes into it. `shards` is complete
    after the `with` block.
    """

    def __init__(
        self,
        directory: Path,
        prefix: str,
        dtype: str,
        shard_tokens: int,
        written: Sequence[Shard] = (),  # what an earlier writer's state() gave: it goes on there
    ):
        self.shards: list[Shard] = list(written)
        self._directory = directory
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        if self.shards and not self.shards[-1].sha256:
            self._go_on()
        for path in directory.glob(f"{prefix}_[0-9]*.bin"):  # begun after that state
            if path.name not in {shard.file for shard in self.shards}:
                path.unlink()

    def state(self) -> list[Shard]:
        """What is on the disk now, for another writer to go on from. The hash of a shard that is
        not full is empty."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return [Shard(shard.file, shard.tokens, shard.sha256) for shard in self.shards]

    def _go_on(self) -> None:
        """Opens the last shard at the tokens that it is known to hold."""
        shard = self.shards[-1]
        self._file = open(self._directory / shard.file, "r+b")  # noqa: SIM115 (closed by _close)
        left = shard.tokens * self._dtype.itemsize
        while left:
            if not (part := self._file.read(min(left, 1 << 20))):
                raise OSError(f"{shard.file} is shorter than it was")
            self._hash.update(part)
            left -= len(part)
        self._file.truncate(self._file.tell())

    def write(self, tokens: np.ndarray) -> None:
        """tokens: (N,) ids, already known to fit the shards' dtype."""
        while len(tokens):
            if self._file is None:
                self._open_next()
            shard = self.shards[-1]
            part = tokens[: self._shard_tokens - shard.tokens].astype(self._dtype).tobytes()
            self._file.write(part)
            self._hash.update(part)
            written = len(part) // self._dtype.itemsize
            shard.tokens += written
            tokens = tokens[written:]
            if shard.tokens == self._shard_tokens:
                self._close()

    def _open_next(self) -> None:
        name = f"{self._prefix}_{len(self.shards):05d}.bin"
        self._file = open(self._directory / name, "xb")  # noqa: SIM115 (closed by _close)
        self._hash = hashlib.sha256()
        self.shards.append(Shard(name, tokens=0, sha256=""))

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self.shards[-1].sha256 = self._hash.hexdigest()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()
