"""The training loop: steps, log lines, evaluations, checkpoints, and the end of a run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm import __version__
from fastlm.checkpoint import checkpoint_files, checkpoint_payload
from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.loader import spread_batches
from fastlm.data.sampler import SAMPLER_VERSION
from fastlm.evaluate import bits_per_byte, evaluating, loss_over_all, mean_loss
from fastlm.generate import sample_texts
from fastlm.model import training_flops_per_token
from fastlm.ops.cross_entropy import check_labels
from fastlm.run.commands import generate_command, resume_command
from fastlm.run.directory import RunDirectory
from fastlm.run.environment import environment, random_state
from fastlm.run.log import RunLog
from fastlm.run.saver import Saver
from fastlm.run.signals import StopSignals
from fastlm.run.summary import Clock, RunFigures, print_summary
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
        begin: float,  # time.perf_counter() when the run began
    ):
        self.data, self.cfg, self.runner, self.directory = data, cfg, runner, directory
        self.start_step, self.completed, self.begin = start_step, start_step, begin
        self.samples_seen = samples_seen
        self.clock = Clock(runner.device)
        self.log = RunLog(
            cfg.log_dir, cfg.log_save_prefix, start_step=start_step, total_steps=cfg.total_steps
        )
        self.log.metrics("start", step=start_step, config=asdict(cfg), data=data.fingerprint)
        resumed = None if cfg.ckpt_path_to_resume is None else Path(cfg.ckpt_path_to_resume)
        self.saver = Saver(
            directory.checkpoint_path,
            keep_last=cfg.keep_last,
            minutes=cfg.ckpt_minutes,
            wait_for_each=cfg.sync_save,
            found=checkpoint_files(cfg.ckpt_dir, cfg.ckpt_save_prefix) if resumed else (),
            resumed=resumed,
        )
        self._graphs = graphs_compiled() if cfg.compile else 0
        # Sums over the steps since the last log line.
        self._window_loss = torch.zeros((), device=runner.device)
        self._window_steps, self._window_begin = 0, 0.0

    def train(self) -> None:
        """Runs all steps. After Ctrl-C or SIGTERM: saves, then ends as the signal would have."""
        cfg = self.cfg
        with StopSignals() as stop:
            self.clock.start()
            for step in range(self.start_step, cfg.total_steps):
                lr = learning_rate(step, cfg)
                loss = self.runner.run(self.samples_seen, lr)
                self.samples_seen += self.runner.samples
                self.completed = step + 1
                self._window_loss += loss
                self._window_steps += 1
                self.log.advance()
                self._report_saves()
                if step % cfg.log_every == 0:
                    self._log(step, loss, lr)

                last = self.completed == cfg.total_steps
                stopping = not last and (stop.requested or self._time_is_up())
                # The checkpoint first: what may fail in an evaluation must not cost the steps.
                due = _is_multiple(self.completed, cfg.ckpt_every) or self.saver.due()
                if last or stopping or due:
                    self._save("final" if last else str(self.completed), must=last or stopping)
                if last or (step > 0 and _is_multiple(step, cfg.eval_every) and not stopping):
                    self._validate(step)
                if stopping:
                    break
            self.clock.pause()
        if self.completed == cfg.total_steps:
            self._finish()
            self.saver.check_complete()
            return
        self.log.close()
        print(
            f"[train] stopped after {self.completed} of {cfg.total_steps} steps "
            f"({stop.name or f'--max-minutes {cfg.max_minutes:g}'}); continue with: "
            f"{self._how_to_continue()}"
        )
        self.saver.check_complete()
        stop.leave()

    def _how_to_continue(self) -> str:
        if self.data.train.paths:
            return resume_command(self.cfg)
        # Of train_loop's arrays the command knows nothing.
        path = self.directory.checkpoint_path(str(self.completed))
        return f"ckpt_path_to_resume={str(path)!r}"

    def _time_is_up(self) -> bool:
        minutes = self.cfg.max_minutes
        return minutes is not None and self.clock.seconds >= minutes * 60

    def _log(self, step: int, loss: Tensor, lr: float) -> None:
        average = float(self._window_loss) / self._window_steps  # waits for the device
        check_labels()
        seconds = self.clock.seconds - self._window_begin
        norm = self.runner.optimizer.last_grad_norm
        self.log.train(
            step,
            loss=float(loss),
            avg_loss=average,
            lr=lr,
            grad_norm=float("nan") if norm is None else float(norm),
            steps_per_second=self._window_steps / seconds,
            tokens_per_second=self._window_steps * self.runner.tokens / seconds,
        )
        self._window_loss.zero_()
        self._window_steps, self._window_begin = 0, self.clock.seconds

    def _save(self, name: str, *, must: bool) -> None:
        """Begins a checkpoint; `must`: waits for it. The run goes on where it cannot be written."""
        self.clock.pause()
        self.saver.save(name, self._payload(), wait=must)
        self._report_saves()
        self.clock.start()

    def _payload(self) -> dict[str, Any]:
        """Everything that the run needs to go on from here."""
        runner = self.runner
        return checkpoint_payload(
            runner.model,
            runner.optimizer,
            self.completed,
            samples_seen=self.samples_seen,
            scaler=runner.scaler.state_dict(),
            random_state=random_state(runner.device),
            **self._identity(),
        )

    def _report_saves(self) -> None:
        """Says what has become of saves since the last call."""
        for path, error in self.saver.reports():
            if error is None:
                self.log.checkpoint(path)
            else:
                self.log.say(f"[CKPT] FAILED: {error}; the run goes on")

    def _identity(self) -> dict[str, Any]:
        """Identifies the checkpoint's run, and lets the checkpoint be used without the data."""
        runner = self.runner
        return {
            "run_id": self.directory.run_id,
            "saved_at": time.time(),
            "environment": environment(runner.device, runner.dtype, compiled=self.cfg.compile),
            "config": asdict(self.cfg),
            "data_fingerprint": self.data.fingerprint,
            "sampler_version": SAMPLER_VERSION,
            "tokenizer": self.data.tokenizer_json,
            "fastlm_version": __version__,
        }

    def _validate(self, step: int) -> None:
        """The mean loss on the fixed batches."""
        self.clock.pause()
        cfg, runner = self.cfg, self.runner
        batches = spread_batches(
            self.data.val, cfg.batch_size, cfg.context_len, cfg.eval_batches, runner.device
        )
        with evaluating(runner.model):
            val_loss = mean_loss(runner.loss.summed, batches)
        self.saver.evaluated(val_loss)
        self.log.val(step, val_loss)
        self.clock.start()

    def _finish(self) -> None:
        """Weights alone, loss over all validation data, samples, summary."""
        cfg, runner, data = self.cfg, self.runner, self.data
        model_path: Path = self.directory.checkpoint_path("model")
        weights = checkpoint_payload(runner.model, None, self.completed, **self._identity())
        self.saver.save("model", weights, wait=True)
        self._report_saves()
        self.log.close()
        with evaluating(runner.model):
            final = loss_over_all(
                runner.loss.summed,
                data.val,
                cfg.batch_size,
                cfg.context_len,
                runner.device,
                max_targets=cfg.final_eval_tokens,
            )
        steps = self.completed - self.start_step
        known = data.val_bytes
        in_bytes = bits_per_byte(final.loss, final.of_targets, known) if known else None
        figures = RunFigures(
            steps=steps,
            tokens=steps * runner.tokens,
            step_seconds=self.clock.seconds,
            run_seconds=time.perf_counter() - self.begin,
            compile_seconds=runner.compile_seconds,
            recompiles=graphs_compiled() - self._graphs if cfg.compile else 0,
            flops_per_token=training_flops_per_token(runner.model, cfg.context_len),
            final=final,
            bits_per_byte=in_bytes,
        )
        self._print_samples()
        self.log.metrics("summary", **print_summary(figures, runner.device, runner.dtype))
        print(f"[summary] files       {cfg.ckpt_dir}, {cfg.log_dir}")
        command = generate_command(model_path, cfg, tokenizer=data.tokenizer_json is not None)
        print(f"[summary] try it      {command}", flush=True)

    def _print_samples(self) -> None:
        """Five samples, the first five: none is chosen."""
        tokenizer = self.data.tokenizer_json
        if tokenizer is None:
            print("[sample] none: the data has no tokenizer to turn ids into text")
            return
        texts = sample_texts(self.runner.model, tokenizer, num_samples=5, seed=self.cfg.seed)
        for index, text in enumerate(texts):
            print(f"[sample {index + 1} of {len(texts)}]\n{text.strip()}\n")


def _is_multiple(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
