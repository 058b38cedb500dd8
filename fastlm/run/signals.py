"""The signals that end a run."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from fastlm.parallel.world import World

# SIGUSR1 is what clusters send some time before the end (Slurm: --signal=USR1@90).
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


class Stopped(Exception):
    """A stop was asked for in the middle of something that can be left."""


class StopSignals:
    """SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 ask for a stop at the next safe point; a second
    one ends the process at once, with 128 + its number. In somebody else's program, a notebook for
    one, a second Ctrl-C raises KeyboardInterrupt where the run is.

    A signal that is ignored when the run begins stays ignored: nohup's SIGHUP, a background job's
    SIGINT. Outside the main thread, where Python lets nobody handle signals, it does nothing.

    managed: torchrun passes a signal on to all of its processes, and ends them itself when they
    take too long: a second one says nothing new. tells: answers the first on stderr.
    """

    is_command = False  # the process is the trainer's own

    def __init__(self, *, managed: bool = False, tells: bool = True) -> None:
        self.managed, self.tells = managed, tells
        self.received: int | None = None
        self.promise = "nothing is saved yet"  # what a first signal's answer says
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    @property
    def name(self) -> str | None:
        return None if self.received is None else signal.Signals(self.received).name

    def __enter__(self) -> "StopSignals":
        for name in NAMES:
            number = getattr(signal, name)
            if signal.getsignal(number) == signal.SIG_IGN:
                continue
            with contextlib.suppress(ValueError):  # not the main thread
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and self.managed:
            return
        if self.requested:
            if number == signal.SIGINT and not self.is_command:
                raise KeyboardInterrupt
            _tell("stopped at once: nothing was saved after the last checkpoint")
            os._exit(128 + number)
        self.received = number
        if self.tells:
            again = "" if self.managed else " (again: stop at once)"
            _tell(f"stopping: {self.promise}{again}")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def leave(self, *, failed: bool = False) -> None:
        """Ends as the received signal ends a program, SIGUSR1 with 0, or with 1 where something
        has `failed`; returns if there was none."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            sys.exit(int(failed) if self.name == "SIGUSR1" else 128 + self.received)

    def leave_together(self, world: World) -> None:
        """leave() of all processes, which call this together: a signal to one ends them all."""
        (number,) = world.vote(self.received or 0).wait()
        self.received = number or None
        self.leave()

    def interruptible(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls raise Stopped once a stop is asked for."""

        def call(*args: Any) -> Any:
            if self.requested:
                raise Stopped
            return function(*args)

        return call


def _tell(line: str) -> None:
    # Not print: a handler may run in the middle of one. The terminal may be gone (SIGHUP).
    with contextlib.suppress(OSError):
        os.write(2, f"\n[train] {line}\n".encode())
