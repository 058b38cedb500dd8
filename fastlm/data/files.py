"""Token files: opening and checking them, and what a run reads.

Formats: .npy; raw little-endian .bin (nanoGPT); .bin with the 1 KiB header of llm.c and
modded-nanogpt, told apart by its magic number (20240520 or 20240801).
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastlm.data.dataset import TOKEN_DTYPES, TokenDataset, as_dataset, joined
from fastlm.data.fingerprint import data_fingerprint, sampled_sha256, verify_shards
from fastlm.data.manifest import MANIFEST_NAME, Manifest, readable
from fastlm.data.mixture import Mixture, short_names, split_names, split_weights
from fastlm.errors import DataError
from fastlm.extension import extension
from fastlm.ops.gather_batch import check_window_fits

_MAX_TOKENIZER_BYTES = 256 << 20  # it goes into every checkpoint
_HEADER_BYTES = 1024
# No raw tokens, though two letters of a text are one of many vocabularies.
_NO_TOKENS = {
    ".txt", ".md", ".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst", ".zip", ".npz", ".pt",
    ".safetensors",
}  # fmt: skip
_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_HEADER_MAGIC = {20240520: "uint16", 20240801: "uint32"}  # magic number -> dtype of the tokens


@dataclass
class Data:
    """What a training run reads."""

    train: TokenDataset  # a Mixture, if of several sources
    val: TokenDataset  # all validation sets, end to end
    manifest: Manifest | None = None
    tokenizer_json: str | None = None  # in the format of the `tokenizers` library
    val_bytes: int | None = None  # UTF-8 bytes of the validation text, if it is the manifest's
    val_sets: dict[str, TokenDataset] = field(default_factory=dict)  # {}: there is one, no name
    val_set_bytes: dict[str, int | None] = field(default_factory=dict)  # as val_bytes
    unmarked: list[str] = field(default_factory=list)  # sources of a mixture without a manifest

    @classmethod
    def of(cls, train: Any, val: Any) -> "Data":
        """Arrays of tokens, as train_loop takes them; of val also a dict, the sets by name."""
        if not isinstance(val, Mapping):
            return cls(as_dataset(train), as_dataset(val))
        if not val:
            raise DataError("val_data={}: name at least one validation set")
        sets = {str(name): as_dataset(tokens) for name, tokens in val.items()}
        return cls(as_dataset(train), joined(list(sets.values())), val_sets=sets)

    def check(self, context_len: int, vocab_size: int, *, training: bool = True) -> None:
        """check_windows, and check_dataset of the same parts: reads every token."""
        self.check_windows(context_len, training=training)
        for dataset, what in self._parts(training):
            check_dataset(dataset, what, context_len=context_len, vocab_size=vocab_size)

    def check_windows(self, context_len: int, *, training: bool = True) -> None:
        """DataError if a source (if `training`) or a validation set is too short for one window, or
        has no target."""
        for dataset, what in self._parts(training):
            check_window_fits(len(dataset), context_len, f"{what} data ({_paths(dataset)})")
            if not dataset.has_targets():
                raise DataError(f"{what} data: no token is a target: no assistant says anything")

    def _parts(self, training: bool) -> list[tuple[TokenDataset, str]]:
        """Each source (if `training`) and each validation set, and what it is."""
        if isinstance(self.train, Mixture):
            parts = [(s.dataset, f"training set {s.name}") for s in self.train.sources]
        else:
            parts = [(self.train, "training")]
        parts = parts if training else []
        parts += [(part, f"validation set {name}") for name, part in self.val_sets.items()]
        return parts if self.val_sets else [*parts, (self.val, "validation")]

    @property
    def end_of_text(self) -> int | None:
        """The token that ends every document, where that is known."""
        return self.manifest.end_of_text if self.manifest else None

    @cached_property
    def fingerprint(self) -> str:
        """Tells by content whether a resumed run reads the data that it read before.

        The manifest's; for data without one, half of sampled_sha256 of the training and of the
        validation tokens, joined by "-". Validation files beside a manifest are told likewise, and
        so is a mixture, by those of its sources and their weights.
        """
        if self.manifest is not None and self.val_bytes is not None:
            return self.manifest.fingerprint
        if isinstance(self.train, Mixture):
            parts = [f"{_sampled(s.dataset)} {s.weight!r}\n" for s in self.train.sources]
            train = hashlib.sha256("".join(parts).encode()).hexdigest()[:32]
        else:
            train = self.manifest.fingerprint if self.manifest else sampled_sha256(self.train)[:32]
        return f"{train}-{sampled_sha256(self.val)[:32]}"


def _sampled(dataset: TokenDataset) -> str:
    """Of the tokens, and of which are targets."""
    ignored = "" if dataset.ignored is None else sampled_sha256(dataset.ignored)
    return sampled_sha256(dataset) + ignored


def load_token_dataset(
    path: str | Path, mmap: bool = True, *, dtype: str | type | np.dtype | None = None
) -> np.ndarray:
    """The tokens of one file: 1-D, memory-mapped read-only by default.

    dtype: of a raw file, which does not say (default uint16, for .bin alone). Raises DataError if
    the file is missing, empty, not a token file, or no whole number of tokens.
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


