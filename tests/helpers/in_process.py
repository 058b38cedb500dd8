"""Tiny runs in the test's own process, for the tests of the trainer."""

import re
from pathlib import Path

from training_runs import tiny_config, tokens

from fastlm import (
    train_loop,
)

TRAIN, VAL = tokens(4000), tokens(500, seed=1)

CTIME = r"\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}"
NUMBER = r"\d+\.\d{4}"
LINES = {
    "start": rf"=== Training started at {CTIME} ===",
    "step": rf"\[\d\d:\d\d:\d\d\] step (\d{{6}}) loss {NUMBER} lr \d\.\d\de[-+]\d\d "
    r"grad_norm \d+\.\d\d",
    "val": rf"\[VAL\] step (\d{{6}}) val_loss {NUMBER}",
    "checkpoint": r"\[CKPT\] Saved to .*checkpoint_(\w+)\.pt",
    "finish": rf"=== Training finished at {CTIME} ===",
}


def run_tiny(target_dir, train_data=TRAIN, **settings):
    """A tiny run in this process; returns its configuration."""
    cfg = tiny_config(target_dir, **settings)
    train_loop(train_data, VAL, cfg)
    return cfg


def checkpoint(target_dir, name="final") -> Path:
    return Path(target_dir) / "checkpoints" / f"checkpoint_{name}.pt"


def log_events(target_dir) -> list[tuple]:
    """The log as (kind, step or checkpoint's name); a line of another form is an error."""
    events = []
    for line in (Path(target_dir) / "logs" / "train.log").read_text("utf-8").splitlines():
        kinds = [(kind, re.fullmatch(form, line)) for kind, form in LINES.items()]
        ((kind, match),) = [(kind, match) for kind, match in kinds if match]
        groups = match.groups()
        events.append((kind, *(int(g) if kind in ("step", "val") else g for g in groups)))
    return events


def apart(events: list[tuple]) -> tuple[list[tuple], list[tuple]]:
    """(the checkpoints, the others): a save in the background is told when it is done."""
    saved = [event for event in events if event[0] == "checkpoint"]
    return saved, [event for event in events if event[0] != "checkpoint"]


def expected_events(total: int, log_every: int, eval_every: int, ckpt_every: int) -> list[tuple]:
    """The seeds' rules, their checkpoints named by the number of steps that they hold."""
    events = [("start",)]
    for step in range(total):
        last = step == total - 1
        if step % log_every == 0:
            events.append(("step", step))
        if last:
            events.append(("checkpoint", "final"))
        elif ckpt_every and (step + 1) % ckpt_every == 0:
            events.append(("checkpoint", str(step + 1)))
        if last or (eval_every and step % eval_every == 0 and step > 0):
            events.append(("val", step))
    return [*events, ("checkpoint", "model"), ("finish",)]
