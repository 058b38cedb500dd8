"""The guard: steps whose loss or gradient is bad leave the model as it was.

A step is bad if its loss or its gradient's norm is not finite, or if its loss is beyond a bound:
the median of the last WINDOW good losses plus FACTOR robust standard deviations (1.4826 times the
median distance from the median, which is the standard deviation of a normal distribution), and
MARGIN at least. There is no bound before there have been WINDOW good steps.

Outliers, losses beyond that, may be the data's own, as those of a mixture's rare source: what is
never trained on stays beyond. So the bound is raised to MARGIN above the OFTEN-th largest outlier
of the last MEMORY steps, and of twice ln(vocabulary) at most. A stretch of them in a row counts
once, by its first loss.

All of it is decided and counted on the device: a step waits for nothing. The counts are read where
the run waits anyway, at its log lines.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.checkpoint import (
    Reader,
    iteration_of,
    list_checkpoints,
    read_checkpoint,
    read_values,
)
from fastlm.checkpoint_reading import peek
from fastlm.errors import CheckpointError, DivergedError
from fastlm.foreign_state import first_line
from fastlm.optim import AdamW
from fastlm.run.output import Missing

WINDOW = 128  # good steps, OLMo's number too
# OLMo skips beyond 6 standard deviations, which earlier spikes within the window enlarge; they do
# not enlarge robust ones. In 11,000 steps of ordinary runs, noisy ones and warm-ups to rates that
# are too high among them, the largest distance was 4.4.
FACTOR = 10.0
MARGIN = 0.5  # nats; where nearly all of the data is known by heart, a new window is no accident
OFTEN = 5
MEMORY = 2048  # steps: one in 400 may hold the rare source
OUTLIERS = 32  # that are remembered, the last ones
# So many losses beyond the bound in a row, while the weights stay as they are, are no accident of
# the data: this is what the model's loss is now. The bound is learnt anew.
NEW_LEVEL = 16
ROLL_BACK = 10  # bad steps in a row
GIVE_UP = 100  # bad steps in a row; float16's loss scale is at its end long before
ROLL_BACKS = 3  # to the same checkpoint


@dataclass
class Report:
    """The guard's counts on the host; skipped, new_levels: since the run began."""

    skipped: int
    in_a_row: int
    new_levels: int
    # Of the last bad step.
    loss: float
    bound: float  # NaN: there was none
    row: int  # of the first parameter whose gradient was not finite; -1: none


