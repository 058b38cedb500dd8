"""The signals that end a run."""

import contextlib
import os
import signal
import sys
from types import FrameType


class StopSignals:
    """SIGINT (Ctrl-C) and SIGTERM ask for a stop at the next step's end; a second one ends at once.

    Outside the main thread, where Python lets nobody handle signals, it does nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.received is not None

    @property
    def name(self) -> str | None:
        return None if self.received is None else signal.Signals(self.received).name

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os.write(2, b"\n[train] stopped at once: nothing was saved after the last checkpoint\n")
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\n[train] stopping: a checkpoint follows (again: stop at once)\n")

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def leave(self) -> None:
        """Ends as a program ends on the received signal; returns if there was none."""
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            sys.exit(128 + self.received)
