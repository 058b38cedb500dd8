"""Signals and errors in the middle of a run: what is saved goes on as if nothing had happened."""

import re
import signal

import pytest
import torch
from command_server import commands
from in_process import checkpoint, run_tiny
from training_runs import losses, metrics, same, state, tiny_flags, write_tokens

from fastlm import DataError
from fastlm.checkpoint import checkpoint_files
from fastlm.data.step_loader import StepLoader
from fastlm.evaluate import mean_loss
from fastlm.model_loss import ModelLoss
from fastlm.run.log import RunLog
from fastlm.run.signals import StopSignals
from fastlm.train import main

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras", "signals_as_in_a_terminal")

CODES = {"SIGTERM": 143, "SIGHUP": 129, "SIGUSR1": 0}
ACCUMULATED = dict(grad_accum=4, dropout=0.2, batch_size=2, total_steps=8)


def at_sample(monkeypatch, sample: int, action) -> None:
    """Calls `action` when the micro-batch from `sample` on is read, once it is training."""
    batches, done = StepLoader.batches, []

    def acting(self, firsts, following):
        if sample in firsts and not done:
            done.append(True)
            action()
        return batches(self, firsts, following)

    monkeypatch.setattr(StepLoader, "batches", acting)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    directory = tmp_path_factory.mktemp("straight")
    run_tiny(directory, eval_every=2, **ACCUMULATED)
    return directory


def assert_goes_on(target_dir, step, straight) -> None:
    path = checkpoint(target_dir, step)
    run_tiny(target_dir, ckpt_path_to_resume=str(path), eval_every=2, **ACCUMULATED)
    assert same(state(checkpoint(target_dir)), state(checkpoint(straight)))
    assert losses(target_dir) == losses(straight)
    rows = [
        [(row["step"], row["val_loss"]) for row in metrics(directory, "val")]
        for directory in (target_dir, straight)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", CODES)
def test_a_stop_drops_the_step_that_has_begun(tmp_path, monkeypatch, straight, name, capfd):
    """In the second of four micro-batches of step 3: it does not wait for the others."""
    calls, forward = [], ModelLoss.forward

    def counted(self, *args, **options):
        calls.append(True)
        if len(calls) == before + 3 * 4 + 2:
            signal.raise_signal(getattr(signal, name))
        return forward(self, *args, **options)

    before = 2 * 4 + 1 + 2  # the warm-up: two steps and a batch; an evaluation behind step 2
    monkeypatch.setattr(ModelLoss, "forward", counted)
    with pytest.raises(SystemExit) as stopped:
        run_tiny(tmp_path, eval_every=2, **ACCUMULATED)
    assert stopped.value.code == CODES[name]
    assert len(calls) == before + 3 * 4 + 2
    assert "stopping: a checkpoint follows" in capfd.readouterr().err
    payload = torch.load(checkpoint(tmp_path, 3), weights_only=True)
    assert (payload["iteration"], payload["samples_seen"]) == (3, 24)
    monkeypatch.undo()
    if name == "SIGTERM":  # what is saved does not depend on the signal
        assert_goes_on(tmp_path, 3, straight)


def test_a_stop_in_the_first_step_can_be_resumed(tmp_path, monkeypatch, straight):
    warm = []

    def later():  # the warm-up reads the first samples, too
        signal.raise_signal(signal.SIGUSR1)

    begin = RunLog.metrics

    def begun(self, event, **values):
        begin(self, event, **values)
        if event == "start" and not warm:
            warm.append(True)
            at_sample(monkeypatch, 2, later)

    monkeypatch.setattr(RunLog, "metrics", begun)
    with pytest.raises(SystemExit) as stopped:
        run_tiny(tmp_path, eval_every=2, **ACCUMULATED)
    assert stopped.value.code == 0
    monkeypatch.undo()
    assert_goes_on(tmp_path, 0, straight)


def test_a_stop_between_the_batches_of_an_evaluation(tmp_path, monkeypatch, straight):
    """The evaluation is the resumed run's; it is not done twice, and not left out."""
    summed, calls = ModelLoss.summed, []

    def stopping(self, x, y):
        calls.append(True)
        if len(calls) == 2:  # the first one was the warm-up's
            signal.raise_signal(signal.SIGTERM)
        return summed(self, x, y)

    monkeypatch.setattr(ModelLoss, "summed", stopping)
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, eval_every=2, **ACCUMULATED)
    assert len(calls) == 2 and metrics(tmp_path, "val") == []
    monkeypatch.undo()
    assert_goes_on(tmp_path, 3, straight)


def test_a_stop_in_the_last_evaluation_leaves_the_end_to_the_resumed_run(
    tmp_path, monkeypatch, straight
):
    def stopping(loss, data, *args, **options):
        signal.raise_signal(signal.SIGTERM)
        return mean_loss(loss, [(torch.zeros(1, 4, dtype=torch.long),) * 2]), 1

    monkeypatch.setattr("fastlm.run.finish.loss_over_sets", stopping)
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, eval_every=2, **ACCUMULATED)
    assert metrics(tmp_path, "summary") == []
    monkeypatch.undo()
    assert_goes_on(tmp_path, "final", straight)
    assert len(metrics(tmp_path, "summary")) == 1


