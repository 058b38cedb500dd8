"""Pictures of a run: the loss curve with the learning rate, and learning-rate schedules.

matplotlib is imported when a picture is made, and pyplot never: figures are objects of their own,
so nothing leaks and no display is needed.
"""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.schedule import cosine_lr_schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN_COLOR, _VAL_COLOR, _LR_COLOR = "#1f77b4", "#ff7f0e", "#7f7f7f"


class LivePlotter:
    """Collects losses; redraws them in a notebook, and saves them as a picture anywhere.

    Usage: log_train and log_eval as the run goes on, draw() to refresh the notebook's output cell
    (in a plain script it does nothing), save(path) at the end.
    """

    def __init__(self, dpi: int = 200):
        self.dpi = dpi
        self.train_steps: list[int] = []
        self.train_losses: list[float] = []
        self.learning_rates: list[tuple[int, float]] = []
        self.eval_steps: list[int] = []
        self.eval_losses: list[float] = []

    def log_train(self, step: int, loss: float, lr: float | None = None) -> None:
        """A training loss in nats per token, and the step's learning rate if it is given."""
        self.train_steps.append(step)
        self.train_losses.append(loss)
        if lr is not None:
            self.learning_rates.append((step, lr))

    def log_eval(self, step: int, loss: float) -> None:
        """A validation loss in nats per token."""
        self.eval_steps.append(step)
        self.eval_losses.append(loss)

    def draw(self) -> None:
        """Shows the curve in the notebook's output cell, in place of the one before."""
        if not _in_notebook():
            return
        from IPython.display import Image, clear_output, display

        picture = io.BytesIO()
        self._figure().savefig(picture, format="png")
        clear_output(wait=True)
        # Half the pixels wide: sharp on screens of twice the usual resolution.
        display(Image(picture.getvalue(), width=3 * self.dpi))

    def save(self, path: str | Path = "loss_curve.png") -> None:
        """Writes the curve to `path`; the ending chooses the format (.png, .svg, .pdf)."""
        self._figure().savefig(path)
        print(f"[plotter] Saved training curve to {path}")

    def _figure(self) -> Any:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), dpi=self.dpi, layout="tight")
        axes = figure.add_subplot()
        if self.learning_rates:
            rates = axes.twinx()
            rates.plot(*zip(*self.learning_rates, strict=True), color=_LR_COLOR, lw=1, ls="--")
            rates.set_ylabel("learning rate", color=_LR_COLOR)
            rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
            rates.set_ylim(bottom=0)
            axes.set_zorder(rates.get_zorder() + 1)  # losses in front of the rate
            axes.patch.set_visible(False)
        if self.train_steps:
            draw_losses(
                axes, self.train_steps, self.train_losses, color=_TRAIN_COLOR, label="train_loss"
            )
        if self.eval_steps:
            marker = "o" if len(self.eval_steps) < 30 else None
            axes.plot(
                self.eval_steps,
                self.eval_losses,
                color=_VAL_COLOR,
                label="val_loss",
                marker=marker,
                ms=4,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats per token)")
        axes.set_title("Training Progress")
        axes.grid(alpha=0.3)
        if self.train_steps or self.eval_steps:
            axes.legend()
        return figure


def draw_losses(
    axes: Any,
    x: Sequence[float],
    losses: Sequence[float],
    *,
    color: Any,
    label: str,
    means: Sequence[float] | None = None,  # over all steps since the loss before, if known
) -> None:
    """The averages of windows as a line, over a faint one of the losses themselves."""
    averages = windowed(losses if means is None else means)
    if averages != list(losses):
        axes.plot(x, losses, color=color, alpha=0.25, lw=0.8)
    axes.plot(x, averages, color=color, label=label, lw=1.5)


def windowed(values: Sequence[float]) -> list[float]:
    """The mean around each of n values, of a fiftieth of them and 25 at most to either side; at the
    beginning, where losses fall, of as many ahead as behind. Below 50 values: as they are. What is
    not finite counts in no mean."""
    n = len(values)
    half = min(n // 50, 25)
    if half == 0:
        return list(values)
    finite = np.asarray(values, dtype=np.float64)
    counts = np.isfinite(finite)
    sums = np.concatenate(([0.0], np.where(counts, finite, 0.0).cumsum()))
    seen = np.concatenate(([0], counts.cumsum()))
    index = np.arange(n)
    reach = np.minimum(half, index)
    first, last = index - reach, np.minimum(index + reach + 1, n)
    with np.errstate(invalid="ignore"):
        return ((sums[last] - sums[first]) / (seen[last] - seen[first])).tolist()


def plot_lr_schedule(
    lr_max: float,
    lr_min: float,
    warmup_iters: int,
    cosine_iters: int,
    total_steps: int | None = None,
    path: str | Path | None = None,
) -> "Figure":
    """The curve of cosine_lr_schedule over `total_steps` (default 1.2 * cosine_iters).

    Returns the matplotlib figure, which a notebook shows; writes it to `path` if one is given.
    """
    from matplotlib.figure import Figure

    steps = range(total_steps if total_steps is not None else round(1.2 * cosine_iters))
    figure = Figure(figsize=(6, 4), layout="tight")
    axes = figure.add_subplot()
    axes.plot(
        steps, [cosine_lr_schedule(t, lr_max, lr_min, warmup_iters, cosine_iters) for t in steps]
    )
    axes.set_title("Cosine Annealing LR Schedule with Warmup")
    axes.set_xlabel("Iteration")
    axes.set_ylabel("Learning Rate")
    axes.grid(alpha=0.3)
    if path is not None:
        figure.savefig(path)
    return figure


def _in_notebook() -> bool:
    """Is an IPython kernel (not the terminal's IPython) running?"""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")
