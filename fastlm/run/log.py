"""What a run shows and keeps: progress on the console, the log file, metrics as JSON lines."""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastlm.config import TrainingConfig
from fastlm.run.output import LineFile, Missing, remove_half_written, replace_content
from fastlm.run.plot import LivePlotter
from fastlm.run.track import Trackers, beside_log


def metrics_path(directory: str | Path, prefix: str = "train") -> Path:
    """metrics.jsonl; {prefix}_metrics.jsonl under another prefix than the default."""
    return beside_log(directory, prefix, "metrics.jsonl")


def has_ended(directory: str | Path, prefix: str = "train") -> bool:
    """Did the run that logs there come to its end? The summary is the last that it writes."""
    rows = _parsed(_lines(metrics_path(directory, prefix)))
    return bool(rows) and rows[-1] is not None and rows[-1].get("event") == "summary"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of the last run in a file of metrics, each with an event and a step, which may be
    None; [] without one. Damaged lines are left out."""
    rows = [row for row in _parsed(_lines(path)) if row is not None]
    begins = [i for i, row in enumerate(rows) if (row["event"], row["step"]) == BEGIN]
    return rows[begins[-1] if begins else 0 :]


class RunLog:
    """Writes `{prefix}.log`, the metrics and `{prefix}_loss_curve.png` in one directory.

    In a terminal (stdout) one line of progress moves; into a file or pipe go plain lines instead.
    The trackers get each row of the metrics, from here alone. Nothing here raises where a line
    cannot be written: it goes to `missing`.
    """

    def __init__(
        self,
        directory: str,
        prefix: str,
        *,
        missing: Missing,
        resuming: bool,
        start_step: int,
        total_steps: int,
    ):
        self.directory, self.prefix, self.missing = Path(directory), prefix, missing
        self.total_steps = total_steps
        self.plotter = LivePlotter()
        self._evaluated: dict[int, float] = {}  # step -> validation loss
        self._draws, self._closed = True, False
        self._trackers: Trackers | None = None
        self._start_step, self._last_step = start_step, -1  # the last one logged before
        self._bar = None
        path = metrics_path(directory, prefix)
        self._metrics, self._log = (
            LineFile(file, missing) for file in (path, self.directory / f"{prefix}.log")
        )
        remove_half_written(path)
        if resuming:
            self.rewind(start_step)
        elif path.is_file():  # of a run that was killed before its first checkpoint
            self.attempt("new file of metrics", lambda: path.replace(f"{path}_abandoned"))
        if sys.stdout is not None and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                smoothing=0.05,
                dynamic_ncols=True,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}ETA {remaining}",
                file=sys.stdout,
            )
        self._log.write(f"=== Training started at {time.ctime()} ===")

    def rewind(self, step: int, keep: tuple[str, ...] = ()) -> None:
        """The run goes on at `step`: takes back what the metrics and the curve say of it and the
        steps behind it, and what a crash has damaged. Rows of the events in `keep` stay, and those
        of earlier runs in the file."""
        path = self._metrics.path
        lines = _lines(path)
        rows = _parsed(lines)
        if self._trackers is not None:
            self._trackers.rewind(step)
        begins = [i for i, row in enumerate(rows) if row and (row["event"], row["step"]) == BEGIN]
        first = begins[-1] if begins else -1
        logged = [row for row in rows[first + 1 :] if row and row["event"] in ("train", "val")]
        self._last_step = max((row["step"] for row in logged), default=-1)
        kept = [
            i for i, row in enumerate(rows)
            if row is not None
            and (i <= first or row["event"] in keep or row["step"] is None or row["step"] < step)
        ]  # fmt: skip
        if damaged := rows.count(None):
            self.say(f"[resume] {path}: {damaged} damaged line{'s' * (damaged > 1)} removed")
        if len(kept) < len(rows) or (lines and not lines[-1].endswith(b"\n")):
            content = b"".join(lines[i].rstrip(b"\r\n") + b"\n" for i in kept)
            try:
                replace_content(path, content)
            except OSError as error:
                self.missing.note(f"the cut of {path} at step {step} ({error.strerror or error})")
        self.plotter = LivePlotter()
        self._evaluated = {}
        for row in (rows[i] for i in kept if i >= first):
            loss, lr = row.get("loss"), row.get("lr")
            if row["event"] == "train" and _is_number(loss) and _is_number(lr):
                self.plotter.log_train(row["step"], loss, lr)
            elif row["event"] == "val":
                val_loss = row.get("val_loss")
                self._evaluated[row["step"]] = val_loss if _is_number(val_loss) else math.nan
                if _is_number(val_loss):
                    self.plotter.log_eval(row["step"], val_loss)
        if self._bar is not None:  # which draws once it is beyond what it has drawn last
            self._bar.n = self._bar.last_print_n = step

    def track(self, cfg: TrainingConfig, run_id: str) -> None:
        """From now on the trackers of cfg.track get each row of the metrics, too."""
        if cfg.track:
            self._trackers = Trackers(
                cfg, run_id, start_step=self._start_step, last_step=self._last_step,
                say=self.say, missing=self.missing,
            )  # fmt: skip

    def evaluation(self, step: int) -> float | None:
        """The validation loss behind `step` that an earlier piece of the run has logged."""
        return self._evaluated.get(step)

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
        **values: Any,  # more for the metrics
    ) -> None:
        stamp = time.strftime("%H:%M:%S")
        self._log.write(
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
            **values,
        )
        if math.isfinite(loss):
            self.plotter.log_train(step, loss, lr)
        if self._draws:
            self._draws = self.attempt("live curve", lambda: self.plotter.draw() or True) is True
        if self._bar is not None:
            self._bar.set_description_str(
                f"loss {avg_loss:.4f}, lr {lr:.2e}, {tokens_per_second:,.0f} tok/s, ", refresh=False
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

    def val(self, step: int, val_loss: float, of_sets: Mapping[str, float]) -> None:
        """of_sets: the losses of named validation sets, whose mean val_loss is."""
        line = f"[VAL] step {step:06d} val_loss {val_loss:.4f}"
        if of_sets:
            line += f" ({', '.join(f'{name} {loss:.4f}' for name, loss in of_sets.items())})"
        self._log.write(line)
        named = {f"val_loss/{name}": loss for name, loss in of_sets.items()}
        self.metrics("val", step=step, val_loss=val_loss, **named)
        if math.isfinite(val_loss):
            self.plotter.log_eval(step, val_loss)
        self.say(line)

    def sample(self, step: int, text: str) -> None:
        """A text that the model has written behind `step`: on one line of the log."""
        self._log.write(f"[SAMPLE] step {step:06d} {json.dumps(text, ensure_ascii=False)}")
        self.metrics("sample", step=step, texts=[text])
        self.say(f"[sample] step {step}:\n{text.strip()}\n")

    def checkpoint(self, path: Path) -> None:
        line = f"[CKPT] Saved to {path}"
        self._log.write(line)
        self.say(line)

    def event(self, line: str, name: str, **values: Any) -> None:
        """What happens seldom: `line` on the console and in the log, a row of the metrics."""
        self._log.write(line)
        self.metrics(name, **values)
        self.say(line)

    def metrics(self, event: str, **values: Any) -> None:
        """A line of the metrics: {"event", "time" (seconds since the epoch), values}.

        JSON has no NaN and no infinity: they become null.
        """
        row = _finite({"event": event, "time": round(time.time(), 3), **values})
        self._metrics.write(json.dumps(row, allow_nan=False))
        if self._trackers is not None:
            self._trackers.row(row)

    def attempt(self, what: str, action: Callable[[], Any]) -> Any:
        """The action's result; None, and a line that says why, if it fails. For what a run can do
        without: pictures, samples, the measurement of the machine."""
        try:
            return action()
        except Exception as error:
            reason = str(error).splitlines()[0][:200] if str(error) else ""
            self.say(f"[train] no {what} ({type(error).__name__}: {reason})")
            return None

    def close(self) -> None:
        """Ends the log and draws the loss curve, once."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._log.write(f"=== Training finished at {time.ctime()} ===")
        path = self.directory / f"{self.prefix}_loss_curve.png"
        self.attempt("loss curve", lambda: self.plotter.save(path))

    def flush(self) -> None:
        """The last call: what could not be written until now is missing."""
        if self._trackers is not None:
            self._trackers.close()
        self._log.close()
        self._metrics.close()


class NoLog:
    """A RunLog's place on ranks that do not tell: every call does nothing."""

    def __init__(self, *args: Any, **options: Any):
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None


BEGIN = ("start", 0)  # event and step of a run's first row


def _lines(path: Path) -> list[bytes]:
    try:
        return path.read_bytes().splitlines(keepends=True)
    except OSError:
        return []


def _parsed(lines: list[bytes]) -> list[dict[str, Any] | None]:
    """The rows, each with an event and a step, which may be None; None for what is no row: half a
    line of a killed run, or something else."""
    return [_row(line) for line in lines]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("event"), str):
        return None
    step = row.setdefault("step", None)
    needs_step = row["event"] in ("train", "val")
    valid = type(step) is int or (step is None and not needs_step)
    return row if valid else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _finite(value: Any) -> Any:
    """`value` with null for NaN and infinity, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
