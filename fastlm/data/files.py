"""Token files: opening and checking them, and what a run reads.

Formats: .npy; raw little-endian .bin (nanoGPT); .bin with the 1 KiB header of llm.c and
modded-nanogpt, told apart by its magic number (20240520 or 20240801).
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fastlm.data.dataset import TOKEN_DTYPES, TokenDataset
from fastlm.data.fingerprint import data_fingerprint, sampled_sha256, verify_shards
from fastlm.data.manifest import MANIFEST_NAME, Manifest, readable
from fastlm.errors import DataError
from fastlm.extension import extension
from fastlm.ops.gather_batch import check_window_fits

_MAX_TOKENIZER_BYTES = 256 << 20  # it goes into every checkpoint
_HEADER_BYTES = 1024
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_HEADER_MAGIC = {20240520: "uint16", 20240801: "uint32"}  # magic number -> dtype of the tokens


@dataclass
class Data:
    """What a training run reads."""

    train: TokenDataset
    val: TokenDataset
    manifest: Manifest | None = None
    tokenizer_json: str | None = None  # in the format of the `tokenizers` library
    val_bytes: int | None = None  # UTF-8 bytes of the validation text, if it is the manifest's

    @cached_property
    def fingerprint(self) -> str:
        """Tells by content whether a resumed run reads the data that it read before.

        The manifest's; for data without one, half of sampled_sha256 of the training and of the
        validation tokens, joined by "-". Validation files beside a manifest are told likewise.
        """
        if self.manifest is not None and self.val_bytes is not None:
            return self.manifest.fingerprint
        train = self.manifest.fingerprint if self.manifest else sampled_sha256(self.train)[:32]
        return f"{train}-{sampled_sha256(self.val)[:32]}"

    def matches(self, stored: str) -> bool:
        """Is `stored`, the fingerprint in a checkpoint, that of this data?

        Until version 0.1 data without a manifest was told by its length and dtype alone.
        """
        old = f"{len(self.train)} {self.train.dtype} tokens without a manifest"
        return stored == self.fingerprint or (self.manifest is None and stored == old)


def load_token_dataset(
    path: str | Path, mmap: bool = True, *, dtype: str | None = None
) -> np.ndarray:
    """The tokens of one file: 1-D, memory-mapped read-only by default.

    dtype: of a raw .bin file, which does not say (default uint16). Raises DataError if the file
    is missing, empty, not a token file, or no whole number of tokens.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise DataError(f"{path}: no such token file")
        if path.is_dir():
            raise DataError(f"{path}: is a directory; give a .npy or .bin token file")
        if not path.is_file():  # a named pipe would wait for ever
            raise DataError(f"{path}: not a regular file; give a .npy or .bin token file")
        array = _open_npy(path, mmap) if path.suffix == ".npy" else _open_bin(path, mmap, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    print(f"[load_token_dataset] Loaded {readable(path)}, shape={array.shape}, dtype={array.dtype}")
    return array


def _open_npy(path: Path, mmap: bool) -> np.ndarray:
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: is empty; a token file holds at least one token")
    try:
        # Not np.load, which takes archives under this name and advises to load pickles, and nothing
        # that maps before the header is checked: of a dtype of no bytes NumPy dies (SIGFPE).
        with open(path, "rb") as file:
            if (version := np.lib.format.read_magic(file)) not in _NPY_HEADERS:
                raise ValueError(f"version {version}")
            shape, _, dtype = _NPY_HEADERS[version](file)
            offset = file.tell()
    except OSError:
        raise
    except Exception as error:
        # NumPy reads the header as Python source: damage raises nearly anything, TokenError too.
        raise DataError(f"{path}: not a readable .npy file ({error})") from error
    if len(shape) != 1 or dtype.name not in TOKEN_DTYPES:
        raise DataError(
            f"{path}: holds a {len(shape)}-D array of {dtype}; token files hold a 1-D array of "
            f"{', '.join(TOKEN_DTYPES)}"
        )
    if not dtype.isnative:
        raise DataError(f"{path}: holds {dtype}; write it again in this machine's byte order")
    count = shape[0]
    if type(count) is not int or not 0 <= count <= (size - offset) // dtype.itemsize:
        raise DataError(
            f"{path}: not a readable .npy file (its header says {count} tokens of {dtype}, and the "
            f"file has {size} bytes); it is incomplete or damaged, copy it again"
        )
    return _tokens(path, mmap, dtype, offset, count)


def _open_bin(path: Path, mmap: bool, dtype: str | None) -> np.ndarray:
    size = path.stat().st_size
    offset, header_dtype = _header(path, size)
    name = dtype or header_dtype or "uint16"
    if name not in TOKEN_DTYPES:
        raise DataError(f"{path}: dtype={name!r}: token files hold {', '.join(TOKEN_DTYPES)}")
    if header_dtype not in (None, name):
        raise DataError(f"{path}: its header says {header_dtype}, not {name}; name no dtype")
    token_dtype = np.dtype(name).newbyteorder("<")
    count, rest = divmod(size - offset, token_dtype.itemsize)
    if rest:
        raise DataError(
            f"{path}: {size - offset} bytes are no multiple of {token_dtype.itemsize}, the size of "
            f"{name}; name the file's dtype (--data-dtype) or write the file again"
        )
    return _tokens(path, mmap, token_dtype, offset, count)


def _tokens(path: Path, mmap: bool, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
    """`count` tokens behind the first `offset` bytes of a file that is long enough for them."""
    if count == 0:
        raise DataError(f"{path}: is empty; a token file holds at least one token")
    if mmap:
        try:
            return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))
        except ValueError as error:
            raise DataError(f"{path}: was cut while it was opened ({error})") from error
    array = np.fromfile(path, dtype=dtype, count=count, offset=offset)
    if len(array) != count:
        raise DataError(f"{path}: was cut while it was read")
    return array


