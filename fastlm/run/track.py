"""Trackers: what metrics.jsonl gets, shown by other programs too (--track).

Each row of the metrics comes here once, on rank 0, by way of RunLog. A tracker that fails is left
out from then on, which one line says; the run goes on.
"""

import csv
import html
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from fastlm.config import TrainingConfig
from fastlm.errors import ConfigError
from fastlm.run.output import LineFile, Missing, replace_content

Row = Mapping[str, Any]

_FINISH_SECONDS = 120  # for the end of an upload; what is left stays in W&B's files


class Tracker(Protocol):
    def row(self, row: Row) -> None:
        """A line of the metrics: event, time, step, and values; null for what is not finite."""

    def rewind(self, step: int) -> None:
        """The run goes on at `step`: what is shown of it and of later ones counts no more."""

    def close(self) -> None: ...


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ConfigError, naming what to install, for a tracker whose package is not there."""
    for name in names:
        if name != "csv" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"track={name!r}: the package {name} is not installed; pip install "
                f"'fastlm[{name}]', or leave it out of --track"
            )


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row: {event}/{name}, as in train/loss and val/loss."""
    event = row["event"]
    return {
        f"{event}/{name.removeprefix(f'{event}_')}": value
        for name, value in row.items()
        if type(value) in (int, float) and name not in ("time", "step")
    }


class Trackers:
    """The trackers of a run, kept apart: none hears of another's failure.

    last_step: the last that an earlier piece of the run has logged, -1 for none. Those between the
    checkpoint and it are the same again, bit for bit: what cannot take rows back leaves them out.
    """

    def __init__(
        self,
        cfg: TrainingConfig,
        run_id: str,
        *,
        start_step: int,
        last_step: int,
        say: Callable[[str], None],
        missing: Missing,
    ):
        self._say = say
        self._open: dict[str, Tracker] = {}
        makers: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(cfg, start_step),
            "wandb": lambda: WandB(cfg, run_id, last_step),
            "trackio": lambda: Trackio(cfg, run_id, last_step),
            "csv": lambda: Csv(cfg, start_step, missing),
        }
        for name in cfg.track:
            try:
                self._open[name] = makers[name]()
            except Exception as error:  # no network, no login, no room
                self._leave_out(name, error)

    def row(self, row: Row) -> None:
        self._each(lambda tracker: tracker.row(row))

    def rewind(self, step: int) -> None:
        self._each(lambda tracker: tracker.rewind(step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:
                self._open.pop(name)
                self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        reason = str(error).splitlines()[0][:200] if str(error) else ""
        self._say(
            f"[track] {name}: left out from now on ({type(error).__name__}: {reason}); the run "
            f"goes on"
        )


class TensorBoard:
    """Event files in {log_dir}/tensorboard: the numbers as scalars, samples as text."""

    def __init__(self, cfg: TrainingConfig, start_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._make = SummaryWriter
        self._directory = str(beside_log(cfg.log_dir, cfg.log_save_prefix, "tensorboard"))
        # From start_step on the folder may hold a killed run's steps, or an overwritten one's.
        self._writer = SummaryWriter(self._directory, purge_step=start_step)
        if not cfg.ckpt_path_to_resume:
            settings = json.dumps(asdict(cfg), indent=1, default=str)
            self._writer.add_text("settings", f"```\n{settings}\n```", 0)

    def row(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row.get("step"), walltime=row["time"])
        for index, text in enumerate(row.get("texts", ())):
            # Indented: Markdown's way to leave everything as it is.
            shown = "".join(f"    {line}\n" for line in text.splitlines())
            self._writer.add_text(f"sample/{index}", shown, row.get("step"), walltime=row["time"])
        self._writer.flush()  # else a kill would lose two minutes, and a checkpoint may be younger

    def rewind(self, step: int) -> None:
        self._writer.close()
        self._writer = self._make(self._directory, purge_step=step)

    def close(self) -> None:
        self._writer.close()


class _AppendOnly:
    """Leaves out the steps that its program has been given already."""

    _run: Any  # the program's

    def __init__(self, last_step: int):
        self._shown = last_step  # steps up to it are there
        self._last = last_step

    def row(self, row: Row) -> None:
        step = row.get("step")
        if step is None or row["event"] == "start" or step <= self._shown:
            return
        self._last = max(self._last, step)
        texts = {f"sample/{i}": self._text(text) for i, text in enumerate(row.get("texts", ()))}
        if values := {**scalars(row), **texts}:
            self._run.log(values, step=step)

    def rewind(self, step: int) -> None:
        self._shown = self._last

    def _text(self, text: str) -> Any:
        raise NotImplementedError


class WandB(_AppendOnly):
    """A Weights & Biases run with the run's own id: a resumed run is the same one there.

    Its own variables hold: WANDB_MODE=offline, WANDB_PROJECT (default: fastlm), WANDB_NAME
    (default: the run's directory), WANDB_RUN_ID, …
    """

    def __init__(self, cfg: TrainingConfig, run_id: str, last_step: int):
        super().__init__(last_step)
        import wandb

        self._html = wandb.Html
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastlm"),
            name=os.environ.get("WANDB_NAME", run_name(cfg)),
            id=os.environ.get("WANDB_RUN_ID", run_id),
            resume="allow",
            dir=cfg.log_dir,
            config=asdict(cfg),
            allow_val_change=True,  # a resumed run's settings may differ
            settings=_settings(wandb.Settings),
        )

    def _text(self, text: str) -> Any:
        return self._html(f"<pre>{html.escape(text)}</pre>")

    def close(self) -> None:
        self._run.finish(exit_code=int(sys.exc_info()[0] is not None))


def _settings(make: Callable[..., Any]) -> Any:
    """wandb.Settings: its console capture is off, since the run's own streams survive a terminal
    that is closed; a lost network does not keep the run from ending (older versions wait)."""
    limits = {"finish_timeout": _FINISH_SECONDS} if hasattr(make(), "finish_timeout") else {}
    return make(console="off", **limits)


class Trackio(_AppendOnly):
    """A Trackio run, named after the run's directory and its id."""

    def __init__(self, cfg: TrainingConfig, run_id: str, last_step: int):
        super().__init__(last_step)
        import trackio

        self._markdown = trackio.Markdown
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "fastlm"),
            name=f"{run_name(cfg)}-{run_id[:8]}",
            config=asdict(cfg),
            resume="allow",
            embed=False,
        )

    def _text(self, text: str) -> Any:
        return self._markdown("".join(f"    {line}\n" for line in text.splitlines()))

    def close(self) -> None:
        self._run.finish()


