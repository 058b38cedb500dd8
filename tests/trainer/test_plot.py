"""The loss curve and the schedule as pictures, without a display, a notebook, or pyplot."""

import gc
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from command_server import commands
from training_runs import tiny_flags, write_tokens

from fastlm import LivePlotter, cosine_lr_schedule, plot_lr_schedule
from fastlm.run.plot import windowed


@pytest.fixture
def plotter() -> LivePlotter:
    plotter = LivePlotter()
    for step in range(0, 40, 10):
        plotter.log_train(step, 4.0 - step / 20, lr=step * 1e-4)
    plotter.log_eval(20, 3.1)
    plotter.log_eval(39, 2.2)
    return plotter


def lines_of(axes) -> dict[str, tuple[list, list]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for line in axes.get_lines()
    }


def png_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_the_curve_holds_what_was_logged(plotter):
    assert plotter.train_steps == [0, 10, 20, 30]
    assert plotter.train_losses == [4.0, 3.5, 3.0, 2.5]
    assert (plotter.eval_steps, plotter.eval_losses) == ([20, 39], [3.1, 2.2])
    losses, rates = plotter._figure().axes
    lines = lines_of(losses)
    assert lines["train_loss"] == ([0, 10, 20, 30], [4.0, 3.5, 3.0, 2.5])
    assert lines["val_loss"] == ([20, 39], [3.1, 2.2])
    colors = {line.get_label(): line.get_color() for line in losses.get_lines()}
    assert colors == {"train_loss": "#1f77b4", "val_loss": "#ff7f0e"}
    assert losses.get_title() == "Training Progress"
    assert losses.get_xlabel() == "step" and "loss" in losses.get_ylabel()
    assert [text.get_text() for text in losses.get_legend().get_texts()] == [
        "train_loss",
        "val_loss",
    ]
    assert list(lines_of(rates).values()) == [([0, 10, 20, 30], [0.0, 1e-3, 2e-3, 3e-3])]


def test_a_long_curve_is_averages_over_a_faint_raw_line():
    plotter = LivePlotter()
    raw = [5.0 - step / 100 + (-1) ** step for step in range(200)]
    for step, loss in enumerate(raw):
        plotter.log_train(step, loss)
    (axes,) = plotter._figure().axes
    faint, line = axes.get_lines()
    assert list(faint.get_ydata()) == raw and faint.get_alpha() < 0.5
    assert line.get_label() == "train_loss" and line.get_alpha() is None
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["train_loss"]
    averages = list(line.get_ydata())
    assert list(line.get_xdata()) == list(faint.get_xdata()) == list(range(200))
    for step in (0, 1, 3, 100, 197, 199):
        reach = min(4, step)
        window = raw[step - reach : step + reach + 1]
        assert averages[step] == pytest.approx(sum(window) / len(window))


def test_windows_leave_out_what_is_not_finite():
    values = [1.0] * 100
    values[50], values[52] = float("nan"), float("inf")
    assert windowed(values) == [1.0] * 100
    assert all(map(math.isnan, windowed([float("nan")] * 60)))
    assert windowed([]) == [] and windowed([2.0, 3.0]) == [2.0, 3.0]


def test_save_writes_a_picture_and_says_so(plotter, tmp_path, capsys):
    path = tmp_path / "curve.png"
    plotter.save(path)
    assert capsys.readouterr().out == f"[plotter] Saved training curve to {path}\n"
    assert png_size(path) == (1200, 800)  # 6 x 4 inches at 200 dpi
    import matplotlib.image

    pixels = matplotlib.image.imread(path)[..., :3]
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):
        near = abs(pixels * 255 - color).max(axis=-1) < 3
        assert near.sum() > 300, f"no curve of color {color}"


def test_the_seeds_calls(tmp_path, monkeypatch, capsys):
    """Without rates and arguments, as in the notebook."""
    monkeypatch.chdir(tmp_path)
    plotter = LivePlotter(dpi=50)
    plotter.log_train(0, 3.0)
    plotter.log_eval(0, 3.5)
    plotter.draw()
    plotter.save()
    assert png_size(tmp_path / "loss_curve.png") == (300, 200)
    assert len(plotter._figure().axes) == 1
    assert "loss_curve.png" in capsys.readouterr().out


def test_nothing_logged_is_an_empty_picture(tmp_path):
    LivePlotter().save(tmp_path / "empty.png")
    assert png_size(tmp_path / "empty.png") == (1200, 800)


