"""The training loop: steps, log lines, evaluations, checkpoints, and the end of a run."""

import contextlib
import hashlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import __version__
from fastlm.checkpoint import (
    checkpoint_files,
    checkpoint_payload,
    iteration_of,
    restore_model,
)
from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.loader import spread_batches
from fastlm.data.sampler import SAMPLER_VERSION
from fastlm.errors import DivergedError
from fastlm.evaluate import LossFunction, evaluating, mean_loss
from fastlm.measure import PeakMemory
from fastlm.model import training_flops_per_token
from fastlm.model_interface import model_class
from fastlm.ops.cross_entropy import check_labels
from fastlm.parallel.world import World
from fastlm.run.commands import resume_command
from fastlm.run.directory import RunDirectory
from fastlm.run.environment import environment
from fastlm.run.finish import finish, sample
from fastlm.run.guard import GuardWatch
from fastlm.run.log import NoLog, RunLog
from fastlm.run.output import Missing
from fastlm.run.profiler import StepProfiler, parse_span
from fastlm.run.saver import Saver, writer_for
from fastlm.run.signals import Stopped, StopSignals
from fastlm.run.summary import Clock, measured_ceiling
from fastlm.schedule import learning_rate
from fastlm.step import TrainStep, graphs_compiled


class Run:
    """One run, warmed up and restored: `train` takes it to its end, or to where it is stopped.

    Steps count from 0. The log has the steps that are multiples of log_every; evaluations follow
    those of eval_every (not 0) and the last; checkpoint N is written after N steps, N a multiple of
    ckpt_every, and the final one always.
    """

    def __init__(
        self,
        data: Data,
        cfg: TrainingConfig,
        runner: TrainStep,
        directory: RunDirectory,
        start_step: int,
        samples_seen: int,  # before start_step; the data goes on from there
        tokens_seen: int,  # in these samples
        clock: Clock,
        stop: StopSignals,
        missing: Missing,  # what the run could not show or write
    ):
        self.data, self.cfg, self.runner, self.directory = data, cfg, runner, directory
        self.world: World = runner.world
        self.start_step, self.completed = start_step, start_step
        self.samples_seen = samples_seen
        self.tokens_seen = self.start_tokens = tokens_seen
        self.clock, self.stop = clock, stop
        # What is missing, all ranks know, and rank 0 tells it.
        self.missing = missing if self.world.is_main else Missing()
        self.memory = PeakMemory(runner.device)
        # Every rank knows the same and rank 0 tells it.
        log = RunLog if self.world.is_main else NoLog
        self.log = log(
            cfg.log_dir, cfg.log_save_prefix, missing=missing,
            resuming=bool(cfg.ckpt_path_to_resume),
            start_step=start_step, total_steps=cfg.total_steps,
        )  # fmt: skip
        self.log.track(cfg, directory.run_id)
        self.flops_per_token = training_flops_per_token(runner.model, cfg.context_len)
        # It takes two seconds, which only who watches the MFU waits for.
        self.ceiling: float | None = (
            self.log.attempt("matmul ceiling", lambda: measured_ceiling(runner))
            if cfg.track
            else None
        )
        tokenizer = data.tokenizer_json
        digest = None if tokenizer is None else hashlib.sha256(tokenizer.encode()).hexdigest()
        self.log.metrics(
            "start", step=start_step, config=asdict(cfg), data=data.fingerprint, tokenizer=digest
        )
        resumed = None if cfg.ckpt_path_to_resume is None else Path(cfg.ckpt_path_to_resume)
        self.saver = Saver(
            directory.checkpoint_path,
            keep_last=cfg.keep_last,
            minutes=cfg.ckpt_minutes,
            # Where rank 0 writes for all, the others only count along.
            wait_for_each=cfg.sync_save or not (self.world.is_main or runner.is_sharded),
            deletes=self.world.is_main,
            write=writer_for(self.world, sharded=runner.is_sharded),
            found=checkpoint_files(cfg.ckpt_dir, cfg.ckpt_save_prefix) if resumed else (),
            resumed=resumed,
        )
        if (val_loss := self._evaluated(start_step - 1)) is not None:
            self.saver.evaluated(val_loss)
        self.watch = GuardWatch(runner)
        self.profiler: StepProfiler | None = None
        if cfg.profile is not None:
            self.profiler = StepProfiler(
                parse_span(cfg.profile), cfg.log_dir, runner.device, clock,
                rank=self.world.rank, say=self.log.say, missing=missing.note,
            )  # fmt: skip
        self.graphs = graphs_compiled() if cfg.compile else 0
        # Sums over the good steps with targets since the last log line.
        self._window_loss = torch.zeros((), device=runner.device)
        self._window_good = torch.zeros((), device=runner.device)
        self._window_steps, self._window_begin = 0, 0.0

    def train(self) -> None:
        """Runs all steps, and what follows the last. After a signal: saves, then ends as the signal
        would have."""
        self.stop.promise = "a checkpoint follows"
        try:
            finished = self._steps() and finish(self)
            if not finished:
                self.log.close()
        finally:
            self.saver.wait()
            self.report_saves(goes_on=False)
            for what in self.saver.missing():
                self.missing.note(what)
            self.log.flush()
        if not finished:
            if self.world.is_main:  # for others the directory may change while they read it
                print(
                    f"[train] stopped after {self.completed} of {self.cfg.total_steps} steps "
                    f"({self.stop.name or f'--max-minutes {self.cfg.max_minutes:g}'}); "
                    f"{self._how_to_continue()}",
                    flush=True,
                )
            self.world.barrier()  # torchrun ends the others when one has gone
            self.stop.leave(failed=bool(self.missing))

    def _steps(self) -> bool:
        """All steps that are left; False if it was stopped before the last. After an error: saves
        what there is as …_emergency.pt, then raises it."""
        try:
            self._run_steps()
        except DivergedError:
            raise  # all is saved
        except Exception:
            if self.world.size == 1:  # several cannot rely on each other any more
                self._save_emergency()
            raise
        finally:
            if self.profiler is not None:
                self.profiler.close()
        return self.completed == self.cfg.total_steps

    def _run_steps(self) -> None:
        cfg, step = self.cfg, self.completed - 1
        if self._is_evaluated(step) and self._evaluated(step) is None:
            self._validate(step)  # the run was stopped in the evaluation
        # One process leaves a step at a micro-batch; several agree behind the step.
        alone = self.world.size == 1
        leaves = (lambda: self.stop.requested) if alone else (lambda: False)
        self.runner.step_loader.waited = 0.0  # what the warm-up has waited does not count
        self.clock.start()
        while self.completed < cfg.total_steps:
            step, lr = self.completed, learning_rate(self.completed, cfg)
            if self.profiler is not None:
                self.profiler.step(step)
            vote = None if alone else self.world.vote(*self._wishes())
            loss = self.runner.run(self.samples_seen, lr, leaves)
            # Before anything waits for the device: a rank that is gone is found here.
            signal, time_is_up, save_is_due = self._wishes() if vote is None else vote.wait()
            if loss is not None:  # None: stopped before the step's last micro-batch
                self._count(loss)
                self.report_saves()
                if step % cfg.log_every == 0:
                    self._log(step, loss, lr)
                    if self._rolled_back():
                        continue

            last = self.completed == cfg.total_steps
            stopping = not last and bool(signal or time_is_up)
            # The checkpoint first: what may fail in an evaluation must not cost the steps.
            due = cfg.ckpt_every > 0 and self.completed % cfg.ckpt_every == 0
            if last or stopping or due or save_is_due:
                self._save("final" if last else str(self.completed), must=last or stopping)
            if stopping:
                self.stop.received = self.stop.received or signal or None
                break
            if self._is_evaluated(step):
                self._validate(step)
            every = cfg.sample_every
            if every > 0 and step > 0 and step % every == 0 and not last:
                self.clock.pause()
                sample(self, step)
                self.clock.start()
        self.clock.pause()

    def _wishes(self) -> tuple[int, int, int]:
        """What may end the run or is due, for a vote: one process's is everybody's."""
        main = self.world.is_main
        return (
            self.stop.received or 0,
            int(main and self._time_is_up()),
            int(main and self.saver.due()),
        )

    def _evaluated(self, step: int) -> float | None:
        """The validation loss behind `step` that an earlier piece of the run has logged."""
        return self.world.decide(lambda: self.log.evaluation(step))

    def _count(self, loss: Tensor) -> None:
        """A step is done; the samples of a skipped one are passed, too."""
        self.samples_seen += self.runner.samples
        self.tokens_seen += self.runner.tokens
        self.completed += 1
        counts = self.runner.good & loss.isfinite()  # a good step's is NaN if it had no targets
        self._window_loss += torch.where(counts, loss, 0.0)
        self._window_good += counts
        self._window_steps += 1
        self.log.advance()
        if self.completed == self.start_step + 1:
            self.saver.reserve(self._payload())

    def _is_evaluated(self, step: int) -> bool:
        every = self.cfg.eval_every
        return step == self.cfg.total_steps - 1 or (every > 0 and step > 0 and step % every == 0)

    def _how_to_continue(self) -> str:
        path = self.saver.newest
        if path is None:
            return "there is no checkpoint to continue with"
        if self._is_the_commands:
            return f"continue with: {resume_command(self.cfg, self.world)}"
        return f"continue with: {_as_setting(path)}"

    @property
    def _is_the_commands(self) -> bool:
        """The command knows nothing of train_loop's arrays and models."""
        return bool(self.data.train.paths) and model_class(self.runner.model) is None

    def _time_is_up(self) -> bool:
        minutes = self.cfg.max_minutes
        return minutes is not None and self.clock.seconds >= minutes * 60

    def _log(self, step: int, loss: Tensor, lr: float) -> None:
        total, good = torch.stack((self._window_loss, self._window_good)).tolist()  # waits
        check_labels()
        seconds = self.clock.seconds - self._window_begin
        norm = self.runner.optimizer.last_grad_norm
        tokens_per_second = self._window_steps * self.runner.tokens / seconds
        self.memory.sample()
        known = {}
        if self.ceiling is not None:
            flops = tokens_per_second * self.flops_per_token
            known["mfu"] = round(flops / self.ceiling / self.world.size, 4)
        self.log.train(
            step,
            loss=float(loss),
            avg_loss=total / good if good else float("nan"),
            lr=lr,
            grad_norm=float("nan") if norm is None else float(norm),
            steps_per_second=self._window_steps / seconds,
            tokens_per_second=tokens_per_second,
            tokens=self.tokens_seen,
            seconds=round(self.clock.all_seconds, 3),  # in steps
            memory_bytes=self.memory.bytes,
            **known,
        )
        self._begin_window()

    def _begin_window(self) -> None:
        self._window_loss.zero_()
        self._window_good.zero_()
        self._window_steps, self._window_begin = 0, self.clock.seconds

    def _rolled_back(self) -> bool:
        """At a log line: says what the guard has skipped. Goes back to the last good checkpoint, or
        gives up, if it has skipped one step after the other."""
        self.watch.look(self.log, self.completed)
        if not self.watch.is_stuck:
            return False
        self.saver.wait()
        self.report_saves()
        try:
            found = self.watch.way_back(self.completed, self.directory)  # the same on every rank
        except DivergedError:
            self._save(str(self.completed), must=True)
            raise
        if found is None:
            return False
        path, payload = found
        if self.world.size == 1:
            restore_model(self.runner.model, payload)
        self.runner.restore(payload, path)
        self.completed = iteration_of(payload)
        # The run goes on with the samples that follow: what was saved behind it is another branch.
        self.directory.retire_after(self.completed)
        self.saver.forget_after(self.completed)
        self.watch.went_back(self.log, path, self.completed)
        self._begin_window()
        return True

    def _save(self, name: str, *, must: bool) -> None:
        """Begins a checkpoint; `must`: waits for it. The run goes on where it cannot be written."""
        if must and name.isdecimal() and self.saver.holds(int(name)):
            return  # a signal came while it was written
        self.clock.pause()
        self.saver.save(name, self._payload(), wait=must)
        self.report_saves(goes_on=not must or name == "final")
        self.clock.start()

    def _payload(self) -> dict[str, Any]:
        """Everything that the run needs to go on from here."""
        runner = self.runner
        return checkpoint_payload(
            runner.model,
            runner.optimizer,
            self.completed,
            samples_seen=self.samples_seen,
            tokens_seen=self.tokens_seen,
            scaler=runner.scaler.state_dict(),
            guard=runner.guard.state_dict(),
            clock=self.clock.state_dict(),
            **self.identity(),
        )

    def report_saves(self, *, goes_on: bool = True) -> None:
        """Says what has become of saves since the last call."""
        for path, error in self.saver.reports():
            self._report(path, error, goes_on)

    def _report(self, path: Path, error: str | None, goes_on: bool) -> None:
        if error is None:
            self.log.checkpoint(path)
        else:
            self.log.say(f"[CKPT] FAILED: {error}{'; the run goes on' * goes_on}")

    def _save_emergency(self) -> None:
        """{prefix}_emergency.pt: the state before the step that failed. A bare --resume never takes
        it. If that fails, too, it says so: the error that led here is the one to raise."""
        if self.completed == self.start_step:
            return
        try:
            self.runner.drop()
            path, error = self.saver.emergency(self._payload())
            self._report(path, error, goes_on=False)
            if error is None:
                how = f"--resume {path}" if self._is_the_commands else _as_setting(path)
                self.log.say(f"[train] an error follows; {how} goes on from before it")
        except Exception as error:
            self.log.say(f"[CKPT] FAILED: the emergency checkpoint: {error}")

    def identity(self) -> dict[str, Any]:
        """Identifies the checkpoint's run, and lets the checkpoint be used without the data."""
        runner = self.runner
        return {
            "run_id": self.directory.run_id,
            "saved_at": time.time(),
            "environment": environment(
                runner.device,
                runner.dtype,
                compiled=self.cfg.compile,
                processes=self.world.size,
            ),
            "config": asdict(self.cfg),
            "data_fingerprint": self.data.fingerprint,
            "sampler_version": SAMPLER_VERSION,
            "tokenizer": self.data.tokenizer_json,
            "end_of_text": self.data.end_of_text,
            "conversations": self.data.train.ignored is not None,
            "fastlm_version": __version__,
            **({"model_class": name} if (name := model_class(runner.model)) else {}),
        }

    @property
    def summed(self) -> LossFunction:
        """The loss for evaluations, left at a signal where that leaves nobody waiting."""
        summed = self.runner.loss.summed
        return self.stop.interruptible(summed) if self.world.size == 1 else summed

    def _validate(self, step: int) -> None:
        """The mean loss on the fixed batches of each validation set, and the mean of the sets. Left
        between two batches at a signal; the resumed run does it then."""
        self.clock.pause()
        cfg, runner = self.cfg, self.runner
        losses = {}
        with contextlib.suppress(Stopped), evaluating(runner.model):
            for name, dataset in (self.data.val_sets or {"": self.data.val}).items():
                batches = spread_batches(
                    dataset, cfg.batch_size, cfg.context_len, cfg.eval_batches, runner.device
                )
                losses[name] = mean_loss(self.summed, batches, self.world)
            val_loss = sum(losses.values()) / len(losses)
            self.saver.evaluated(val_loss)
            self.log.val(step, val_loss, losses if self.data.val_sets else {})
        self.clock.start()


def _as_setting(path: Path) -> str:
    return f"ckpt_path_to_resume={str(path)!r}"
