"""Writing token ids into shard files, hashed on the way."""

import hashlib
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

    def __init__(self, directory: Path, prefix: str, dtype: str, shard_tokens: int):
        self.shards: list[Shard] = []
        self._directory = directory
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()

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