def test_an_ignored_signal_stays_ignored(tmp_path, monkeypatch):
    """As nohup asks for."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_sample(monkeypatch, 4 * 5, lambda: signal.raise_signal(signal.SIGHUP))
        run_tiny(tmp_path)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(metrics(tmp_path, "summary")) == 1


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_signal_with_a_dead_terminal(tmp_path, stream):
    """SIGHUP comes when the terminal is gone: what is written there fails."""
    write_tokens(tmp_path)
    argv = [stream, "pipe", *tiny_flags(total_steps=100_000, log_every=5)]
    command = commands().start(argv, tmp_path, call="command_programs:train_onto")
    log = tmp_path / "run" / "logs" / "metrics.jsonl"
    command.until_true(lambda: log.exists() and '"step": 10,' in log.read_text())
    command.signal(signal.SIGHUP)
    result = command.wait()
    assert result.returncode == 129 and "Traceback" not in result.output, result.output
    (path,) = checkpoint_files(tmp_path / "run" / "checkpoints")
    assert torch.load(path, weights_only=True)["iteration"] > 10


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), DataError("a truncated file")])
def test_an_error_saves_what_there_is(tmp_path, monkeypatch, straight, error, capsys):
    def fail():
        raise error

    at_sample(monkeypatch, 5 * 8 + 4, fail)
    with pytest.raises(type(error), match=str(error)):
        run_tiny(tmp_path, eval_every=2, **ACCUMULATED)
    path = checkpoint(tmp_path, "emergency")
    said = capsys.readouterr().out
    assert f"[CKPT] Saved to {path}" in said
    # Not --resume: the command has not these arrays, or a caller's model.
    assert f"an error follows; ckpt_path_to_resume={str(path)!r} goes on from before it" in said
    assert checkpoint_files(path.parent) == []  # a bare --resume does not find it
    monkeypatch.undo()
    if isinstance(error, DataError):  # what is saved does not depend on the error
        assert_goes_on(tmp_path, "emergency", straight)


def test_the_first_error_is_the_one_that_is_raised(tmp_path, monkeypatch, capsys):
    def fail():
        monkeypatch.setattr("fastlm.loop.Run._payload", lambda *args, **options: 1 / 0)
        raise RuntimeError("the first")

    at_sample(monkeypatch, 4 * 3, fail)
    with pytest.raises(RuntimeError, match="the first"):
        run_tiny(tmp_path)
    assert "[CKPT] FAILED: the emergency checkpoint: division by zero" in capsys.readouterr().out


def test_an_error_before_a_step_is_done_saves_nothing(tmp_path, monkeypatch):
    def fail():
        raise RuntimeError("at once")

    monkeypatch.setattr("fastlm.loop.learning_rate", lambda step, cfg: fail())
    with pytest.raises(RuntimeError, match="at once"):
        run_tiny(tmp_path)
    assert list(checkpoint(tmp_path).parent.iterdir()) == []


def test_a_signal_during_a_save_does_not_write_it_again(tmp_path, monkeypatch):
    from fastlm.run import saver

    written, write = [], saver.write_checkpoint

    def noted(payload, path, **options):
        written.append(path.stem)
        write(payload, path, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(saver, "write_checkpoint", noted)
    with pytest.raises(SystemExit):
        run_tiny(tmp_path, ckpt_every=5, sync_save=True)
    assert written == ["checkpoint_5"]


@pytest.mark.parametrize("name, code", [("SIGINT", None), ("SIGUSR1", 1), ("SIGTERM", 143)])
def test_a_stop_when_nothing_can_be_saved(tmp_path, monkeypatch, capsys, name, code):
    """Without a checkpoint a stop is no success, and there is nothing to go on from."""
    from fastlm.run import saver

    def full(payload, path, **options):
        raise OSError(28, "No space left on device")

    write_tokens(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saver, "write_checkpoint", full)
    at_sample(monkeypatch, 5 * 4, lambda: signal.raise_signal(getattr(signal, name)))
    if code is None:
        assert main(tiny_flags(ckpt_every=3)) == 130
    else:
        with pytest.raises(SystemExit) as stopped:
            main(tiny_flags(ckpt_every=3))
        assert stopped.value.code == code
    said = capsys.readouterr().out
    stop = f"[train] stopped after 5 of 12 steps ({name}); there is no checkpoint to continue with"
    assert stop in said.splitlines() and "continue with:" not in said
    assert re.search(r"\[train\] missing: .*checkpoint_5\.pt", said)
    failed = [line for line in said.splitlines() if line.startswith("[CKPT] FAILED")]
    assert [line.endswith("; the run goes on") for line in failed] == [True, False]


def test_a_second_ctrl_c_in_somebody_elses_program_raises(tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_sample(monkeypatch, 5 * 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_command_leaves_a_second_ctrl_c_as_it_was():
    """Called from a program, main() must not make its later runs end the process."""
    assert main(["--print-config"]) == 0
    assert not StopSignals.is_command


def test_a_run_that_died_before_its_first_checkpoint_begins_anew(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "checkpoint", lambda *_: None)
        at_sample(patched, 5 * 4, lambda: 1 / 0)
        patched.setattr("fastlm.loop.Run._save_emergency", lambda self: None)
        with pytest.raises(ZeroDivisionError):
            run_tiny(tmp_path)
    assert losses(tmp_path).keys() == set(range(5))
    run_tiny(tmp_path)
    assert [row["step"] for row in metrics(tmp_path, "train")] == list(range(12))
    assert len(metrics(tmp_path, "start")) == 1
    assert (tmp_path / "logs" / "metrics.jsonl_abandoned").exists()
