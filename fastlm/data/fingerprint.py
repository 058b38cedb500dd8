"""Which data is this? Hashes of what token files hold, and whether they hold what was prepared."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastlm.data.dataset import TokenDataset
from fastlm.data.manifest import Manifest
from fastlm.data.progress import progress
from fastlm.data.staging import cache_directory
from fastlm.errors import DataError, OutputError

VERIFIED_NAME = ".verified.json"  # which shards were found to be as the manifest says
_MIB = 1 << 20
_SAMPLES = 64
_SILENT_SECONDS = 3.0


def data_fingerprint(tokenizer_json: bytes, manifest: Manifest) -> str:
    """SHA-256 over the tokenizer's file and each split's shards, in order: which data this is."""
    digest = hashlib.sha256(hashlib.sha256(tokenizer_json).digest())
    for name in sorted(manifest.splits):
        shards = manifest.splits[name].shards
        digest.update(f"{name} {manifest.dtype} {len(shards)}\n".encode())
        for shard in [*shards, *manifest.splits[name].ignored]:
            digest.update(bytes.fromhex(shard.sha256))
    return digest.hexdigest()


def sampled_sha256(dataset: TokenDataset) -> str:
    """SHA-256 over the number of tokens, their dtype, and a sample of them, in hexadecimal.

    The sample is the first and the last MiB of every file and 64 MiB at places that the number of
    tokens decides; all tokens, where that is not less. Two datasets of equal size that differ
    elsewhere have one hash.
    """
    block, size = _MIB // dataset.dtype.itemsize, len(dataset)
    digest = hashlib.sha256(f"{size} {dataset.dtype}\n".encode())
    dataset.check_files()
    if size <= (_SAMPLES + 2) * block:
        sample = dataset.segments
    else:
        sample = [end for array in dataset.segments for end in (array[:block], array[-block:])]
        for index in range(_SAMPLES):
            place = hashlib.sha256(f"{size} {index}".encode()).digest()
            begin = int.from_bytes(place[:8], "little") % (size - block + 1)
            sample += dataset.slice(begin, begin + block).segments
    for array in sample:
        digest.update(array.view("uint8"))
    return digest.hexdigest()


def verify_shards(
    directory: Path, manifest: Manifest, say: Callable[[str], object] = print
) -> None:
    """DataError, naming the file, if a shard's content is not what the manifest's SHA-256 says.

    Every byte is read once: the verdict is kept, beside the file's size, modification time and
    inode, in the directory, or in the user's cache if that may not be written. A file that is as
    it was then is not read again.
    """
    known = _recalled(directory)
    verified: dict[str, list[Any]] = {}
    pending = []
    for split in manifest.splits.values():
        for shard in [*split.shards, *split.ignored]:
            if known.get(shard.file) == (identity := _identity(directory, shard)):
                verified[shard.file] = identity
            else:
                pending.append(shard)
    if not pending:
        return
    lock, stop = threading.Lock(), threading.Event()
    total = sum(os.path.getsize(directory / shard.file) for shard in pending)
    wrong = None
    with progress(
        "[data] verifying the shards' SHA-256", total, say, silent_seconds=_SILENT_SECONDS
    ) as on_bytes:

        def count(size: int) -> None:
            if stop.is_set():
                raise InterruptedError
            with lock:
                on_bytes(size)

        # hashlib gives the GIL up: 1.3 GB/s a thread on an AVX-512 Xeon with SHA extensions.
        with ThreadPoolExecutor(min(len(pending), os.cpu_count() or 1)) as threads:
            try:
                before = [_identity(directory, shard) for shard in pending]
                hashes = threads.map(lambda s: _file_sha256(directory / s.file, count), pending)
                for shard, identity, found in zip(pending, before, hashes, strict=True):
                    if found != shard.sha256:
                        wrong = wrong or (shard, found)
                    elif identity == _identity(directory, shard):  # not written to meanwhile
                        verified[shard.file] = identity
            finally:
                stop.set()  # after Ctrl-C the threads end with their next block
    _remember(directory, verified)
    if wrong is not None:
        shard, found = wrong
        raise DataError(
            f"{directory / shard.file}: its content is not what was prepared (SHA-256 "
            f"{found[:16]}…, and {shard.sha256[:16]}… in the manifest); copy it again, or prepare "
            f"the data again"
        )


def _identity(directory: Path, shard: Any) -> list[Any]:
    path = directory / shard.file
    try:
        status = os.stat(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return [status.st_size, status.st_mtime_ns, status.st_ino, shard.sha256]


def _file_sha256(path: Path, on_bytes: Callable[[int], object]) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_MIB)
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                on_bytes(size)
    except InterruptedError:
        raise
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _verdict_files(directory: Path) -> list[Path]:
    """Where the verdicts on a directory's shards may stand, the first choice first."""
    files = [directory / VERIFIED_NAME]
    name = hashlib.sha256(os.fsencode(os.path.realpath(directory))).hexdigest()[:16]
    with contextlib.suppress(OutputError):  # no home directory
        files.append(cache_directory() / f"verified-{name}.json")
    return files


def _recalled(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in reversed(_verdict_files(directory)):
        with contextlib.suppress(OSError, ValueError, RecursionError):  # absent, or not ours
            verdicts = json.loads(path.read_bytes())
            found.update(verdicts if isinstance(verdicts, dict) else {})
    return found


def _remember(directory: Path, verified: dict[str, list[Any]]) -> None:
    text = json.dumps(verified, indent=1)
    for path in _verdict_files(directory):
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            if path.parent != directory:
                path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
            return
        except OSError:  # a read-only place: the next one, or the shards are read again next time
            with contextlib.suppress(OSError):
                partial.unlink()
