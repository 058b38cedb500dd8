"""What the ranks of test_training.py and test_failures.py run: the trainer, and what it is told to
record or to suffer.

A plan is a dictionary, handed over as JSON in front of the trainer's flags:
    {"hide_labels": True}           some labels are -100; which, follows from where a window begins
    {"record": True}                samples-{rank}.json: [first sample, labels that count] of each
                                    micro-batch
    {"calibration": 0.3}            seconds that steps are measured for, in place of six
    {"rank": 1, "step": 5, "what": "label"}   a fault, see FAULTS, in torchrun's first attempt
    {"faults": [{...}, {...}]}                one in each attempt
"""

import functools
import json
import os
import resource
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from training_runs import flags, tiny_flags

WINDOWS = 12  # in a step of every run, whatever its world
TOKENS = WINDOWS * 32


def run(size: int, directory: Path, target: str, plan: dict | None = None, **settings) -> list:
    """The results of `size` ranks that train into directory/target; all must end well."""
    settings.setdefault("batch_size", WINDOWS // size)
    argv = [json.dumps(plan or {}), *tiny_flags(target_dir=target, **settings)]
    return succeeded(run_ranks(size, argv, directory, call="rank_programs:train", timeout=200))


def resume(size: int, directory: Path, target: str, plan: dict | None = None, **settings) -> list:
    """The results of `size` ranks that go on with what is in directory/target."""
    argv = [json.dumps(plan or {}), "--resume", target, *flags(device="cpu", **settings)]
    return succeeded(run_ranks(size, argv, directory, call="rank_programs:train", timeout=200))


def succeeded(results: list) -> list:
    assert [r.returncode for r in results] == [0] * len(results), "\n".join(
        r.output for r in results
    )
    return results


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def attempt() -> int:
    """0, or how often torchrun has started the ranks anew."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def train(argv: list[str]) -> int:
    """The command, under the plan in argv[0]. It draws no curve, which takes longer than a run."""
    from fastlm.run.plot import LivePlotter
    from fastlm.train import main

    LivePlotter.save = lambda self, path: None
    plan = json.loads(argv[0])
    seen = record() if plan.get("record") else []
    install(plan)
    code = main(argv[1:])
    if seen:
        Path(f"samples-{rank()}.json").write_text(json.dumps(seen))
    return code


def install(plan: dict[str, Any]) -> None:
    if plan.get("hide_labels"):
        hide_labels()
    if seconds := plan.get("calibration"):
        from fastlm.step import TrainStep

        measured = functools.partialmethod(TrainStep.seconds_per_step, seconds=seconds)
        TrainStep.seconds_per_step = measured
    faults = plan.get("faults", [plan] if "what" in plan else [])
    if attempt() < len(faults) and rank() == faults[attempt()]["rank"]:
        FAULTS[faults[attempt()]["what"]](faults[attempt()])


def hide_labels() -> None:
    """Of most windows the first labels are ignored; of some, all."""
    from fastlm.data.dataset import TokenDataset

    gather = TokenDataset.gather

    def hiding(self, starts, context_len, device):
        x, y = gather(self, starts, context_len, device)
        for row, start in enumerate(starts):
            y[row, : int(start) * 7 % (context_len + 8)] = -100
        return x, y

    TokenDataset.gather = hiding


def record() -> list[tuple[int, int]]:
    """Where [first sample, labels that count] of each micro-batch of the run itself will stand."""
    from fastlm.data.step_loader import StepLoader
    from fastlm.run.directory import RunDirectory

    seen: list[tuple[int, int]] = []
    batches, begin = StepLoader.batches, RunDirectory.begin

    def recording(self, firsts, following):
        found = batches(self, firsts, following)
        for first, (_, y) in zip(firsts, found, strict=True):
            seen.append((first, int((y != -100).sum())))
        return found

    def beginning(self):
        begin(self)
        seen.clear()

    StepLoader.batches, RunDirectory.begin = recording, beginning
    return seen


def train_own(argv: list[str]) -> int:
    """train_loop of a caller's own model. argv[0]: "Plain" or "Fused"; argv[1]: settings."""
    import own_models
    from in_process import TRAIN, VAL
    from training_runs import tiny_config

    from fastlm import train_loop

    torch.manual_seed(0)
    settings = json.loads(argv[1])
    train_loop(TRAIN, VAL, tiny_config(**settings), model=getattr(own_models, argv[0])())
    return 0


def train_unlike(argv: list[str]) -> int:
    """train_loop with a setting that differs from rank to rank."""
    from in_process import TRAIN, VAL
    from training_runs import tiny_config

    from fastlm import train_loop
    from fastlm.errors import run_command

    cfg = tiny_config("unlike", total_steps=12 + rank(), cosine_iters=12)
    return run_command(lambda: train_loop(TRAIN, VAL, cfg))


# Faults


def _in_step(step: int, action) -> None:
    """action(x, y) in the last micro-batch of `step`, once the run has begun."""
    from fastlm.loop import Run
    from fastlm.step import TrainStep

    run, begin = TrainStep.run, Run.train
    state = {"begun": False, "calls": 0}

    def training(self):
        state["begun"], state["calls"] = True, self.start_step
        begin(self)

    def running(self, *arguments, **options):
        if not state["begun"]:
            return run(self, *arguments, **options)
        at, state["calls"] = state["calls"], state["calls"] + 1
        batches = self.step_loader.batches

        def bad_batches(firsts, following):
            *others, (x, y) = batches(firsts, following)
            return [*others, action(x, y) or (x, y)]

        if at == step:
            self.step_loader.batches = bad_batches
        try:
            return run(self, *arguments, **options)
        finally:
            self.step_loader.__dict__.pop("batches", None)

    TrainStep.run, Run.train = running, training


def _label(plan):
    def action(x, y):
        y[0, 0] = 1000

    _in_step(plan["step"], action)


def _signal(plan):
    number = getattr(signal, plan["signal"])
    _in_step(plan["step"], lambda x, y: os.kill(os.getpid(), number))


def _signal_before(plan):
    """Before the first step: while the ranks warm up."""
    from fastlm.step import TrainStep

    warm_up, number = TrainStep.warm_up, getattr(signal, plan["signal"])

    def signalled(self):
        warm_up(self)
        os.kill(os.getpid(), number)

    TrainStep.warm_up = signalled


def _kill_in_forward(plan):
    """After some collectives of the step, before the others."""
    from fastlm.model_loss import ModelLoss

    def action(x, y):
        ModelLoss.forward = lambda *arguments, **options: _die()

    _in_step(plan["step"], action)


def _operation(plan):
    """SIGKILL inside an operation on a file: see killed_runs.Operations."""
    import killed_runs

    killed_runs.kill = _die
    killed_runs.Operations(plan["kind"], plan["number"]).install()


def _kill_at_any_moment(plan):
    timer = threading.Timer(plan["seconds"], _die)
    timer.daemon = True
    timer.start()


def _die() -> None:
    Path(f"killed-{attempt()}").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def _nan(plan):
    """The loss of this rank is NaN, in `steps` steps from `step` on."""
    from fastlm.model_loss import ModelLoss
    from fastlm.step import TrainStep

    forward, run = ModelLoss.forward, TrainStep.run
    first, last = plan["step"], plan["step"] + plan.get("steps", 1)
    state = {"bad": False}

    def running(self, first_sample, *arguments, **options):
        begun = bool(self.optimizer.state) or first_sample > 0
        state["bad"] = begun and first <= first_sample // self.samples < last
        return run(self, first_sample, *arguments, **options)

    def maybe_nan(self, *arguments, **options):
        loss = forward(self, *arguments, **options)
        return loss * float("nan") if state["bad"] and torch.is_grad_enabled() else loss

    TrainStep.run, ModelLoss.forward = running, maybe_nan


def _full_disk(plan):
    """No file may grow beyond `bytes`: EFBIG, as a full disk gives ENOSPC."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (plan["bytes"], plan["bytes"]))


def _no_scan(plan):
    """Data that this rank must not read in whole."""
    import fastlm.train

    def refused(*arguments, **options):
        raise AssertionError(f"rank {rank()} checks the data")

    fastlm.train.check_dataset = refused


def _elsewhere(plan):
    """Files are looked for where there are none."""
    Path("elsewhere").mkdir(exist_ok=True)
    os.chdir("elsewhere")


FAULTS = {
    "label": _label,
    "signal": _signal,
    "signal before": _signal_before,
    "kill": _kill_in_forward,
    "kill at": _kill_at_any_moment,
    "operation": _operation,
    "nan": _nan,
    "full disk": _full_disk,
    "elsewhere": _elsewhere,
    "no scan": _no_scan,
}


if __name__ == "__main__":  # what torchrun starts
    sys.exit(train(sys.argv[1:]))
