"""One writer a directory: a lock that ends with its process, however that ends."""

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path

from fastlm.errors import OutputError

LOCK = "run.lock"


class DirectoryLock:
    """Holds `directory`/run.lock (flock) from `acquire` to `release`, which removes it.

    The file tells who holds it: process, host and start time, as JSON. One left behind by a killed
    process is not held, and the next run takes it.
    """

    _said = False  # that a file system has no locks; once a process

    def __init__(self, directory: Path):
        self.path = directory / LOCK
        self._handle: int | None = None

    def acquire(self) -> None:
        """Raises OutputError, naming the holder, if another process or run holds it."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if not self._locked(handle):
                    return
                if self._is_the_file(handle):
                    os.ftruncate(handle, 0)
                    os.pwrite(handle, _myself(), 0)
                    self._handle, handle = handle, -1
                    return
                # Its holder removed it between the two calls: lock the file that is there now.
            finally:
                if handle >= 0:
                    os.close(handle)

    def release(self) -> None:
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        if self._is_the_file(handle):
            with contextlib.suppress(OSError):  # the directory may have been taken away
                self.path.unlink()  # while it is locked: nobody can hold what is removed
        os.close(handle)

    def _locked(self, handle: int) -> bool:
        """False where there are no locks."""
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                f"{self.path.parent}: {_holder(handle)} writes there; wait for its end, stop it, "
                f"or choose another --target-dir"
            ) from error
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.unlink()
            if not DirectoryLock._said:
                DirectoryLock._said = True
                print(
                    f"[run] {self.path.parent}: cannot be locked there ({error}); nothing keeps a "
                    f"second run from writing into it"
                )
            return False
        return True

    def _is_the_file(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except OSError:
            return False


def _myself() -> bytes:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
    return json.dumps(who).encode()


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 1000, 0))
        return f"process {who['pid']} on {who['host']}, started {who['started']},"
    except (ValueError, KeyError, TypeError, OSError):  # it has not written its name yet
        return "another process"
