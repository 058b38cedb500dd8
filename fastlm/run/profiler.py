"""--profile A:B: what torch.profiler sees of the steps A to B - 1, and on CUDA their memory."""

import contextlib
import gzip
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastlm.errors import ConfigError, shown

_MEMORY_EVENTS = 100_000  # the newest; each has a stack, a kilobyte or so


def parse_span(text: str) -> tuple[int, int]:
    """(A, B) of "A:B", 0 <= A < B: the steps A to B - 1, counted as in the log. Raises ConfigError
    for anything else."""
    match = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    if not match or not int(match[1]) < int(match[2]):
        raise ConfigError(
            f"profile={shown(text)}: it must be A:B with 0 <= A < B, for the steps A to B - 1"
        )
    return int(match[1]), int(match[2])


class StepProfiler:
    """Profiles the steps of a span; `step` before each step, `close` behind the last.

    Writes {directory}/trace_rank{rank}.json.gz and on CUDA memory_rank{rank}.pickle, and says where
    they are. Nothing here raises: what fails is said, and handed to `missing`. The steps compute
    what they would without it; the time to start it and to write is not the clock's.
    """

    def __init__(
        self,
        span: tuple[int, int],
        directory: str | os.PathLike,
        device: torch.device,
        clock: Any,  # a Clock of summary.py
        *,
        rank: int = 0,
        say: Callable[[str], object] = print,
        missing: Callable[[str], object] = lambda what: None,
    ):
        self.begin, self.end = span
        self.directory, self.device, self.rank = Path(directory), device, rank
        self.clock, self.say, self.missing = clock, say, missing
        self._profile: torch.profiler.profile | None = None  # while it runs
        self._done = False
        self._steps: list[int] = []  # those begun
        self._mark: torch.profiler.record_function | None = None  # of the step that runs

    def step(self, step: int) -> None:
        """Step number `step` begins now."""
        if self._done or (step < self.begin and self._profile is None):
            return
        if self._profile is None:
            if step >= self.end:  # a run that was resumed behind it
                self._done = True
                self.say(f"[profile] nothing: steps {self.begin} to {self.end - 1} are over")
                return
            self._outside_the_clock(self._start)
        elif step >= self.end or len(self._steps) >= self.end - self.begin:
            # The second: the guard may roll back, and steps repeat.
            self._outside_the_clock(self._finish)
        if self._profile is not None:
            self._end_mark()
            self._steps.append(step)
            self._mark = torch.profiler.record_function(f"training step {step}")
            self._mark.__enter__()

    def close(self) -> None:
        """Writes what there is, if the run has ended within the span."""
        if self._profile is not None:
            self._finish()
        elif not self._done:
            self._done = True
            self.say(f"[profile] nothing: the run ended before step {self.begin}")

    def _outside_the_clock(self, work: Callable[[], None]) -> None:
        self.clock.pause()
        work()
        self.clock.start()

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        try:
            if self.device.type == "cuda":
                torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)
            profile = torch.profiler.profile(activities=activities, record_shapes=True)
            profile.start()
        except Exception as error:  # another profiler runs in this process
            self._stop_memory_history()
            self._failed("the profiler", error)
            return
        self._profile = profile

    def _finish(self) -> None:
        profile, self._profile, self._done = self._profile, None, True
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # an error that the run ends with anyway
                torch.cuda.synchronize(self.device)
        self._end_mark()
        steps = f"steps {self._steps[0]} to {self._steps[-1]}"
        trace = self.directory / f"trace_rank{self.rank}.json.gz"
        try:
            profile.stop()
            _write_trace(profile, trace)
            self.say(f"[profile] {steps}: {trace}; open it at https://ui.perfetto.dev")
        except Exception as error:
            self._failed(f"the trace of {steps}, {trace},", error)
        if self.device.type == "cuda":
            snapshot = self.directory / f"memory_rank{self.rank}.pickle"
            try:
                torch.cuda.memory._dump_snapshot(str(snapshot))
                self.say(
                    f"[profile] {steps}, memory: {snapshot}; open it at "
                    f"https://pytorch.org/memory_viz"
                )
            except Exception as error:
                self._failed(f"the memory snapshot of {steps}, {snapshot},", error)
            self._stop_memory_history()

    def _end_mark(self) -> None:
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None

    def _stop_memory_history(self) -> None:
        if self.device.type == "cuda":
            with contextlib.suppress(RuntimeError):
                torch.cuda.memory._record_memory_history(enabled=None)

    def _failed(self, what: str, error: Exception) -> None:
        self._done = True
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.say(f"[profile] FAILED: {what} could not be had ({reason}); the run goes on")
        self.missing(f"what --profile asked for ({reason})")


def _write_trace(profile: torch.profiler.profile, path: Path) -> None:
    """Compressed, and renamed once it is whole. torch says nothing where the disk is full."""
    plain, packed = (path.with_name(f"{path.stem}{end}") for end in (".partial", ".gz.partial"))
    try:
        profile.export_chrome_trace(str(plain))
        with open(plain, "rb") as source:
            source.seek(-min(64, os.path.getsize(plain)), os.SEEK_END)
            if not source.read().rstrip().endswith(b"}"):
                raise OSError(f"{plain} is cut short: is the disk full?")
            source.seek(0)
            with gzip.open(packed, "wb", compresslevel=6) as target:
                shutil.copyfileobj(source, target)
        os.replace(packed, path)
    finally:
        for file in (plain, packed):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
