"""The default corpus: the source of the running interpreter's own standard library.

Real text (Python and English) that every machine has, so that a first run needs no data and no
network. It is prepared once, under the user's cache directory.
"""

import hashlib
import os
import platform
import secrets
import shutil
import sysconfig
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from fastlm.data.fingerprint import verify_shards
from fastlm.data.manifest import VERSION, Manifest
from fastlm.data.staging import cache_directory, locked
from fastlm.data.text import TextFile
from fastlm.errors import DataError, OutputError
from fastlm.prepare import data_fingerprint, prepare

VOCAB_SIZE = 4096  # of its tokenizer
VAL_FRACTION = 0.05
# Goes into the cache's key: count up when the same files would be prepared in another way.
RECIPE = 1

# Tests are two thirds of a full installation and missing in slim ones; the others are tables,
# generated text, or programs beside the library.
# fmt: off
EXCLUDED_DIRECTORIES = {
    "test", "tests", "idlelib", "idle_test", "encodings", "pydoc_data", "lib2to3", "turtledemo",
    "site-packages", "dist-packages", "__pycache__",
}
# fmt: on
MIN_BYTES = 1_000_000

_USE_DATA = "prepare text of your own with python -m fastlm.prepare and pass it with --data DIR"


def default_corpus(vocab_size: int = VOCAB_SIZE, *, log: Callable[[str], object] = print) -> Path:
    """A directory with the standard library as token files: from the cache, or prepared now.

    The cache is `$XDG_CACHE_HOME/fastlm` or `~/.cache/fastlm`. Its key covers the files' names and
    contents, so that an update of the interpreter makes a new directory.

    vocab_size: of the byte-level BPE tokenizer.
    log: takes each line that is said on the way.

    Raises DataError if the library's source is missing, OutputError if the cache cannot be
    written.
    """

    def say(line: str) -> None:
        log(f"[corpus] {line}")

    files, key, size = _standard_library(vocab_size, say)
    directory = cache_directory() / f"stdlib-{key[:16]}"
    say(
        f"Python {platform.python_version()} standard library: {len(files)} files, "
        f"{size / 1e6:.1f} MB -> {directory}"
    )
    if _damage(directory) is None:
        say(f"already prepared; fingerprint {Manifest.load(directory).fingerprint}")
        return directory

    _check_writable(directory.parent)
    # One process at a time: another must not take the new corpus for the damaged one.
    with locked(directory.parent):
        damage = _damage(directory)
        if damage is None:
            say("another process has prepared it meanwhile")
            return directory
        if directory.exists():
            say(f"the cached corpus is damaged ({damage}); it is prepared again")
            # Out of the way by a rename, which is atomic: no other process opens half of it.
            aside = directory.with_name(f".{directory.name}.damaged-{secrets.token_hex(4)}")
            directory.rename(aside)
        for aside in directory.parent.glob(f".{directory.name}.damaged-*"):  # a killed one's, too
            shutil.rmtree(aside, ignore_errors=True)
        try:
            prepare(files, directory, vocab_size=vocab_size, val_fraction=VAL_FRACTION, log=say)
        except OutputError:
            # Without locks another process can be first: its result is the same.
            if _damage(directory) is not None:
                raise
            say("another process has prepared it meanwhile")
    return directory


def _standard_library(
    vocab_size: int, say: Callable[[str], object]
) -> tuple[list[TextFile], str, int]:
    """(the files, the cache's key, the files' bytes)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    recipe = f"{RECIPE} {VERSION} {vocab_size} {VAL_FRACTION} {metadata.version('tokenizers')}"
    digest = hashlib.sha256(recipe.encode())
    files, size = [], 0
    for file in _python_files(root):
        try:
            content = file.path.read_bytes()
            content.decode("utf-8")
        except OSError as error:
            say(f"{file.path} cannot be read and is left out ({error.strerror})")
            continue
        except UnicodeDecodeError:
            continue  # a few files are in other encodings on purpose
        digest.update(f"\n{file.name} {len(content)}\n".encode())
        digest.update(content)
        files.append(file)
        size += len(content)
    if size < MIN_BYTES:
        raise DataError(
            f"the standard library of this Python ({root}) holds {size / 1e6:.1f} MB of source, "
            f"too little for a default corpus; {_USE_DATA}"
        )
    return files, digest.hexdigest(), size


def _python_files(root: Path) -> list[TextFile]:
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_DIRECTORIES]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        files += [
            TextFile(path, path.relative_to(root).as_posix())
            for path in paths
            # The build's own settings and paths: generated, and other text on every machine.
            if not path.name.startswith("_sysconfigdata_")
        ]
    return sorted(files, key=lambda file: file.name)


def _check_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        raise OutputError(
            f"the cache directory {cache} cannot be written ({error.strerror}); set "
            f"XDG_CACHE_HOME to a directory that you can write to, or {_USE_DATA}"
        ) from error


def _damage(directory: Path) -> str | None:
    """What is wrong with a prepared directory, if anything is."""
    try:
        manifest = Manifest.load(directory)
        itemsize = np.dtype(manifest.dtype).itemsize
        for split in manifest.splits.values():
            for shard in split.shards:
                found = (directory / shard.file).stat().st_size
                if found != shard.tokens * itemsize:
                    return f"{shard.file} is {found} bytes, not {shard.tokens * itemsize}"
        tokenizer_json = (directory / manifest.tokenizer).read_bytes()
        if data_fingerprint(tokenizer_json, manifest) != manifest.fingerprint:
            return "the tokenizer or the manifest was changed"
        verify_shards(directory, manifest)
    except (OSError, ValueError, TypeError) as error:
        return str(error)
    return None
