"""A directory that appears complete or not at all: written beside its place, then renamed.

Also the locks that keep processes apart there, and where the user's cache is.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastlm.errors import OutputError, UserError

try:
    import fcntl
except ImportError:  # Windows: no locks, and what a killed process leaves stays
    fcntl = None


@contextlib.contextmanager
def staging_directory(
    out: str | Path, own_files: re.Pattern[str], overwrite: bool
) -> Iterator[Path]:
    """A new directory beside `out`: renamed onto it at the end, removed on any exception.

    own_files: matches the names of files that may be replaced.
    overwrite: a non-empty `out` that holds nothing else may be replaced.

    Raises OutputError, before the body runs, if `out` may not be replaced or cannot be written.
    """
    target = Path(os.path.realpath(out))  # of a link, the target is replaced and the link stays
    _clear_leftovers(target)
    _check_replaceable(out, target, own_files, overwrite)
    made = [parent for parent in target.parents if not parent.exists()]  # deepest first
    staging = target.parent / f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise OutputError(
                f"--out {out}: cannot write in {target.parent} ({error.strerror}); choose a "
                f"directory that you can write to"
            ) from error
        try:
            with _locked_anew(staging):
                yield staging
                for path in (*staging.iterdir(), staging):
                    sync(path)  # a rename must not reach the disk before the contents
                _check_replaceable(out, target, own_files, overwrite)  # may be there by now
                _replace(staging, target, overwrite)
        except OSError as error:
            if isinstance(error, UserError):
                raise
            raise OutputError(f"--out {out}: cannot be written ({error.strerror})") from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made:
            try:
                parent.rmdir()
            except OSError:
                break  # never made, or somebody else's by now
        raise


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


def _clear_leftovers(target: Path) -> None:
    """Removes what killed processes left beside `target`; brings back what one had set aside."""
    name = re.compile(rf"\.{re.escape(target.name)}\.(partial|replaced)-\d+-[0-9a-f]{{8}}")
    with contextlib.suppress(OSError):  # no such directory, or not ours to tidy
        for path in sorted(target.parent.iterdir(), reverse=True):  # .replaced- before .partial-
            if not (match := name.fullmatch(path.name)):
                continue
            with contextlib.suppress(OSError), locked(path, wait=False):
                if match[1] == "replaced" and not os.path.lexists(target):
                    path.rename(target)
                else:
                    shutil.rmtree(path, ignore_errors=True)


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
    if fcntl is None:
        if not wait:
            raise OSError("no locks here")
        yield
        return
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