class Csv:
    """{log_prefix}.csv beside the log: a line for each row of training and validation."""

    COLUMNS = (
        "time", "step", "tokens", "seconds", "loss", "avg_loss", "lr", "grad_norm",
        "tokens_per_second", "mfu", "memory_bytes", "val_loss",
    )  # fmt: skip

    def __init__(self, cfg: TrainingConfig, start_step: int, missing: Missing):
        self._path = Path(cfg.log_dir) / f"{cfg.log_save_prefix}.csv"
        self.rewind(start_step)
        self._file = LineFile(self._path, missing)

    def row(self, row: Row) -> None:
        if row["event"] in ("train", "val"):
            values = [row.get(name) for name in self.COLUMNS]
            self._file.write(",".join("" if value is None else str(value) for value in values))

    def rewind(self, step: int) -> None:
        """Keeps the lines before `step`."""
        text = self._path.read_text() if self._path.exists() else ""
        lines = [",".join(self.COLUMNS)]
        for row in csv.DictReader(io.StringIO(text)):
            if (row.get("step") or "").isdecimal() and int(row["step"]) < step and None not in row:
                lines.append(",".join(row.get(name) or "" for name in self.COLUMNS))
        replace_content(self._path, "".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        self._file.close()


def run_name(cfg: TrainingConfig) -> str:
    """The name of the run's directory."""
    return Path(cfg.target_dir).absolute().name


def beside_log(directory: str | Path, prefix: str, name: str) -> Path:
    """{directory}/{name}; {prefix}_{name} under another prefix than the default, "train"."""
    return Path(directory) / (name if prefix == "train" else f"{prefix}_{name}")