def _header(path: Path, size: int) -> tuple[int, str | None]:
    """(bytes to skip, dtype) of a file with the llm.c header, (0, None) of one without."""
    if size < _HEADER_BYTES:
        return 0, None
    magic, _version, tokens = np.fromfile(path, dtype="<i4", count=3).tolist()
    dtype = _HEADER_MAGIC.get(magic)
    if dtype is None:
        return 0, None
    expected = _HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(
            f"{path}: its header says {tokens} tokens of {dtype}, {expected} bytes in all, and the "
            f"file has {size}; it is incomplete or damaged, copy it again"
        )
    return _HEADER_BYTES, dtype


def open_data(
    paths: Sequence[str],
    val_paths: Sequence[str] = (),
    *,
    dtype: str | None = None,
    val_fraction: float = 0.05,
    verify: bool = True,
) -> Data:
    """The training and validation tokens at `paths`.

    paths: one directory, prepared by `python -m fastlm.prepare` (a manifest) or holding files
        named train* and val* (.bin or .npy); or token files.
    val_paths: validation files. Without any, the last `val_fraction` of the training tokens is
        held out.
    verify: compare a prepared directory's files with its manifest's digests, once.
    """
    if not paths:
        raise DataError("no data is given; name a directory or token files")
    directory = Path(paths[0])
    if os.path.isdir(directory):  # Path.is_dir raises if a directory above may not be read
        if len(paths) > 1:
            raise DataError(f"--data {' '.join(paths)}: give one directory, or files")
        if os.path.exists(directory / MANIFEST_NAME):
            return _open_prepared(directory, val_paths, dtype, verify)
        try:
            found = sorted(p for p in directory.iterdir() if p.suffix in (".bin", ".npy"))
        except OSError as error:
            raise DataError(f"{directory}: cannot be read ({error.strerror})") from error
        # As a word of its own: train.bin, fineweb_train_000001.bin, but not constrained.bin.
        paths = [str(p) for p in found if re.search(r"(?<![a-z])train", p.stem)]
        val_paths = val_paths or [str(p) for p in found if re.search(r"(?<![a-z])val", p.stem)]
        if not paths:
            raise DataError(
                f"{directory}: holds neither {MANIFEST_NAME} nor train*.bin or train*.npy; prepare "
                f"it with: python -m fastlm.prepare INPUT... --out DIR --vocab-size N"
            )
    train = _open_files(paths, dtype)
    if val_paths:
        return Data(train, _open_files(val_paths, dtype))
    boundary = len(train) - max(1, int(len(train) * val_fraction))
    print(
        f"[data] no validation files: the last {len(train) - boundary:,} of {len(train):,} tokens "
        f"are held out (--val-data FILE... names your own)"
    )
    return Data(train.slice(0, boundary), train.slice(boundary, len(train)))


