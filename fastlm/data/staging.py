"""A directory that appears complete or not at all: written beside its place, then renamed.

What a stopped process has begun can be gone on with: a file in it says what it is the beginning of.

Also the locks that keep processes apart there, and where the user's cache is.
"""

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlm.errors import OutputError, UserError

PROGRESS_NAME = "progress.json"  # in a directory that is being written


@contextlib.contextmanager
def staging_directory(
    out: str | Path, own_files: re.Pattern[str], overwrite: bool, key: str = ""
) -> Iterator[Path]:
    """A directory beside `out`: renamed onto it at the end, removed on any error.

    own_files: matches the names of files that may be replaced.
    overwrite: a non-empty `out` that holds nothing else may be replaced.
    key: what is written there, of what. A process that was stopped, by a signal or Ctrl-C, may have
        left a directory with this key in its PROGRESS_NAME (save_progress): it is gone on with. The
        new directory is empty otherwise.

    Raises OutputError, before the body runs, if `out` may not be replaced or cannot be written.
    """
    target = Path(os.path.realpath(out))  # of a link, the target is replaced and the link stays
    with contextlib.ExitStack() as stack:
        staging = _clear_leftovers(target, key, stack)
        _check_replaceable(out, target, own_files, overwrite)
        made = [parent for parent in target.parents if not parent.exists()]  # deepest first
        is_new = staging is None
        if staging is None:
            name = f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
            staging = target.parent / name
        with _written(out, staging, made):  # a signal may come as soon as there is a directory
            if is_new:
                _make(out, staging)
                stack.enter_context(_locked_anew(staging))
            yield staging
            for name in (PROGRESS_NAME, f"{PROGRESS_NAME}.new"):
                (staging / name).unlink(missing_ok=True)
            for path in (*staging.iterdir(), staging):
                sync(path)  # a rename must not reach the disk before the contents
            _check_replaceable(out, target, own_files, overwrite)  # may be there by now
            _replace(staging, target, overwrite)


def save_progress(staging: Path, key: str, progress: dict[str, Any]) -> None:
    """Says how far the directory is: what is on the disk now is the beginning of `key`'s."""
    partial = staging / f"{PROGRESS_NAME}.new"
    partial.write_text(json.dumps({"key": key, **progress}), encoding="utf-8")
    sync(partial)
    os.replace(partial, staging / PROGRESS_NAME)


def read_progress(staging: Path) -> dict[str, Any] | None:
    """What save_progress was last told; None if nothing can be gone on with."""
    try:
        found = json.loads((staging / PROGRESS_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _make(out: str | Path, staging: Path) -> None:
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise OutputError(
            f"--out {out}: cannot write in {staging.parent} ({error.strerror}); choose a "
            f"directory that you can write to"
        ) from error


@contextlib.contextmanager
def _written(out: str | Path, staging: Path, made: list[Path]) -> Iterator[None]:
    """Removes what there is after an error; it stays where a process that is stopped said so."""
    try:
        try:
            yield
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise OutputError(f"--out {out}: cannot be written ({error.strerror})") from error
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        if not (stopped and read_progress(staging)):
            shutil.rmtree(staging, ignore_errors=True)
            _unmake(made)
        raise


def _unmake(made: list[Path]) -> None:
    for parent in made:
        try:
            parent.rmdir()
        except OSError:
            break  # never made, or somebody else's by now


def _check_replaceable(
    out: str | Path, target: Path, own_files: re.Pattern[str], overwrite: bool
) -> None:
    try:
        entries = sorted(entry.name for entry in target.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"--out {out}: not a usable directory ({error.strerror})") from error
    # --overwrite with a home directory, or with runs saved beside the data, must lose nothing.
    foreign = [name for name in entries if not own_files.fullmatch(name)]
    if foreign:
        raise OutputError(
            f"--out {out}: holds {foreign[0]!r}, which is not prepared data; choose another "
            f"directory"
        )
    if entries and not overwrite:
        raise OutputError(
            f"--out {out}: is not empty; add --overwrite to replace it, or choose another directory"
        )


def _replace(staging: Path, target: Path, overwrite: bool) -> None:
    # rename() replaces an empty directory, never a full one: that one steps aside. If the process
    # is killed between the two renames, the old data is still there, under the hidden name.
    aside = staging.with_name(staging.name.replace(".partial-", ".replaced-"))
    with contextlib.ExitStack() as stack:
        if overwrite and target.exists():
            stack.enter_context(locked(target))
            target.rename(aside)
        try:
            staging.rename(target)
        except BaseException:
            if aside.exists():
                aside.rename(target)
            raise
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _clear_leftovers(target: Path, key: str, stack: contextlib.ExitStack) -> Path | None:
    """Removes what killed processes left beside `target`; brings back what one had set aside.

    The newest with `key` is locked in `stack` and returned.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-\d+-[0-9a-f]{{8}}")
    found = None
    with contextlib.suppress(OSError):  # no such directory, or not ours to tidy
        paths = sorted(target.parent.iterdir(), key=_newest_first)
        for path in (p for p in paths if name.fullmatch(p.name)):
            with contextlib.suppress(OSError), contextlib.ExitStack() as lock:
                lock.enter_context(locked(path, wait=False))
                is_partial = ".partial-" in path.name
                if not is_partial and not os.path.lexists(target):
                    path.rename(target)
                elif is_partial and found is None and key and _key(path) == key:
                    found = path
                    stack.push(lock.pop_all())
                else:
                    shutil.rmtree(path, ignore_errors=True)
    return found


def _newest_first(path: Path) -> tuple[bool, int]:
    """What is set aside first: it may be the data itself."""
    with contextlib.suppress(OSError):
        return ".partial-" in path.name, -path.stat().st_mtime_ns
    return True, 0


def _key(staging: Path) -> str | None:
    return (read_progress(staging) or {}).get("key")


@contextlib.contextmanager
def _locked_anew(directory: Path) -> Iterator[None]:
    """Locks a directory just made, made again should another process have tidied it away before.

    One of its kind without a lock is a leftover.
    """
    with contextlib.ExitStack() as stack:
        while True:
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(locked(directory))
            if directory.exists():
                break
            stack.close()
            directory.mkdir()
        yield


@contextlib.contextmanager
def locked(directory: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a directory, which its process's end gives back whatever ends it.

    wait: until another process gives it back; else raises BlockingIOError. A file system without
    locks raises OSError where not waiting, and is written to without one otherwise.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if wait else contextlib.nullcontext():
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/fastlm` or `~/.cache/fastlm`; OutputError where there is no home."""
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError as error:
        raise OutputError(
            f"there is no home directory for the cache ({error}); set XDG_CACHE_HOME to a "
            f"directory that you can write to"
        ) from error
    return root.absolute() / "fastlm"


def sync(path: Path) -> None:
    """Writes a file's content, or a directory's renames, to the disk."""
    # Not every file system can open or flush a directory; the data is then as safe as it gets.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
