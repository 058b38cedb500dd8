"""python -m fastlm.plot: several runs in one picture."""

import json
from pathlib import Path

import pytest
from command_server import commands
from in_process import run_tiny
from prepared_data import bytes_tokenizer, quiet, write_files
from training_runs import losses, metrics, tiny_config

import fastlm.plot as plot
from fastlm.data.files import open_data
from fastlm.data.text import find_text_files
from fastlm.prepare import prepare
from fastlm.train import train

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def write_run(directory: Path, height: float, steps: int = 100) -> Path:
    """A run whose loss falls from 9 + height to height; 1000 tokens and 3 s a step."""
    rows = [{"event": "train", "step": 7, "loss": 99.0}, {"event": "start", "step": 0}]  # another's
    for step in range(0, steps, 2):
        loss = height + 9 / (1 + step)
        known = {"tokens": (step + 1) * 1000, "seconds": (step + 1) * 3.0}
        rows.append({"event": "train", "step": step, "loss": loss, "avg_loss": loss, **known})
        if step == steps // 2:
            rows.append({"event": "val", "step": step, "val_loss": height + 0.5})
    (directory / "logs").mkdir(parents=True)
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    (directory / "logs" / "metrics.jsonl").write_text(lines + '{"event": "tr')
    return directory


@pytest.mark.parametrize(
    "x, first, last, val",
    [("steps", 0, 98, 50), ("tokens", 1e3, 99e3, 51e3), ("minutes", 0.05, 4.95, 2.55)],
)
def test_curves_stand_over_what_was_asked_for(tmp_path, x, first, last, val):
    curve = plot.read_curve(write_run(tmp_path / "a", 2.0), x)
    assert (curve.x[0], curve.x[-1]) == pytest.approx((first, last))
    assert curve.losses[0] == 11.0 and len(curve.losses) == 50
    assert (curve.val_x, curve.val_losses) == ([pytest.approx(val)], [2.5])


@pytest.mark.parametrize("x, place", [("steps", 99), ("tokens", 100e3), ("minutes", 5.0)])
def test_the_last_validation_stands_behind_the_last_row_of_training(tmp_path, x, place):
    log = write_run(tmp_path / "a", 2.0) / "logs" / "metrics.jsonl"
    text = log.read_text().removesuffix('{"event": "tr')
    log.write_text(text + json.dumps({"event": "val", "step": 99, "val_loss": 2.25}) + "\n")
    assert plot.read_curve(tmp_path / "a", x).val_x[-1] == pytest.approx(place)


def test_the_picture_has_every_run_with_its_name_and_color(tmp_path):
    runs = [write_run(tmp_path / name, height, 80) for name, height in (("a", 2.0), ("b/a", 3.0))]
    figure = plot.compare([plot.read_curve(run, "steps") for run in runs], "steps")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"{tmp_path.name}/a", "b/a"]
    lines = {line.get_label(): line for line in axes.get_lines() if line.get_label() in labels}
    assert list(lines[labels[1]].get_ydata()) == [3 + 9 / (1 + s) for s in range(0, 80, 2)]
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert [line.get_color() for line in dashed] == [lines[label].get_color() for label in labels]
    assert len({line.get_color() for line in dashed}) == 2
    assert axes.get_xlabel() == "step" and "nats" in axes.get_ylabel()
    low, high = axes.get_ylim()  # without the fall from 12, which says nothing
    assert 1.5 < low < 2.1 and 4 < high < 7


def test_the_command_compares_real_runs(tmp_path):
    for name, rate in (("slow", 1e-4), ("fast", 1e-2)):
        run_tiny(tmp_path / name, lr_max=rate, lr_min=1e-5, total_steps=4, eval_every=2)
    curve = plot.read_curve(tmp_path / "fast", "tokens")
    assert curve.losses == [*losses(tmp_path / "fast").values()]
    assert curve.x == [row["tokens"] for row in metrics(tmp_path / "fast", "train")]
    argv = ["slow", "fast/logs/metrics.jsonl", "--x", "minutes", "--out", "both.png"]
    result = commands().run(argv, tmp_path, call="fastlm.plot:main")
    assert (result.returncode, result.stdout) == (0, "[plot] both.png: 2 runs over minutes\n")
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def run_on(directory: Path, tokenizer: str) -> None:
    """A run on text that `tokenizer` (a file) has encoded."""
    data = directory / "data"
    write_files(directory, {"text.txt": "<|endoftext|>".join(["def f(x): return x"] * 60)})
    files = find_text_files([directory / "text.txt"])
    prepare(files, data, tokenizer=tokenizer, val_fraction=0.3, log=quiet)
    train(open_data([str(data)]), tiny_config(directory, vocab_size=300, total_steps=2))


def test_runs_of_different_tokenizers_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    bytes_tokenizer(Path("one.json"))
    bytes_tokenizer(Path("other.json"), word=257)
    for name, tokenizer in (("a", "one.json"), ("b", "one.json"), ("c", "other.json")):
        run_on(tmp_path / name, tokenizer)
    capsys.readouterr()
    assert plot.main(["a", "b"]) == 0
    assert capsys.readouterr().out == "[plot] compared.png: 2 runs over steps\n"
    assert plot.main(["a", "c"]) == 0
    ends = [metrics(tmp_path / name, "summary")[0]["bits_per_byte"] for name in "ac"]
    note = capsys.readouterr().out.splitlines()[1]
    assert note.startswith("[plot] note: the runs' tokenizers differ")
    assert note.endswith(f"at the end: a {ends[0]:.4f}, c {ends[1]:.4f}")


def test_runs_of_an_earlier_version_are_told_apart_by_their_vocabularies(tmp_path):
    sizes = {"a": 300, "b": 300, "c": 400}
    for name, size in sizes.items():
        log = write_run(tmp_path / name, 2.0) / "logs" / "metrics.jsonl"
        start = json.dumps({"event": "start", "step": 0, "config": {"vocab_size": size}})
        log.write_text(f"{start}\n" + log.read_text().split("\n", 2)[2])
    a, b, c = (plot.read_curve(tmp_path / name, "steps") for name in sizes)
    assert plot.note_on_tokenizers([a, b]) is None and plot.note_on_tokenizers([a]) is None
    assert plot.note_on_tokenizers([a, c]).endswith("at the end: a unknown, c unknown")
    plain = plot.read_curve(write_run(tmp_path / "d", 2.0), "steps")
    assert plot.note_on_tokenizers([a, plain]) is None


@pytest.mark.parametrize(
    "argv, message",
    [
        (["nowhere"], "nowhere: has no metrics.jsonl"),
        (["empty"], "holds no losses yet"),
        (["old", "--x", "tokens"], "logged no tokens; compare it with --x steps"),
        (["old", "--out", "no/such/place.png"], "cannot be written (No such file or directory)"),
        (["old", "--out", "picture.xyz"], "picture.xyz: cannot be written (Format 'xyz'"),
        ([], "no runs are given"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "empty", 1.0, steps=0)
    path = write_run(tmp_path / "old", 1.0) / "logs" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"tokens"', '"t"'))
    assert plot.main(argv) == 2
    assert message in capsys.readouterr().err