class Guard:
    """mode "skip" or "rollback"; "off": no bound. In every mode the optimizer leaves out a step
    whose gradient is not finite."""

    def __init__(self, mode: str, device: torch.device, vocab_size: int | None = None):
        self.mode, self.device = mode, device
        # No data are worse than that: of equal chances the loss is the logarithm.
        self._ceiling = 2 * math.log(vocab_size) if vocab_size else math.inf
        self.steps = 0  # judged since the run began
        self.rolled_back = 0
        self.back_to, self.times = -1, 0  # the step of the last roll back, how often in a row to it
        self._ring = torch.full((WINDOW,), math.nan, device=device)  # good losses, the newest last
        # Outliers and their steps, of a stretch the last one's; the newest last.
        self._outliers = torch.full((OUTLIERS,), -math.inf, device=device)
        self._at = torch.full((OUTLIERS,), -MEMORY - 1, dtype=torch.int64, device=device)
        # Skipped steps; bad ones in a row; those with a finite loss in a row; new levels.
        self._skipped, self._in_a_row, self._spikes, self._new_levels = torch.zeros(
            4, dtype=torch.int64, device=device
        ).unbind()
        self._level = self._bound = torch.full((), math.nan, device=device)
        self._last = torch.full((3,), math.nan, device=device)  # loss, bound, row of a bad step
        self.bad = torch.zeros(1, device=device)  # 1: skip the step; what AMP calls found_inf

    def judge(self, loss: Tensor) -> None:
        """Before the update. loss: 0-d, the mean over the step's tokens."""
        good = loss.isfinite()
        if self.mode != "off":
            center = self._ring.median()  # NaN until the ring is full, and no loss is above NaN
            spread = (self._ring - center).abs().median()
            self._level = center + (FACTOR * 1.4826 * spread).clamp_min(MARGIN)
            recent = torch.where(self._at > self.steps - MEMORY, self._outliers, -math.inf)
            often = recent.topk(OFTEN).values[-1].clamp_max(self._ceiling)
            self._bound = torch.maximum(self._level, often + MARGIN)
            good = good & ~(loss > self._bound)
        self.bad = (~good).float().reshape(1)

    def hand_over(self, optimizer: AdamW, *_: Any) -> None:
        """Before optimizer.step, as its hook: the verdict, added to a GradScaler's if there is one.

        The scaler's own stays as it is, so that a skipped loss does not lower the scale.
        """
        scalers = getattr(optimizer, "found_inf", None)
        optimizer.found_inf = self.bad if scalers is None else self.bad + scalers

    def record(self, loss: Tensor, optimizer: AdamW) -> Tensor:
        """After the update: counts the step. Returns whether it was taken, 0-d bool.

        loss: as judged; NaN of a good step that had no targets, which tells of no level.
        optimizer.last_grad_norm None: its step did not run (GradScaler, where it asks the host).
        """
        optimizer.__dict__.pop("found_inf", None)
        self._remember(loss)
        self.steps += 1
        beyond = self.bad[0] > 0
        norm = optimizer.last_grad_norm
        good = ~beyond & norm.isfinite() if norm is not None else beyond & False
        bad, spike = (~good).long(), (beyond & loss.isfinite()).long()
        newer = torch.cat((self._ring[1:], loss.reshape(1)))
        self._ring = torch.where(good & loss.isfinite(), newer, self._ring)
        self._skipped = self._skipped + bad
        self._in_a_row = (self._in_a_row + bad) * bad
        self._spikes = (self._spikes + spike) * spike
        if self.mode == "skip":
            new_level = self._spikes >= NEW_LEVEL
            self._ring = torch.where(new_level, math.nan, self._ring)
            self._spikes = torch.where(new_level, 0, self._spikes)
            self._new_levels = self._new_levels + new_level
        row = optimizer.last_bad_row
        if not isinstance(row, Tensor):
            row = torch.full((), row, device=self.device)
        last = torch.stack((loss, self._bound, row.to(self.device, torch.float32)))
        self._last = torch.where(good, self._last, last)
        return good

    def _remember(self, loss: Tensor) -> None:
        outlier = (loss > self._level) & loss.isfinite()
        now = torch.full_like(self._at[:1], self.steps)
        goes_on = self._at[-1] == self.steps - 1  # a stretch; so it does behind skipped steps
        begins = outlier & ~goes_on & (self._in_a_row == 0)
        newer = torch.cat((self._outliers[1:], loss.reshape(1)))
        self._outliers = torch.where(begins, newer, self._outliers)
        at = torch.where(begins, torch.cat((self._at[1:], now)), self._at)
        longer = torch.cat((self._at[:-1], now))
        self._at = torch.where(outlier & goes_on, longer, at)

    def forget_level(self) -> None:
        """The data is another: its losses tell the bound anew."""
        self._ring = torch.full_like(self._ring, math.nan)
        self._outliers = torch.full_like(self._outliers, -math.inf)

    def report(self) -> Report:
        """Waits for the device."""
        counts = torch.stack((self._skipped, self._in_a_row, self._new_levels)).tolist()
        loss, bound, row = self._last.tolist()
        return Report(*counts, loss, bound, -1 if math.isnan(row) else int(row))

    def count_skipped(self, skipped: int) -> None:
        """Sets the number of steps that were skipped since the run began."""
        self._skipped = torch.full_like(self._skipped, skipped)

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors on the CPU that share nothing with the guard's."""
        counts = (self._skipped, self._in_a_row, self._spikes, self._new_levels)
        return {
            "ring": self._ring.to("cpu", copy=True),
            "outliers": self._outliers.to("cpu", copy=True),
            "at": self._at.to("cpu", copy=True),
            "last": self._last.to("cpu", copy=True),
            "counts": torch.stack(counts).tolist(),
            "host": [self.steps, self.rolled_back, self.back_to, self.times],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            ring, last = state["ring"], state["last"]
            if ring.shape != (WINDOW,) or last.shape != (3,):
                raise ValueError(f"shapes {tuple(ring.shape)}, {tuple(last.shape)}")
            counts = torch.tensor(state["counts"], dtype=torch.int64, device=self.device)
            self._skipped, self._in_a_row, self._spikes, self._new_levels = counts.unbind()
            self._ring = ring.to(self.device, torch.float32, copy=True)
            self._last = last.to(self.device, torch.float32, copy=True)
            if "at" in state:
                outliers, at = state["outliers"], state["at"]
                if outliers.shape != (OUTLIERS,) or at.shape != (OUTLIERS,):
                    raise ValueError(f"shapes {tuple(outliers.shape)}, {tuple(at.shape)}")
                self._outliers = outliers.to(self.device, torch.float32, copy=True)
                self._at = at.to(self.device, torch.int64, copy=True)
            self.steps, self.rolled_back, self.back_to, self.times = map(int, state["host"])
        except Exception as error:  # values that no run has written raise anything
            raise CheckpointError(
                f"the checkpoint's state of the guard does not fit ({first_line(error)})"
            ) from error


class GuardWatch:
    """Reads a guard's counts at log lines: says what was skipped, and when skipping is no help."""

    def __init__(self, runner: Any):  # a TrainStep
        self.runner = runner
        self.steps = self.skipped = 0  # in this process
        self._going_back = (0, -1, 0)
        self._mark()

    def _mark(self) -> None:
        self.report, self._steps = self.runner.guard.report(), self.runner.guard.steps

    def look(self, log: Any, completed: int) -> None:
        """Logs what happened since the last look. Waits for the device."""
        before, steps = self.report, self._steps
        self._mark()
        report = self.report
        self.steps += self._steps - steps
        self.skipped += report.skipped - before.skipped
        if report.skipped > before.skipped:
            log.event(
                f"[guard] {report.skipped - before.skipped} of the last {self._steps - steps} "
                f"steps skipped, {report.skipped} in all; the last one's {self._reason()}",
                "guard",
                step=completed - 1,
                skipped=report.skipped,
                in_a_row=report.in_a_row,
                loss=report.loss,
                bound=report.bound,
                parameter=self._parameter(),
            )
        if report.new_levels > before.new_levels:
            log.say(f"[guard] {NEW_LEVEL} losses in a row above the bound: it is learnt anew")

    @property
    def is_stuck(self) -> bool:
        """Does the last look say that it is time to go back, or to give up?"""
        limit = ROLL_BACK if self.runner.guard.mode == "rollback" else GIVE_UP
        return self.report.in_a_row >= limit

    def way_back(self, completed: int, directory: Any) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go back to, if the last look says that it is time for that. Raises
        DivergedError if nothing helps."""
        guard, report, found = self.runner.guard, self.report, None
        if guard.mode == "rollback":
            cfg = directory.cfg
            world, mine = self.runner.world, []
            # Of several ranks each reads its part when it restores it.
            read = read_checkpoint if world.size == 1 else read_values

            def look() -> Path | None:
                mine.append(
                    last_good_checkpoint(
                        cfg.ckpt_dir, cfg.ckpt_save_prefix, directory.run_id, completed, read
                    )
                )
                return mine[0] and mine[0][0]

            path = world.decide(look)
            found = mine[0] if mine else path and (path, peek(path))
            if found is None:
                print("[guard] no checkpoint to go back to: bad steps are skipped from now on")
                guard.mode = "skip"
        if found is None:
            if report.in_a_row >= GIVE_UP:
                raise DivergedError(
                    f"the last {report.in_a_row} steps were skipped: {self._reason()}; nothing is "
                    f"learnt any more. Resume an earlier checkpoint with a lower {self._rates()}"
                )
            return None
        step = iteration_of(found[1])
        times = guard.times + 1 if step == guard.back_to else 1
        if times > ROLL_BACKS:
            raise DivergedError(
                f"{found[0]}: the run went back to it {ROLL_BACKS} times and each time "
                f"{ROLL_BACK} steps in a row were bad ({self._reason()}); resume an earlier "
                f"checkpoint, or lower {self._rates()}"
            )
        self._going_back = (guard.rolled_back + 1, step, times)
        return found

    def went_back(self, log: Any, path: Path, completed: int) -> None:
        """The checkpoint that `way_back` returned is restored."""
        guard, skipped = self.runner.guard, self.report.in_a_row
        guard.rolled_back, guard.back_to, guard.times = self._going_back
        guard.count_skipped(self.report.skipped)  # those behind the checkpoint, too
        log.rewind(completed, keep=("guard", "rollback"))
        log.event(
            f"[guard] {skipped} steps in a row skipped: back to {path}, step {completed}, and on "
            f"with the data that follows",
            "rollback",
            step=completed - 1,
            skipped=skipped,
        )
        self._mark()

    def complain(self, missing: Missing, val_loss: float) -> None:
        """At the end: a run without a usable model is not one that went well."""
        if self.steps and self.skipped == self.steps:
            missing.note(f"a trained model (all {self.steps} steps were skipped: {self._reason()})")
        elif self.report.in_a_row >= ROLL_BACK:
            missing.note(
                f"a trained model (the last {self.report.in_a_row} steps were skipped: "
                f"{self._reason()})"
            )
        elif not math.isfinite(val_loss):
            missing.note(f"a trained model (its validation loss is {val_loss})")

    def _rates(self) -> str:
        """The flags of the peak learning rates; Muon's does not follow lr_max."""
        has_muon = any("momentum" in group for group in self.runner.optimizer.param_groups)
        return "--lr-max and --muon-lr" if has_muon else "--lr-max"

    def _reason(self) -> str:
        report, parameter = self.report, self._parameter()
        if parameter is not None:
            return f"gradient of {parameter} is not finite (loss {report.loss:.4f})"
        if report.loss > report.bound:
            return f"loss {report.loss:.4f} is above the bound {report.bound:.4f}"
        return f"loss {report.loss:.4f} or its gradient's norm is not finite"

    def _parameter(self) -> str | None:
        if not self.steps:  # the optimizer knows no rows yet
            return None
        place = self.runner.optimizer.first_nonfinite(self.report.row)
        if place is None:
            return None
        parameter = self.runner.optimizer.param_groups[place.group]["params"][place.index]
        names = (n for n, p in self.runner.model.named_parameters() if p is parameter)
        return next(names, f"parameter {place.index} of group {place.group}")


def last_good_checkpoint(
    directory: str, prefix: str, run_id: str, before: int, read: Reader = read_checkpoint
) -> tuple[Path, dict[str, Any]] | None:
    """(file, content) of the run's newest checkpoint of a step below `before` that was saved when
    the step before it was good; None if there is none."""
    for file in list_checkpoints(directory, prefix):
        if file.run_id != run_id or file.step >= before:
            continue
        with contextlib.suppress(CheckpointError):
            payload = read(file.path)
            if is_good(payload):
                return file.path, payload
    return None


def is_good(payload: Mapping[str, Any]) -> bool:
    """Was the step before a checkpoint taken? The guard rolls back to such a one."""
    guard = payload.get("guard")  # another program's has none
    return not guard or guard["counts"][1] == 0
