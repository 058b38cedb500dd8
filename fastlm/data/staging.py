"""A directory that appears complete or not at all: written beside its place, then renamed."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastlm.errors import OutputError, UserError


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
    if overwrite and target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        if aside.exists():
            aside.rename(target)
        raise
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Writes a file's content, or a directory's renames, to the disk."""
    # Not every file system can open or flush a directory; the data is then as safe as it gets.
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
