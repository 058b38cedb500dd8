"""--profile A:B: which steps the trace has, that it changes nothing, what a failure does."""

import gzip
import json
import re

import pytest
import torch
from in_process import checkpoint, run_tiny
from training_runs import losses, metrics, same, state, tiny_config

from fastlm import ConfigError
from fastlm.run.profiler import StepProfiler, parse_span

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def events(directory, rank=0) -> list[dict]:
    with gzip.open(directory / f"trace_rank{rank}.json.gz") as file:
        return json.load(file)["traceEvents"]


def steps_in(trace) -> list[int]:
    names = (re.fullmatch(r"training step (\d+)", event.get("name", "")) for event in trace)
    return sorted(int(name[1]) for name in names if name)


class Counting:
    """A clock that records what it is told."""

    def __init__(self):
        self.calls = []

    def pause(self):
        self.calls.append("pause")

    def start(self):
        self.calls.append("start")


def make(directory, span=(2, 5), **options):
    said, missing = [], []
    profiler = StepProfiler(
        span, directory, torch.device("cpu"), options.pop("clock", Counting()),
        say=said.append, missing=missing.append, **options,
    )  # fmt: skip
    return profiler, said, missing


def work():
    return torch.randn(64, 64) @ torch.randn(64, 64)


@pytest.mark.parametrize("text, span", [("0:1", (0, 1)), ("10:15", (10, 15)), ("007:8", (7, 8))])
def test_spans(text, span):
    assert parse_span(text) == span
    assert tiny_config("unused", profile=text, total_steps=100).profile == text


@pytest.mark.parametrize(
    "text",
    ["", "5", "5:", ":5", "5:5", "6:5", "-1:5", "1:2:3", "a:b", "1.0:2", " 1:2", f"1:{'9' * 19}"],
)
def test_what_is_no_span(text):
    with pytest.raises(ConfigError, match=r"profile=.*it must be A:B with 0 <= A < B") as error:
        tiny_config("unused", profile=text)
    assert "\n" not in str(error.value)


def test_a_span_behind_the_run_is_an_error():
    with pytest.raises(ConfigError, match="profile='12:14': it begins behind the last step, 11"):
        tiny_config("unused", profile="12:14")
    tiny_config("unused", profile="12:14", train_minutes=1.0)  # its length is not known yet


def test_the_trace_has_the_steps_of_the_span(tmp_path):
    clock = Counting()
    profiler, said, missing = make(tmp_path, clock=clock, rank=3)
    for step in range(8):
        profiler.step(step)
        work()
    profiler.close()
    trace = events(tmp_path, rank=3)
    assert steps_in(trace) == [2, 3, 4]
    products = [event for event in trace if event.get("name") == "aten::mm"]
    assert len(products) == 3 and products[0]["args"]["Input Dims"][0] == [64, 64]
    assert clock.calls == ["pause", "start"] * 2
    assert said == [
        f"[profile] steps 2 to 4: {tmp_path}/trace_rank3.json.gz; open it at "
        f"https://ui.perfetto.dev"
    ]
    assert missing == [] and [path.name for path in tmp_path.iterdir()] == ["trace_rank3.json.gz"]


def test_a_run_that_ends_within_the_span_has_its_trace(tmp_path):
    profiler, said, _ = make(tmp_path, span=(2, 100))
    for step in range(4):
        profiler.step(step)
        work()
    profiler.close()
    assert steps_in(events(tmp_path)) == [2, 3] and "steps 2 to 3" in said[0]


@pytest.mark.parametrize(
    "steps, message",
    [(range(2), "the run ended before step 2"), (range(5, 8), "steps 2 to 4 are over")],
)
def test_a_run_without_these_steps_says_so(tmp_path, steps, message):
    profiler, said, missing = make(tmp_path)
    for step in steps:
        profiler.step(step)
    profiler.close()
    assert said == [f"[profile] nothing: {message}"]
    assert not missing and not list(tmp_path.iterdir())


def test_a_run_that_goes_on_within_the_span_has_the_rest(tmp_path):
    profiler, _, _ = make(tmp_path)
    for step in range(4, 8):
        profiler.step(step)
    assert steps_in(events(tmp_path)) == [4]


def test_a_rollback_does_not_make_it_longer(tmp_path):
    profiler, said, _ = make(tmp_path)
    for step in (2, 3, 0, 1, 2, 3, 4, 5):
        profiler.step(step)
    profiler.close()
    assert steps_in(events(tmp_path)) == [0, 2, 3] and len(said) == 1


# --- failures ---


def test_a_profiler_that_does_not_start(tmp_path, monkeypatch):
    def refuse(self):
        raise RuntimeError("no CUPTI\nand more")

    monkeypatch.setattr(torch.profiler.profile, "start", refuse)
    clock = Counting()
    profiler, said, missing = make(tmp_path, clock=clock)
    for step in range(8):
        profiler.step(step)
    profiler.close()
    assert said == ["[profile] FAILED: the profiler could not be had (no CUPTI); the run goes on"]
    assert missing == ["what --profile asked for (no CUPTI)"] and clock.calls == ["pause", "start"]


