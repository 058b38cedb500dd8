"""The training loop: steps, log lines, evaluations, checkpoints, and the end of a run."""

import contextlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fastlm import __version__
from fastlm.checkpoint import iteration_of, restore_model, save_checkpoint
from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.loader import spread_batches
from fastlm.errors import DivergedError, OutputError
from fastlm.evaluate import bits_per_byte, evaluating, loss_over_all, mean_loss
from fastlm.hardware import PeakMemory
from fastlm.model import training_flops_per_token
from fastlm.ops.cross_entropy import check_labels
from fastlm.run.directory import RunDirectory
from fastlm.run.guard import GuardWatch
from fastlm.run.log import RunLog
from fastlm.run.output import Missing
from fastlm.run.signals import Stopped, StopSignals
from fastlm.run.summary import Clock, RunFigures, measured_ceiling, print_samples, print_summary
from fastlm.schedule import cosine_lr_schedule, wsd_lr_schedule
from fastlm.step import TrainStep, graphs_compiled


def learning_rate(step: int, cfg: TrainingConfig) -> float:
    """The rate of a step under cfg.schedule."""
    if cfg.schedule == "wsd":
        return wsd_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.total_steps)
    return cosine_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.cosine_iters)


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
        clock: Clock,
        stop: StopSignals,
        missing: Missing,  # what the run could not show or write
    ):
        self.data, self.cfg, self.runner, self.directory = data, cfg, runner, directory
        self.start_step, self.completed = start_step, start_step
        self.samples_seen = self.start_samples = samples_seen
        self.clock, self.stop, self.missing = clock, stop, missing
        self.memory = PeakMemory(runner.device)
        self.log = RunLog(
            cfg.log_dir, cfg.log_save_prefix, missing=missing,
            resuming=bool(cfg.ckpt_path_to_resume),
            start_step=start_step, total_steps=cfg.total_steps,
        )  # fmt: skip
        self.log.metrics("start", step=start_step, config=asdict(cfg), data=data.fingerprint)
        self.watch = GuardWatch(runner)
        self._graphs = graphs_compiled() if cfg.compile else 0
        # Sums over the good steps since the last log line.
        self._window_loss, self._window_good = torch.zeros(2, device=runner.device).unbind()
        self._window_steps, self._window_begin = 0, 0.0

    def train(self) -> None:
        """Runs all steps, and what follows the last. After a signal: saves, then ends as the signal
        would have."""
        self.stop.promise = "a checkpoint follows"
        try:
            finished = self._steps() and self._finish()
            if not finished:
                self.log.close()
        finally:
            self.log.flush()
        if not finished:
            print(
                f"[train] stopped after {self.completed} of {self.cfg.total_steps} steps "
                f"({self.stop.name or f'--max-minutes {self.cfg.max_minutes:g}'}); continue with: "
                f"python -m fastlm.train{' --compile' * self.cfg.compile} "
                f"--resume {self.cfg.target_dir}",
                flush=True,
            )
            self.stop.leave()

    def _steps(self) -> bool:
        """All steps that are left; False if it was stopped before the last. After an error: saves
        what there is as …_emergency.pt, then raises it."""
        try:
            self._run_steps()
        except (DivergedError, OutputError):
            raise  # all is saved, or nothing can be
        except Exception:
            self._save_emergency()
            raise
        return self.completed == self.cfg.total_steps

    def _run_steps(self) -> None:
        cfg, step = self.cfg, self.completed - 1
        if self._is_evaluated(step) and not self.log.has_evaluated(step):
            self._validate(step)  # the run was stopped in the evaluation
        self.clock.start()
        while self.completed < cfg.total_steps:
            step, lr = self.completed, learning_rate(self.completed, cfg)
            loss = self.runner.run(self.samples_seen, lr, lambda: self.stop.requested)
            if loss is not None:  # None: stopped before the step's last micro-batch
                self._count(loss)
                if step % cfg.log_every == 0:
                    self._log(step, loss, lr)
                    if self._rolled_back():
                        continue

            last = self.completed == cfg.total_steps
            stopping = not last and (self.stop.requested or self._time_is_up())
            # The checkpoint first: what may fail in an evaluation must not cost the steps.
            due = cfg.ckpt_every > 0 and self.completed % cfg.ckpt_every == 0
            if last or stopping or due:
                self._save("final" if last else str(self.completed), must=last or stopping)
            if stopping:
                break
            if self._is_evaluated(step):
                self._validate(step)
        self.clock.pause()

    def _count(self, loss: Tensor) -> None:
        """A step is done; the samples of a skipped one are passed, too."""
        self.samples_seen += self.runner.samples
        self.completed += 1
        self._window_loss += torch.where(self.runner.good, loss, 0.0)
        self._window_good += self.runner.good
        self._window_steps += 1
        self.log.advance()

    def _is_evaluated(self, step: int) -> bool:
        every = self.cfg.eval_every
        return step == self.cfg.total_steps - 1 or (every > 0 and step > 0 and step % every == 0)

    def _time_is_up(self) -> bool:
        minutes = self.cfg.max_minutes
        return minutes is not None and self.clock.seconds >= minutes * 60

    def _log(self, step: int, loss: Tensor, lr: float) -> None:
        total, good = torch.stack((self._window_loss, self._window_good)).tolist()  # waits
        check_labels()
        seconds = self.clock.seconds - self._window_begin
        norm = self.runner.optimizer.last_grad_norm
        self.log.train(
            step,
            loss=float(loss),
            avg_loss=total / good if good else float("nan"),
            lr=lr,
            grad_norm=float("nan") if norm is None else float(norm),
            steps_per_second=self._window_steps / seconds,
            tokens_per_second=self._window_steps * self.runner.tokens / seconds,
        )
        self._begin_window()
        self.memory.sample()

    def _begin_window(self) -> None:
        self._window_loss.zero_()
        self._window_good.zero_()
        self._window_steps, self._window_begin = 0, self.clock.seconds

    def _rolled_back(self) -> bool:
        """At a log line: says what the guard has skipped. Goes back to the last good checkpoint, or
        gives up, if it has skipped one step after the other."""
        self.watch.look(self.log, self.completed)
        try:
            found = self.watch.way_back(self.completed, self.directory)
        except DivergedError:
            self._save(str(self.completed), must=True)
            raise
        if found is None:
            return False
        path, payload = found
        restore_model(self.runner.model, payload)
        self.runner.restore(payload)
        self.completed = iteration_of(payload)
        self.watch.went_back(self.log, path, self.completed)
        self._begin_window()
        return True

    def _save(self, name: str, *, must: bool) -> None:
        """A checkpoint. Where it cannot be written the run goes on, unless it `must` be."""
        self.clock.pause()
        runner, path = self.runner, self.directory.checkpoint_path(name)
        try:
            save_checkpoint(
                runner.model,
                runner.optimizer,
                self.completed,
                path,
                samples_seen=self.samples_seen,
                scaler=runner.scaler.state_dict(),
                random_state=runner.random_state(),
                **self._progress(),
                **self._identity(),
            )
            self.log.checkpoint(path)
        except OSError as error:
            if must:
                raise
            self.log.say(f"[CKPT] FAILED: {path}: {error.strerror or error}; training goes on")
        self.clock.start()

    def _progress(self) -> dict[str, Any]:
        """What the run's end needs to know of all its pieces."""
        return {"guard": self.runner.guard.state_dict(), "clock": self.clock.state_dict()}

    def _save_emergency(self) -> None:
        """{prefix}_emergency.pt: the state before the step that failed. A bare --resume never takes
        it. Where that fails, too, it says so: the error that led here is the one to raise."""
        if self.completed == self.start_step:
            return
        try:
            self.runner.drop()
            self._save("emergency", must=True)
        except Exception as error:
            self.log.say(f"[CKPT] FAILED: the emergency checkpoint: {error}")

    def _identity(self) -> dict[str, Any]:
        """Identifies the checkpoint's run, and lets the checkpoint be used without the data."""
        return {
            "config": asdict(self.cfg),
            "data_fingerprint": self.data.fingerprint,
            "tokenizer": self.data.tokenizer_json,
            "fastlm_version": __version__,
        }

    def _validate(self, step: int) -> None:
        """The mean loss on the fixed batches. Left between two of them at a signal; the resumed run
        does it then."""
        self.clock.pause()
        cfg, runner = self.cfg, self.runner
        batches = spread_batches(
            self.data.val, cfg.batch_size, cfg.context_len, cfg.eval_batches, runner.device
        )
        with contextlib.suppress(Stopped), evaluating(runner.model):
            self.log.val(step, mean_loss(self.stop.interruptible(runner.loss.summed), batches))
        self.clock.start()

    def _finish(self) -> bool:
        """Weights alone, loss over all validation data, samples, summary. False if it was stopped:
        the resumed run does it then."""
        cfg, runner, data, clock = self.cfg, self.runner, self.data, self.clock
        model_path = self.directory.checkpoint_path("model")
        save_checkpoint(runner.model, None, self.completed, model_path, **self._identity())
        self.log.checkpoint(model_path)
        self.stop.promise = "the run's end can be had by --resume"
        try:
            with evaluating(runner.model):
                loss = self.stop.interruptible(runner.loss.summed)
                val_loss, targets = loss_over_all(
                    loss, data.val, cfg.batch_size, cfg.context_len, runner.device
                )
        except Stopped:
            return False
        self.watch.look(self.log, self.completed)
        self.log.close()
        self.memory.sample()
        in_bytes = bits_per_byte(val_loss, targets, data.val_bytes) if data.val_bytes else None
        whole = clock.knows_all
        figures = RunFigures(
            steps=self.completed - (0 if whole else self.start_step),
            tokens=(self.samples_seen - (0 if whole else self.start_samples)) * cfg.context_len,
            step_seconds=clock.all_seconds,
            run_seconds=clock.run_seconds,
            start_step=self.start_step,
            whole=whole,
            compile_seconds=runner.compile_seconds,
            recompiles=graphs_compiled() - self._graphs if cfg.compile else 0,
            flops_per_token=training_flops_per_token(runner.model, cfg.context_len),
            peak_memory=self.memory,
            skipped=self.watch.report.skipped,
            rolled_back=runner.guard.rolled_back,
            val_loss=val_loss,
            val_targets=targets,
            bits_per_byte=in_bytes,
        )
        self.log.attempt(
            "samples", lambda: print_samples(runner.model, data.tokenizer_json, cfg.seed)
        )
        ceiling = self.log.attempt("matmul ceiling", lambda: measured_ceiling(runner))
        self.log.metrics("summary", **print_summary(figures, runner, ceiling))
        self.watch.complain(self.missing, val_loss)
        print(f"[summary] files       {cfg.ckpt_dir}, {cfg.log_dir}")
        print(
            f'[summary] try it      python -m fastlm.generate --ckpt {model_path} --prompt "..."',
            flush=True,
        )
        return True