def test_nan_and_infinity_can_be_drawn(tmp_path):
    plotter = LivePlotter()
    for step, loss in enumerate((1.0, float("nan"), float("inf"), 2.0)):
        plotter.log_train(step, loss, lr=0.0)
    plotter.save(tmp_path / "nan.png")
    assert png_size(tmp_path / "nan.png") == (1200, 800)
    low, high = plotter._figure().axes[0].get_ylim()
    assert 0.5 < low < 1 and 2 < high < 2.5  # what is finite is in sight


def test_other_formats(plotter, tmp_path):
    plotter.save(tmp_path / "curve.svg")
    assert "<svg" in (tmp_path / "curve.svg").read_text()


def test_draw_in_a_notebook_replaces_the_picture(plotter, monkeypatch):
    plotter._figure()  # matplotlib looks for IPython too when it is imported
    shown = []
    display = SimpleNamespace(
        Image=lambda data, width: SimpleNamespace(data=data, width=width),
        clear_output=lambda wait: shown.append(("clear", wait)),
        display=shown.append,
    )
    shell = SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    plotter.draw()
    assert len(shown) == 2 and shown[0] == ("clear", True)
    assert shown[1].data.startswith(b"\x89PNG") and shown[1].width == 600
    # The terminal's IPython has no kernel, and no cell to draw in.
    shown.clear()
    del shell.kernel
    plotter.draw()
    assert shown == []


def test_a_script_needs_neither_pyplot_nor_ipython_nor_a_display(tmp_path):
    script = """
import sys, warnings
warnings.filterwarnings("ignore", ".* deprecated - use")  # pyparsing's, of an old matplotlib
sys.modules["IPython"] = None  # importing it fails
from fastlm import LivePlotter, plot_lr_schedule
assert "matplotlib" not in sys.modules, "imported before it is needed"
plotter = LivePlotter()
plotter.log_train(0, 2.0, 1e-3)
plotter.draw()
assert "matplotlib" not in sys.modules, "draw() is not for scripts"
plotter.save("curve.png")
plot_lr_schedule(1e-3, 1e-4, 5, 50, path="rates.png")
assert "matplotlib.pyplot" not in sys.modules
"""
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curve.png").exists() and (tmp_path / "rates.png").exists()


def test_no_figure_stays_behind(plotter, tmp_path):
    from matplotlib.figure import Figure

    def figures() -> int:
        gc.collect()
        return sum(isinstance(thing, Figure) for thing in gc.get_objects())

    before = figures()
    for _ in range(5):
        plotter.save(tmp_path / "curve.png")
        plot_lr_schedule(1e-3, 1e-4, 5, 50, path=tmp_path / "rates.png")
    assert figures() == before


def test_plot_lr_schedule_is_the_schedule(tmp_path):
    figure = plot_lr_schedule(1e-3, 1e-5, 500, 5000, total_steps=6000, path=tmp_path / "lr.png")
    (axes,) = figure.axes
    ((steps, rates),) = lines_of(axes).values()
    assert steps == list(range(6000))
    assert rates == [cosine_lr_schedule(t, 1e-3, 1e-5, 500, 5000) for t in range(6000)]
    assert axes.get_title() == "Cosine Annealing LR Schedule with Warmup"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Iteration", "Learning Rate")
    assert png_size(tmp_path / "lr.png")[0] > 300
    figure = plot_lr_schedule(1.0, 0.1, 0, 100)
    assert len(figure.axes[0].get_lines()[0].get_xdata()) == 120


def test_the_curve_of_a_resumed_run_begins_at_its_first_step(tmp_path):
    write_tokens(tmp_path)
    first = tiny_flags(total_steps=6, ckpt_every=3, eval_every=2)
    assert commands().run(first, tmp_path).returncode == 0
    log = tmp_path / "run" / "logs" / "metrics.jsonl"
    with open(log, "ab") as file:
        file.write(b'{"event": "tr')  # as a killed run leaves it
    second = ["--resume", "run/checkpoints/checkpoint_3.pt", "--total-steps", "9"]
    command = commands().start(
        [*tiny_flags(eval_every=2), *second], tmp_path, call="command_programs:train_and_tell_curve"
    )
    result = command.wait()
    assert result.returncode == 0, result.output
    assert "metrics.jsonl: 1 damaged line removed" in result.stdout
    told = result.stdout.splitlines()[-2:]
    assert told == [f"train {list(range(9))}", "val [2, 4, 6, 8]"]
