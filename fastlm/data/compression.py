"""Files as they are, and .gz and .zst ones read through: what a reader gets is the content.

zstandard is imported where it is used.
"""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastlm.errors import DataError

COMPRESSED = (".gz", ".zst")
UNREAD = (".bz2", ".xz", ".lz4", ".zip")
_COMPRESSED_CHUNK = 1 << 14  # what it unpacks to is in memory at once
_MAX_ZST_WINDOW = 1 << 31  # bytes: zstd --long=31; the library's own limit is 128 MiB


def inner_suffix(path: Path) -> str:
    """The suffix that tells the format, in small letters: ".jsonl" for a.jsonl and a.jsonl.gz."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def optional(module: str, path: Path) -> Any:
    """A package of the `data` extra; DataError, naming the file that needs it, without it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise DataError(
            f"{path}: reading it needs {package}; install it: pip install 'fastlm[data]'"
        ) from error


@contextmanager
def opened(path: Path, on_bytes: Callable[[int], object] | None = None) -> Iterator[BinaryIO]:
    """The content of `path`, to be read from its beginning to its end.

    on_bytes: takes how many more bytes of the file, compressed as they are, have been read. Raises
    DataError, also while it is read, if the file cannot be read or its compression is damaged.
    """
    suffix = path.suffix.lower()
    # Before the errors of reading: what they are depends on the library.
    zstandard = optional("zstandard", path) if suffix == ".zst" else None
    damaged: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)
    if zstandard is not None:
        damaged = (zstandard.ZstdError, EOFError)
    try:
        with open(path, "rb", buffering=0) as file:
            raw = file if on_bytes is None else _Counted(file, on_bytes)
            if suffix == ".gz":
                with gzip.GzipFile(fileobj=raw, mode="rb") as content:
                    yield content
            elif zstandard is not None:
                yield _whole_frames(zstandard, raw)
            else:
                yield raw
    except damaged as error:
        raise DataError(
            f"{path}: damaged or incomplete {suffix} file ({error}); copy it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


class _Counted(io.RawIOBase):
    """A file that tells how much of it has been read."""

    def __init__(self, file: io.FileIO, on_bytes: Callable[[int], object]):
        self._file, self._on_bytes = file, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        size = self._file.readinto(buffer)
        self._on_bytes(size or 0)
        return size


def _whole_frames(zstandard: Any, raw: Any) -> BinaryIO:
    """The content of every frame; EOFError where the last one is cut.

    zstandard's own stream_reader takes a cut frame for the end.
    """

    class Frames(io.RawIOBase):
        def __init__(self) -> None:
            self._decompressor = None
            self._content = memoryview(b"")
            self._unread = b""  # behind the end of a frame

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            while not self._content:
                compressed, self._unread = self._unread or raw.read(_COMPRESSED_CHUNK), b""
                if not compressed:
                    if self._decompressor is not None:
                        raise EOFError("its last frame is cut")
                    return 0
                if self._decompressor is None:
                    unpacking = zstandard.ZstdDecompressor(max_window_size=_MAX_ZST_WINDOW)
                    self._decompressor = unpacking.decompressobj()
                self._content = memoryview(self._decompressor.decompress(compressed))
                if self._decompressor.eof:
                    self._unread, self._decompressor = self._decompressor.unused_data, None
            size = min(len(buffer), len(self._content))
            buffer[:size], self._content = self._content[:size], self._content[size:]
            return size

    return Frames()