def test_a_directory_that_is_gone(tmp_path):
    profiler, said, missing = make(tmp_path / "gone")
    for step in range(8):
        profiler.step(step)
    profiler.close()
    assert len(said) == len(missing) == 1
    assert re.match(r"\[profile\] FAILED: the trace of steps 2 to 4, .*gone.*; the run", said[0])


def test_a_trace_that_is_cut_short_is_not_kept(tmp_path, monkeypatch):
    export = torch.profiler.profile.export_chrome_trace

    def cut(self, path):
        export(self, path)
        with open(path, "r+b") as file:
            file.truncate(1000)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", cut)
    profiler, said, missing = make(tmp_path)
    for step in range(8):
        profiler.step(step)
    assert "cut short: is the disk full?" in said[0] and len(missing) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_whose_trace_cannot_be_written_goes_on(tmp_path, capsys, monkeypatch):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", full)
    run_tiny(tmp_path, total_steps=6, profile="1:3")
    said = capsys.readouterr()
    assert "[profile] FAILED: the trace of steps 1 to 2" in said.out
    assert "what --profile asked for ([Errno 28] No space left" in said.out + said.err
    assert checkpoint(tmp_path).exists()


# --- on CUDA, played: no test machine has one ---


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_the_memory_is_recorded_too(tmp_path, monkeypatch, fails):
    calls = []

    def dump(path):
        calls.append("dump")
        if fails:
            raise OSError(28, "No space left on device")

    memory = torch.cuda.memory
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(
        memory, "_record_memory_history", lambda **o: calls.append(o.get("enabled", "all"))
    )
    monkeypatch.setattr(memory, "_dump_snapshot", dump)
    said, missing = [], []
    profiler = StepProfiler(
        (1, 2), tmp_path, torch.device("cuda"), Counting(), rank=1,
        say=said.append, missing=missing.append,
    )  # fmt: skip
    for step in range(4):
        profiler.step(step)
    profiler.close()
    assert calls == ["all", "synchronize", "dump", None]
    assert steps_in(events(tmp_path, rank=1)) == [1]
    assert len(said) == 2 and len(missing) == fails
    form = r"FAILED: the memory snapshot of" if fails else r"steps 1 to 1, memory: .*memory_rank1\."
    assert re.search(form, said[1])


# --- in a run ---


def test_a_profiled_run_is_the_same_bit_for_bit(tmp_path, capsys):
    settings = dict(total_steps=8, eval_every=3, ckpt_every=2, dropout=0.2, grad_accum=2)
    run_tiny(tmp_path / "plain", **settings)
    assert "[profile]" not in capsys.readouterr().out
    run_tiny(tmp_path / "profiled", profile="2:5", **settings)
    trace = tmp_path / "profiled" / "logs" / "trace_rank0.json.gz"
    assert f"[profile] steps 2 to 4: {trace}; open it at" in capsys.readouterr().out
    for name in ("2", "4", "6", "8", "final"):
        paths = [checkpoint(tmp_path / run, name) for run in ("plain", "profiled")]
        assert [path.exists() for path in paths] == [name != "8"] * 2, name
        if name != "8":
            assert same(*map(state, paths)), name
    assert losses(tmp_path / "plain") == losses(tmp_path / "profiled")
    names = {event.get("name") for event in events(trace.parent)}
    assert steps_in(events(trace.parent)) == [2, 3, 4] and "aten::embedding" in names


def test_a_resumed_run_is_profiled_only_if_it_is_asked_to_be(tmp_path):
    run_tiny(tmp_path, total_steps=4, ckpt_every=2, profile="1:2", cosine_iters=6)
    logs = tmp_path / "logs"
    assert steps_in(events(logs)) == [1]
    (logs / "trace_rank0.json.gz").unlink()
    resume = dict(ckpt_path_to_resume=str(checkpoint(tmp_path, "final")), cosine_iters=6)
    run_tiny(tmp_path, total_steps=6, **resume)
    assert not (logs / "trace_rank0.json.gz").exists()


def test_an_error_in_the_span_leaves_the_trace(tmp_path, monkeypatch):
    from fastlm.step import TrainStep

    take = TrainStep.run

    def run(self, first_sample, *args, **options):
        if first_sample == 4 * 4:
            raise RuntimeError("a broken step")
        return take(self, first_sample, *args, **options)

    monkeypatch.setattr(TrainStep, "run", run)
    with pytest.raises(RuntimeError, match="a broken step"):
        run_tiny(tmp_path, profile="2:100", total_steps=101)
    assert steps_in(events(tmp_path / "logs")) == [2, 3, 4]


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["model", "block"])
def test_profiling_compiles_nothing_again(tmp_path, scope):
    run_tiny(tmp_path, compile=True, compile_scope=scope, profile="2:5")
    (summary,) = metrics(tmp_path, "summary")
    assert summary["recompiles"] == 0
    assert steps_in(events(tmp_path / "logs")) == [2, 3, 4]
