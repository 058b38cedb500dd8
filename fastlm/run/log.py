"""What a run shows and keeps: progress on the console, the log file, metrics as JSON lines."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fastlm.run.plot import LivePlotter

METRICS = "metrics.jsonl"


def has_ended(directory: str) -> bool:
    """Did the run that logs there come to its end? The summary is the last that it writes."""
    path = Path(directory) / METRICS
    if not os.path.exists(path):  # unlike Path.exists, also for what is too long for a path
        return False
    lines = path.read_text(encoding="utf-8").splitlines()
    return bool(lines) and lines[-1].startswith('{"event": "summary"')


class RunLog:
    """Writes `{prefix}.log`, `metrics.jsonl` and `{prefix}_loss_curve.png` in one directory.

    On a terminal a progress bar runs; into a file or pipe go plain lines instead.
    """

    def __init__(self, directory: str, prefix: str, *, start_step: int, total_steps: int):
        self.directory, self.prefix = Path(directory), prefix
        self.start_step, self.total_steps = start_step, total_steps
        self.plotter = LivePlotter()
        self.metrics_path = self.directory / METRICS
        if start_step:
            self._recall(start_step)
        path = self.directory / f"{prefix}.log"
        # A file name need not be UTF-8: its bytes are logged as they are.
        self._log = open(path, "a", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=start_step, desc="train", unit="step", smoothing=0.05
            )
        self._line(f"=== Training started at {time.ctime()} ===")

    def _recall(self, start_step: int) -> None:
        """The curve of the steps before a resumed run's first."""
        if not self.metrics_path.exists():
            return
        train: dict[int, tuple[float, float]] = {}
        val: dict[int, float] = {}
        for number, line in enumerate(self.metrics_path.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError as error:  # a killed run leaves half a line
                print(f"[resume] {self.metrics_path}, line {number}: skipped ({error})")
                continue
            if row.get("step", start_step) >= start_step:
                continue
            if row["event"] == "train":
                train[row["step"]] = (row["loss"], row["lr"])
            elif row["event"] == "val":
                val[row["step"]] = row["val_loss"]
        for step in sorted(train):
            self.plotter.log_train(step, *train[step])
        for step in sorted(val):
            self.plotter.log_eval(step, val[step])

    def say(self, line: str) -> None:
        """A line on the console, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(line, flush=True)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def train(
        self,
        step: int,
        *,
        loss: float,  # of this step
        avg_loss: float,  # of the steps since the last line
        lr: float,
        grad_norm: float,
        steps_per_second: float,
        tokens_per_second: float,
    ) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._line(
            f"[{stamp}] step {step:06d} loss {loss:.4f} lr {lr:.2e} grad_norm {grad_norm:.2f}"
        )
        self.metrics(
            "train",
            step=step,
            loss=loss,
            avg_loss=avg_loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens_per_second=round(tokens_per_second, 1),
        )
        self.plotter.log_train(step, loss, lr)
        self.plotter.draw()
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"loss={avg_loss:.4f}, lr={lr:.2e}, {tokens_per_second:,.0f} tok/s", refresh=False
            )
            return
        left = (self.total_steps - step - 1) / steps_per_second if steps_per_second else 0.0
        eta = f"{int(left) // 60}:{int(left) % 60:02d}"
        print(
            f"[train] step {step}/{self.total_steps} | avg_loss={avg_loss:.4f} | "
            f"speed={steps_per_second:.2f} step/s | lr={lr:.2e} | {tokens_per_second:,.0f} tok/s | "
            f"ETA {eta}",
            flush=True,
        )

    def val(self, step: int, val_loss: float) -> None:
        line = f"[VAL] step {step:06d} val_loss {val_loss:.4f}"
        self._line(line)
        self.metrics("val", step=step, val_loss=val_loss)
        self.plotter.log_eval(step, val_loss)
        self.say(line)

    def checkpoint(self, path: Path) -> None:
        line = f"[CKPT] Saved to {path}"
        self._line(line)
        self.say(line)

    def metrics(self, event: str, **values: Any) -> None:
        """One line of metrics.jsonl: {"event", "time" (seconds since the epoch), values}."""
        row = {"event": event, "time": round(time.time(), 3), **values}
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        """Ends the log and draws the loss curve."""
        if self._bar is not None:
            self._bar.close()
        self._line(f"=== Training finished at {time.ctime()} ===")
        self._log.close()
        self.plotter.save(self.directory / f"{self.prefix}_loss_curve.png")

    def _line(self, line: str) -> None:
        self._log.write(line + "\n")
        self._log.flush()