def _open_files(paths: Sequence[str], dtype: str | None) -> TokenDataset:
    return TokenDataset([load_token_dataset(path, dtype=dtype) for path in paths], paths)


def _open_prepared(
    directory: Path, val_paths: Sequence[str], dtype: str | None, verify: bool
) -> Data:
    manifest = Manifest.load(directory)
    tokenizer = _read_tokenizer(directory, manifest)
    if data_fingerprint(tokenizer, manifest) != manifest.fingerprint:
        raise DataError(
            f"{directory}: {manifest.tokenizer} is not the one that the data was prepared with, or "
            f"{MANIFEST_NAME} was changed: the fingerprint is another; prepare the data again"
        )
    datasets = {}
    for name, split in manifest.splits.items():
        files = [str(directory / shard.file) for shard in split.shards]
        datasets[name] = _open_files(files, manifest.dtype)
        for shard, segment in zip(split.shards, datasets[name].segments, strict=True):
            if len(segment) != shard.tokens:
                raise DataError(
                    f"{directory / shard.file}: holds {len(segment)} tokens, its manifest says "
                    f"{shard.tokens}; copy it again, or prepare the data again"
                )
    if verify:
        verify_shards(directory, manifest)
    tokenizer_json = tokenizer.decode("utf-8", "replace") if manifest.tokenizer else None
    if val_paths:
        # Other validation files: the manifest's byte count is not theirs.
        val = _open_files(val_paths, dtype or manifest.dtype)
        return Data(datasets["train"], val, manifest, tokenizer_json)
    val_bytes = manifest.splits["val"].bytes
    return Data(datasets["train"], datasets["val"], manifest, tokenizer_json, val_bytes)


def _read_tokenizer(directory: Path, manifest: Manifest) -> bytes:
    if manifest.tokenizer is None:
        return b""
    path = directory / manifest.tokenizer
    try:
        if not path.is_file():
            raise DataError(f"{path}: is missing; prepare the data again")
        if path.stat().st_size > _MAX_TOKENIZER_BYTES:
            raise DataError(f"{path}: over {_MAX_TOKENIZER_BYTES >> 20} MiB, too large a tokenizer")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def check_dataset(dataset: TokenDataset, what: str, *, context_len: int, vocab_size: int) -> None:
    """DataError if `dataset` is too short for one window or holds an id outside the vocabulary.

    Reads every token once, with the multi-threaded C++ scan.
    """
    paths = ", ".join(dataset.paths) or "array"
    check_window_fits(len(dataset), context_len, f"{what} data ({paths})")
    dataset.check_files()
    base = 0
    for segment in dataset.segments:
        position = extension().first_out_of_range(segment, vocab_size)
        if position >= 0:
            name, offset = dataset.locate(base + position)
            raise DataError(
                f"{name}: token id {int(segment[position])} at offset {offset} is outside the "
                f"vocabulary of {vocab_size}; set --vocab-size, or name the file's dtype "
                f"(--data-dtype, now {segment.dtype})"
            )
        base += len(segment)