def _open_bin(path: Path, mmap: bool, dtype: str | type | np.dtype | None) -> np.ndarray:
    size = path.stat().st_size
    offset, header_dtype = _header(path, size)
    suffix = path.suffix.lower()
    named = suffix == ".bin" or header_dtype is not None or dtype is not None
    if suffix in _NO_TOKENS or not named:
        raise DataError(
            f"{path}: not a .npy or .bin token file; of text make one with python -m "
            f"fastlm.prepare, of raw tokens under another name give the dtype (--data-dtype)"
        )
    name = dtype or header_dtype or "uint16"
    if not isinstance(name, str):  # np.uint16, for one
        name = np.dtype(name).name
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
    array = _tokens(path, mmap, token_dtype, offset, count)
    if dtype is None and header_dtype is None and (wider := _wider(array)):
        raise DataError(
            f"{path}: read as uint16, every second token is near 0, as in a file of {wider}; name "
            f"its dtype (--data-dtype {wider}, or uint16 if it is that)"
        )
    return array


def _wider(array: np.ndarray) -> str | None:
    """The dtype of a file that is read as uint16, told by the upper halves: below 16 for ids below
    2^20."""
    ends = array[: 1 << 16], array[-(1 << 16) :]
    for name, step in (("int64", 4), ("uint32", 2)):
        if len(array) < 64 or len(array) % step:
            continue
        words = np.concatenate([part.reshape(-1, step) for part in ends])
        low = np.median(words[:, 0]) >= 16 > words[:, 1].max()
        if low and not words[:, 2:].any():
            return name
    return None


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
        named train* and val* (.bin or .npy); or token files. With a weight behind each,
        PATH:WEIGHT, a mixture; the validation data of each source is then a set of its own.
    val_paths: validation files. Without any, the last `val_fraction` of the training tokens is
        held out. With a name before each, NAME=PATH, several sets; a PATH may be a prepared
        directory here, for its validation data.
    verify: compare a prepared directory's files with its manifest's digests, once.
    """
    if not paths:
        raise DataError("no data is given; name a directory or token files")
    sources, val_files = split_weights(paths), split_names(val_paths)
    own_fraction = None if val_paths else val_fraction
    named: dict[str, Data] = {}
    if sources is None:
        data = _open_source(paths, dtype, own_fraction, verify)
    else:
        parts = [_open_source([path], dtype, own_fraction, verify) for path, _ in sources]
        names = short_names([path for path, _ in sources])
        weights = [weight for _, weight in sources]
        train = [part.train for part in parts]
        data = replace(parts[0], train=Mixture(list(zip(names, train, weights, strict=True))))
        for (path, _), part in zip(sources, parts, strict=True):
            data = _with_tokenizer_of(data, part, path)
            if part.manifest is None:
                data.unmarked.append(path)
        if not val_paths:
            named = dict(zip(names, parts, strict=True))
    raw = dtype or (data.manifest.dtype if data.manifest else None)  # of files that do not say
    if val_files:
        named = {name: _open_val_set(files, raw, verify) for name, files in val_files.items()}
    elif val_paths:
        # The manifest's byte count is not theirs.
        data = replace(data, val=_open_files(val_paths, raw), val_bytes=None)
    for name, part in named.items():
        if data.manifest is not None:  # a validation set's is not the training data's
            _with_tokenizer_of(data, part, name)
    if not named:
        return data
    return replace(
        data,
        val=joined([part.val for part in named.values()]),
        val_bytes=None,
        val_sets={name: part.val for name, part in named.items()},
        val_set_bytes={name: part.val_bytes for name, part in named.items()},
    )


def _with_tokenizer_of(data: Data, part: Data, name: str) -> Data:
    """`data`, with the manifest of its part if it has none; DataError for two tokenizers."""
    if part.manifest is None:
        return data
    if data.manifest is None:
        return replace(data, manifest=part.manifest, tokenizer_json=part.tokenizer_json)
    if data.tokenizer_json != part.tokenizer_json:
        raise DataError(
            f"{name}: was prepared with another tokenizer than the data before it; prepare it "
            f"again with --tokenizer DIR of the first"
        )
    return data


def _open_val_set(paths: list[str], dtype: str | None, verify: bool) -> Data:
    """A named validation set: files, or what one prepared directory holds out."""
    if len(paths) == 1 and os.path.exists(os.path.join(paths[0], MANIFEST_NAME)):
        return _open_prepared(Path(paths[0]), verify)
    files = _open_files(paths, dtype)
    return Data(files, files)


def _open_source(
    paths: Sequence[str],
    dtype: str | None,
    val_fraction: float | None,  # None: other data is validated on, and `val` not to be used
    verify: bool,
) -> Data:
    directory = Path(paths[0])
    val_paths: list[str] = []
    if os.path.isdir(directory):  # Path.is_dir raises if a directory above may not be read
        if len(paths) > 1:
            raise DataError(
                f"--data {' '.join(paths)}: give one directory, or files; or several with weights, "
                f"PATH:WEIGHT each"
            )
        if os.path.exists(directory / MANIFEST_NAME):
            return _open_prepared(directory, verify)
        try:
            found = sorted(p for p in directory.iterdir() if p.suffix in (".bin", ".npy"))
        except OSError as error:
            raise DataError(f"{directory}: cannot be read ({error.strerror})") from error
        # As a word of its own: train.bin, fineweb_train_000001.bin, but not constrained.bin.
        paths = [str(p) for p in found if re.search(r"(?<![a-z])train", p.stem)]
        val_paths = [str(p) for p in found if re.search(r"(?<![a-z])val", p.stem)]
        if not paths:
            raise DataError(
                f"{directory}: holds neither {MANIFEST_NAME} nor train*.bin or train*.npy; prepare "
                f"it with: python -m fastlm.prepare INPUT... --out DIR --vocab-size N"
            )
    train = _open_files(paths, dtype)
    if val_fraction is None:
        return Data(train, train)
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


def _open_prepared(directory: Path, verify: bool) -> Data:
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
        segments = datasets[name].segments
        if split.ignored:
            files = [str(directory / shard.file) for shard in split.ignored]
            datasets[name].ignored = _open_files(files, "uint8")
            segments = [*segments, *datasets[name].ignored.segments]
        for shard, segment in zip([*split.shards, *split.ignored], segments, strict=True):
            if len(segment) != shard.tokens:
                raise DataError(
                    f"{directory / shard.file}: holds {len(segment)} tokens, its manifest says "
                    f"{shard.tokens}; copy it again, or prepare the data again"
                )
    if verify:
        verify_shards(directory, manifest)
    tokenizer_json = tokenizer.decode("utf-8", "replace") if manifest.tokenizer else None
    # Bits per byte are of all the text, not of the targets alone.
    val_bytes = None if manifest.splits["val"].ignored else manifest.splits["val"].bytes
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


def _paths(dataset: TokenDataset) -> str:
    return ", ".join(dataset.paths) or "array"


def check_dataset(dataset: TokenDataset, what: str, *, context_len: int, vocab_size: int) -> None:
    """DataError if `dataset` is too short for one window or holds an id outside the vocabulary.

    Reads every token once, with the multi-threaded C++ scan.
    """
    check_window_fits(len(dataset), context_len, f"{what} data ({_paths(dataset)})")
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
