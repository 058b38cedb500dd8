"""What a run shows and writes, where the other end may go: a closed pipe, a full disk, a directory
that is removed. Nothing of it ends a run; what is missing is said at the end.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fastlm.parallel.world import World

_KEPT_BYTES = 4 << 20  # of the lines that wait for room in a file


@contextlib.contextmanager
def rank_0_tells(world: World) -> Iterator[None]:
    """Nothing of what other ranks print is shown; errors go to stderr and stay."""
    if world.is_main:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class Missing:
    """What could not be shown or written. Empty: nothing."""

    def __init__(self) -> None:
        self._lines: dict[str, tuple[int, str]] = {}  # place -> (lines, reason)
        self._notes: list[str] = []

    def lines(self, count: int, place: str, error: Exception) -> None:
        """`count` lines of `place` are lost."""
        if count:
            before = self._lines.get(place, (0, ""))[0]
            self._lines[place] = (before + count, _reason(error))

    def note(self, what: str) -> None:
        """Anything else that the run should have left and did not."""
        if what not in self._notes:
            self._notes.append(what)

    def lost(self, place: str) -> bool:
        return place in self._lines

    def __bool__(self) -> bool:
        return bool(self._lines or self._notes)

    def __str__(self) -> str:
        lost = [
            f"{n:,} line{'s' * (n > 1)} of {place} ({reason})"
            for place, (n, reason) in self._lines.items()
        ]
        return "; ".join(lost + self._notes)


class SurvivingStream:
    """A text stream whose writes never raise: what they lose is counted, and the next is tried."""

    def __init__(self, stream: TextIO, place: str, missing: Missing):
        self._stream, self._place, self._missing = stream, place, missing
        self._waiting = 0  # lines in the stream's buffer, which it keeps when a flush fails
        self._error: Exception = OSError()

    def write(self, text: str) -> int:
        lines = text.count("\n")
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:  # LANG=C and a sample with an umlaut
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            self._waiting += lines
        except (OSError, ValueError) as error:  # ValueError: closed
            self._missing.lines(lines, self._place, error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
            self._waiting = 0
        except (OSError, ValueError) as error:
            self._error = error

    def finish(self) -> None:
        """Tries the buffered lines a last time."""
        self.flush()
        self._missing.lines(self._waiting, self._place, self._error)
        self._waiting = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_missing: Missing | None = None  # of the run in this process


@contextlib.contextmanager
def surviving_output() -> Iterator[Missing]:
    """Inside, no print raises. At the end says in one line what is missing, where that is possible.

    Inside another one it is that one: train_loop has its own, which the command's includes.
    """
    global _missing
    if _missing is not None:
        yield _missing
        return
    _missing = missing = Missing()
    streams = sys.stdout, sys.stderr
    stdout, stderr = (
        SurvivingStream(stream, place, missing) if stream is not None else None
        for stream, place in zip(streams, ("stdout", "stderr"), strict=True)
    )
    sys.stdout, sys.stderr = stdout, stderr
    try:
        yield missing
    finally:
        for stream in filter(None, (stdout, stderr)):
            stream.finish()
        if (sys.stdout, sys.stderr) == (stdout, stderr):
            sys.stdout, sys.stderr = streams
        _missing = None
        if missing:
            for stream in streams if missing.lost("stdout") else streams[:1]:
                with contextlib.suppress(OSError, ValueError):
                    print(f"[train] missing: {missing}", file=stream, flush=True)


def fill_closed_descriptors() -> None:
    """Opens /dev/null where a standard stream is closed (`>&-`).

    Otherwise the next file that is opened, a checkpoint for one, has the number 1 or 2, and what
    libraries write to "stderr" ends up in it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def silence_broken_streams() -> None:
    """To be called last: what Python would flush into a closed pipe at exit goes nowhere, and the
    exit code stays what it is (Python's own would be 120, after a traceback)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


class LineFile:
    """Appends whole lines to a file. Lines that cannot be written wait for the next one."""

    def __init__(self, path: Path, missing: Missing):
        self.path, self._missing = path, missing
        self._waiting: list[bytes] = []
        self._error: Exception = OSError()
        self._begun = False

    def write(self, line: str) -> None:
        # A file name need not be UTF-8: its bytes are logged as they are.
        self._waiting.append(line.encode("utf-8", "surrogateescape") + b"\n")
        if self._begun and not self.path.exists():
            self._missing.note(f"the beginning of {self.path} (removed during the run)")
            self._begun = False
        try:
            _append(self.path, b"".join(self._waiting))
        except OSError as error:
            self._error = error
            while sum(map(len, self._waiting)) > _KEPT_BYTES:
                del self._waiting[0]
                self._missing.lines(1, str(self.path), error)
            return
        self._waiting.clear()
        self._begun = True

    def close(self) -> None:
        """Counts what still waits as missing."""
        self._missing.lines(len(self._waiting), str(self.path), self._error)
        self._waiting.clear()


def _append(path: Path, data: bytes) -> None:
    """All of `data` or nothing."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    try:
        handle = os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, flags, 0o666)
    try:
        size = os.fstat(handle).st_size
        try:
            while data:
                data = data[os.write(handle, data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(handle, size)  # no torn line that the next one would continue
            raise
    finally:
        os.close(handle)


def replace_content(path: Path, content: bytes) -> None:
    """Writes the file anew: at every moment there is the old one or the new one.

    For one writer: a process that is killed here leaves a file that `remove_half_written` knows.
    """
    temporary = _half_written(path)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_half_written(path: Path) -> None:
    """Removes what a process has left that was killed in replace_content."""
    with contextlib.suppress(OSError):
        _half_written(path).unlink(missing_ok=True)


def _half_written(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
