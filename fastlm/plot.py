"""Several runs in one picture: python -m fastlm.plot runs/A runs/B --x minutes"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastlm.errors import ConfigError, DataError, OutputError, run_command
from fastlm.run.log import metrics_path, read_metrics
from fastlm.run.plot import draw_losses, windowed

_VALUES = {"steps": "step", "tokens": "tokens", "minutes": "seconds"}
_LABELS = {"steps": "step", "tokens": "tokens", "minutes": "minutes in training steps"}


@dataclass
class Curve:
    """The losses of a run in nats per token, over steps, tokens or minutes."""

    path: Path
    x: list[float]
    losses: list[float]
    means: list[float]  # of all steps since the loss before
    val_x: list[float]
    val_losses: list[float]
    tokenizer: str | None  # digest of its file; of an earlier fastlm's run, or one without: None
    vocab_size: int | None
    bits_per_byte: float | None  # behind the last step


def read_curve(path: Path, x: str) -> Curve:
    """path: a run's directory, its logs' directory, or a file of metrics.

    Raises DataError if no losses are there, or the run did not log what `x` asks for.
    """
    places = [path] if path.is_file() else [metrics_path(path / "logs"), metrics_path(path)]
    found = [place for place in places if place.is_file()]
    if not found:
        raise DataError(f"{path}: has no {places[0].name}; name a run's directory, or its metrics")
    rows = read_metrics(found[0])
    train = [row for row in rows if row["event"] == "train" and _finite(row.get("loss"))]
    val = [row for row in rows if row["event"] == "val" and _finite(row.get("val_loss"))]
    if not train:
        raise DataError(f"{found[0]}: holds no losses yet")
    name = _VALUES[x]
    if not all(_finite(row.get(name)) for row in train):
        raise DataError(f"{found[0]}: its run logged no {name}; compare it with --x steps")
    start = next((row for row in rows if row["event"] == "start"), {})
    end = rows[-1] if rows[-1]["event"] == "summary" else {}
    unit = 60 if x == "minutes" else 1
    steps, places_x = ([row[key] for row in train] for key in ("step", name))
    places_x = [value / unit for value in places_x]
    return Curve(
        path=path,
        x=places_x,
        losses=[row["loss"] for row in train],
        means=[row["avg_loss"] if _finite(row.get("avg_loss")) else row["loss"] for row in train],
        val_x=[_place(row["step"], steps, places_x) for row in val],
        val_losses=[row["val_loss"] for row in val],
        tokenizer=start.get("tokenizer"),
        vocab_size=start.get("config", {}).get("vocab_size"),
        bits_per_byte=end.get("bits_per_byte"),
    )


def _place(step: int, steps: list[int], places: list[float]) -> float:
    """Where `step` lies, by the steps that the log has; behind the last at the mean pace."""
    if step <= steps[-1] or len(steps) == 1:
        return float(np.interp(step, steps, places))
    pace = (places[-1] - places[0]) / (steps[-1] - steps[0])
    return places[-1] + (step - steps[-1]) * pace


def compare(curves: list[Curve], x: str) -> Any:
    """The matplotlib figure: training as lines, validation dashed with markers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="tight")
    axes = figure.add_subplot()
    palette = colormaps["tab10" if len(curves) <= 10 else "tab20"].colors
    for index, (curve, label) in enumerate(zip(curves, _labels(curves), strict=True)):
        color = palette[index % len(palette)]
        draw_losses(axes, curve.x, curve.losses, means=curve.means, color=color, label=label)
        marker = "o" if len(curve.val_x) < 30 else None
        axes.plot(curve.val_x, curve.val_losses, color=color, ls="--", marker=marker, ms=4, lw=1)
    axes.set_ylim(*_limits(curves))
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("training, and dashed: validation")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _limits(curves: list[Curve]) -> tuple[float, float]:
    """Leaves the first twentieth of each run outside, where all losses fall from the same height;
    what is to be compared would be flat beside it."""
    low = min(min([*windowed(c.means), *c.val_losses]) for c in curves)
    high = max(max([*windowed(c.means)[len(c.x) // 20 :], *c.val_losses[-1:]]) for c in curves)
    room = 0.05 * (high - low) or 0.1
    return low - room, high + room


def _labels(curves: list[Curve]) -> list[str]:
    """The last part of each path; as many more as tell the runs apart."""
    parts = [curve.path.absolute().parts for curve in curves]
    for count in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(of_path[-count:]) for of_path in parts]
        if len(set(labels)) == len(set(parts)):
            break
    return labels


def note_on_tokenizers(curves: list[Curve]) -> str | None:
    """A line if the runs' tokenizers differ, as far as their metrics tell; else None."""
    for of_curve in (lambda c: c.tokenizer, lambda c: c.vocab_size):
        known = [of_curve(curve) for curve in curves]
        if None not in known:
            break
    else:
        return None
    if len(set(known)) == 1:
        return None
    shown = (
        f"{label} {'unknown' if curve.bits_per_byte is None else f'{curve.bits_per_byte:.4f}'}"
        for curve, label in zip(curves, _labels(curves), strict=True)
    )
    return (
        "note: the runs' tokenizers differ: their nats per token do not compare, bits/byte of the "
        f"same text do; at the end: {', '.join(shown)}"
    )


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and bool(np.isfinite(value))


def _command(
    runs: tuple[Path, ...],
    /,
    x: Literal["steps", "tokens", "minutes"] = "steps",
    out: Path = Path("compared.png"),
) -> None:
    """Draw the losses of runs into one picture.

    Args:
        runs: Runs' directories, or files of metrics.
        x: What the losses stand over. minutes: in training steps, without evaluations and saves.
        out: The picture to write; the ending chooses the format (.png, .svg, .pdf).
    """
    if not runs:
        raise ConfigError("no runs are given; name their directories: runs/A runs/B")
    curves = [read_curve(path, x) for path in runs]
    figure = compare(curves, x)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no format
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"--out {out}: cannot be written ({reason})") from error
    print(f"[plot] {out}: {len(runs)} run{'s' * (len(runs) > 1)} over {x}")
    if note := note_on_tokenizers(curves):
        print(f"[plot] {note}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    import tyro

    return run_command(lambda: tyro.cli(_command, args=argv, prog="python -m fastlm.plot"))


if __name__ == "__main__":
    sys.exit(main())
