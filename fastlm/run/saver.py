"""A run's checkpoints: written in the background, one at a time; old ones deleted.

A save never ends a run. What became of it is told by Saver.reports, and at the end by
Saver.missing.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlm.checkpoint_file import remove_checkpoint, write_checkpoint
from fastlm.checkpoint_reading import peek
from fastlm.hardware import is_out_of_memory
from fastlm.kernels.collect import is_dtensor, local_part
from fastlm.parallel.commit import SUFFIX
from fastlm.parallel.world import World
from fastlm.run.guard import is_good


class Report(NamedTuple):
    """A checkpoint that has been written, or why it has not."""

    path: Path
    error: str | None = None


Writer = Callable[[dict[str, Any], Path], None]


def writer_for(world: World, *, sharded: bool) -> Writer:
    """How this process takes part in a save: rank 0 writes files, all write a directory."""
    if world.size == 1:
        return partial(write_checkpoint, read_back=True)
    group = world.new_cpu_group() if sharded else None

    def write(payload: dict[str, Any], path: Path) -> None:
        if path.suffix == SUFFIX:
            from fastlm.parallel.sharded import write_sharded

            write_sharded(payload, path, group=group, read_back=True)
        elif world.is_main:
            write_checkpoint(payload, path, read_back=True)

    return write


class Saver:
    """Writes payloads as {prefix}_{name}.pt and keeps the last `keep_last` numbered ones.

    Only numbered checkpoints are ever deleted: those that this object wrote, and of those found at
    the start the ones that carry this run's id. One is deleted only when a newer one has been
    written, read back and found whole; never the one with the best validation loss, nor the last
    one that the guard may roll back to.
    """

    def __init__(
        self,
        path_of: Callable[[str], Path],  # name -> path
        *,
        keep_last: int,  # 0: all
        minutes: float | None = None,  # of wall clock, after which a save is due
        wait_for_each: bool = False,  # write before `save` returns
        found: Iterable[Path] = (),  # numbered checkpoints of the run's earlier processes
        resumed: Path | None = None,  # the checkpoint that the run goes on from
        write: Writer | None = None,  # default: one file
        deletes: bool = True,  # False: another process does
    ):
        self._path_of, self._keep_last, self._wait_for_each = path_of, keep_last, wait_for_each
        self._write_file = write or partial(write_checkpoint, read_back=True)
        self._deletes = deletes
        self._seconds = math.inf if minutes is None else minutes * 60
        self._last_save = time.monotonic()
        self._thread: threading.Thread | None = None
        self._buffers: dict[Any, Tensor] = {}
        self._reports: deque[Report] = deque()
        self._bug: BaseException | None = None
        self._failed: dict[str, str] = {}  # name -> why
        # step -> file; of those found, whether they are this run's is looked up before deletion.
        self._numbered: dict[int, Path] = {}
        self._found = {step: path for path in found if (step := _step_of(path)) is not None}
        self._numbered.update(self._found)
        self._unevaluated: int | None = None  # the step of the last numbered save
        self._best: tuple[float, int] | None = None  # (validation loss, step)
        self._good: int | None = None  # the last step saved that was no skipped one
        self.newest: Path | None = resumed  # what a run can go on from
        if resumed is not None:
            payload = _peek(resumed)
            best = _stored_best(payload)
            self._best = best if best and best[1] in self._numbered else None
            step = _step_of(resumed)
            if step in self._numbered:
                self._unevaluated = step
                self._good = step if is_good(payload) else None

    def reserve(self, payload: dict[str, Any]) -> None:
        """Makes the memory of the copies of such a payload, in the background: otherwise the first
        save waits for its pages, ten times as long as for the copy. To be called when the optimizer
        has its state."""
        if self._wait_for_each or self._thread is not None:
            return

        def touch() -> None:
            try:
                # Not what is in it: on a GPU the copy would stand between the steps' kernels.
                self._copied(payload, values=False)
            except (MemoryError, RuntimeError):  # the save copies again, and tells
                self._buffers.clear()

        thread = threading.Thread(target=touch, name="checkpoint buffers")
        try:
            thread.start()
        except RuntimeError:  # no more threads: the first save does it
            return
        self._thread = thread

    def save(self, name: str, payload: dict[str, Any], *, wait: bool = False) -> None:
        """Copies the tensors of `payload` and starts to write it; waits for the save before it.

        name: a number of steps, or "final", "model", …; wait: returns when the file is there, or is
        known to fail.
        """
        self.wait()
        self._last_save = time.monotonic()
        self._unevaluated = int(name) if name.isdecimal() else None
        if name.isdecimal() or name == "final":
            best = self._best and {"val_loss": self._best[0], "step": self._best[1]}
            payload = {**payload, "best_checkpoint": best}
        if self._wait_for_each:
            self._write(name, payload)
        else:
            try:
                copy = self._copied(payload)
                thread = threading.Thread(target=self._write, args=(name, copy), name="checkpoint")
                thread.start()
                self._thread = thread
            except (MemoryError, RuntimeError) as error:
                if not (is_out_of_memory(error) or "start new thread" in str(error)):
                    raise
                self._buffers.clear()
                self._write(name, payload)  # which needs neither
        if wait:
            self.wait()

    def holds(self, step: int) -> bool:
        """Is the checkpoint of `step` there? Waits for it if it is in flight."""
        self.wait()
        return step in self._numbered

    def due(self) -> bool:
        """Have the minutes gone by since the last save?"""
        return time.monotonic() - self._last_save >= self._seconds

    def wait(self) -> None:
        """Returns when no save is in flight."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def reports(self) -> list[Report]:
        """What has become of saves since the last call; usually nothing. To be called every step.

        Raises what a save has raised, unless it is the disk's or the memory's failure.
        """
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        return reports

    def evaluated(self, val_loss: float) -> None:
        """The validation loss of the model now: that of the newest checkpoint, unless it has one.

        Saves and evaluations need not coincide: the first evaluation behind a checkpoint counts.
        """
        step, self._unevaluated = self._unevaluated, None
        if step is None or not math.isfinite(val_loss) or not self.holds(step):
            return
        if self._best is None or val_loss < self._best[0]:
            self._best = (val_loss, step)

    def emergency(self, payload: dict[str, Any]) -> Report:
        """Writes {prefix}_emergency.pt now, in an exception's wake; raises nothing of its own.

        No resume takes it unless it is named, and nothing deletes it.
        """
        self.wait()
        self._buffers.clear()
        path = self._path_of("emergency")
        try:
            write_checkpoint(payload, path, read_back=True)
        except Exception as error:  # the exception that led here is the one to raise
            return Report(path, str(error) or type(error).__name__)
        return Report(path)

    def missing(self) -> list[str]:
        """At a run's end: what should be there and could not be written: the final one, the
        weights, one of the last numbered ones; each with the reason."""
        self.wait()
        return [
            f"{self._path_of(name)} ({why})"
            for name, why in self._failed.items()
            if not (name.isdecimal() and self._is_old(int(name)))
        ]

    def forget_after(self, step: int) -> None:
        """The run has gone back to `step`: the checkpoints of later ones are no longer its own."""
        self.wait()
        for later in [number for number in self._numbered if number > step]:
            del self._numbered[later]
            self._found.pop(later, None)
        self._failed = {name: why for name, why in self._failed.items() if not name.isdecimal()}
        if self._best is not None and self._best[1] > step:
            self._best = None
        self._good = step if step in self._numbered else None
        self._unevaluated = None

    def _is_old(self, step: int) -> bool:
        """Would its checkpoint have been deleted by now, its loss apart?"""
        return 0 < self._keep_last <= sum(other > step for other in self._numbered)

    def _copied(self, payload: dict[str, Any], *, values: bool = True) -> dict[str, Any]:
        """`payload` with every tensor copied to the CPU, of a DTensor what this rank holds. One
        that stands in it twice stays one. values=False: memory that is used, with zeros."""
        copies: dict[Any, Tensor] = {}

        def copied(value: Any, place: tuple) -> Any:
            if isinstance(value, dict):
                return {key: copied(item, (*place, key)) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(copied(item, (*place, i)) for i, item in enumerate(value))
            if not isinstance(value, Tensor):
                return value
            part = local_part(value.detach())  # of a DTensor what this rank holds
            memory = (part.data_ptr(), part.dtype, part.shape, part.stride(), part.device)
            if memory not in copies or not part.numel():
                buffer = self._buffers.get(place)
                # "model" holds whole tensors where the others hold parts.
                if buffer is None or _kind(buffer) != _kind(value):
                    buffer = torch.empty_like(
                        value.detach(), device="cpu", memory_format=torch.contiguous_format
                    )
                if values:
                    local_part(buffer).copy_(part)
                else:
                    local_part(buffer).zero_()
                self._buffers[place] = copies[memory] = buffer
            return copies[memory]

        return copied(payload, ())

    def _write(self, name: str, payload: dict[str, Any]) -> None:
        path = self._path_of(name)
        try:
            self._write_file(payload, path)
        except (OSError, MemoryError) as error:
            cause = error.__cause__  # OutputError's own text names the path, which stands before it
            self._failed[name] = getattr(cause, "strerror", None) or str(error) or "out of memory"
            self._reports.append(Report(path, str(error) or "out of memory"))
        except BaseException as error:  # of a payload that torch.save does not take
            self._bug = error
        else:
            self._failed.pop(name, None)
            self._reports.append(Report(path))
            if name.isdecimal():
                self._numbered[int(name)] = path
                self._found.pop(int(name), None)
                if is_good(payload):
                    self._good = int(name)
            if name.isdecimal() or name == "final":
                self.newest = path
                self._delete_old(payload.get("run_id"))

    def _delete_old(self, run_id: str | None) -> None:
        """A newer one has just been read back: deletes what is neither among the last, nor the
        best, nor the one to roll back to."""
        if not self._keep_last:
            return
        keep = {*sorted(self._numbered)[-self._keep_last :], self._good}
        if self._best is not None:
            keep.add(self._best[1])
        for step in sorted(self._numbered.keys() - keep):
            path = self._numbered.pop(step)
            found = self._found.pop(step, None)
            if found is not None and not (run_id and _peek(path).get("run_id") == run_id):
                continue  # another run's, or nobody knows
            try:
                if self._deletes:
                    remove_checkpoint(path)
            except OSError as error:
                self._numbered[step] = path  # tried again after the next save
                self._reports.append(Report(path, f"{path}: cannot be deleted ({error.strerror})"))


def _kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, is_dtensor(tensor)


def _step_of(path: Path) -> int | None:
    step = path.stem.rpartition("_")[2]
    return int(step) if step.isdecimal() else None


def _peek(path: Path) -> dict[str, Any]:
    """A checkpoint's content without reading its tensors; {} if there is none."""
    try:
        payload = peek(path)
    except Exception:  # gone, damaged, or another program's
        return {}
    return payload if isinstance(payload, dict) else {}


def _stored_best(payload: dict[str, Any]) -> tuple[float, int] | None:
    best = payload.get("best_checkpoint")
    if not isinstance(best, dict):
        return None
    val_loss, step = best.get("val_loss"), best.get("step")
    return (val_loss, step) if type(val_loss) is float and type(step) is int else None
