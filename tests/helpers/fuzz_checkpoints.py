"""Hostile checkpoints: a whole one, in which values at random places are replaced by odd ones."""

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import torch
from checkpoints import everything, make_pair, train_step
from training_runs import same

from fastlm import CheckpointError, load_checkpoint
from fastlm.checkpoint import (
    checkpoint_payload,
    read_checkpoint,
    restore_scaler,
)
from fastlm.foreign_state import shape_of, shortened
from fastlm.run.environment import differences, environment
from fastlm.run.guard import Guard
from fastlm.run.resume import Resumed
from fastlm.run.summary import Clock

CPU = torch.device("cpu")
HERE = environment(CPU, torch.float32, compiled=False)


def fuzz(count: int, seed: int, directory: Path) -> int:
    """Loads `count` checkpoints of `seed` from files in `directory`; tells how many were refused.

    AssertionError, naming the case, if one raises anything but a CheckpointError of one short line,
    if one that is refused has changed something, or if one that is loaded cannot be trained on.
    """
    whole = _payload()
    model, optimizer = make_pair(steps=1)
    before = copy.deepcopy(everything(model, optimizer))
    refused = 0
    for case in range(count):
        rng = random.Random(f"{seed}/{case}")
        payload = copy.deepcopy(whole)
        path, told = directory / "fuzzed.pt", []
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # no optimizer state, and the like
                told += [_mutate(payload, rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
                torch.save(payload, path)
                if _restores(model, optimizer, path):
                    train_step(model, optimizer, 0)
                    model, optimizer = make_pair(steps=1)
                else:
                    refused += 1
                    assert same(everything(model, optimizer), before), "something has changed"
        except Exception as error:
            raise AssertionError(f"seed {seed}, case {case}: {told}: {error!r}") from error
    return refused


def _restores(model, optimizer, path: Path) -> bool:
    """False if the checkpoint is refused as it should be."""
    try:
        # What is refused last must not have changed anything either.
        payload = read_checkpoint(path)
        differences(Resumed.of(path, dict(payload), frozenset()).payload.get("environment"), HERE)
        Clock(CPU, 0.0, payload)
        if payload.get("guard") is not None:
            Guard("skip", CPU).load_state_dict(payload["guard"])
        restore_scaler(_scaler(), payload)
        step = load_checkpoint(model, optimizer, path)
    except CheckpointError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, error
        return False
    assert type(step) is int and step >= 0, step
    return True


def _scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", enabled=True)


def _payload() -> dict[str, Any]:
    """What the trainer stores, of a small model."""
    return checkpoint_payload(
        *make_pair(),
        2,
        samples_seen=8,
        scaler=_scaler().state_dict(),
        config={"betas": (0.9, 0.95), "data": ("a.bin",), "seed": 0, "lr_max": 3e-4},
        best_checkpoint={"val_loss": 3.0, "step": 1},
        run_id="0123456789abcdef",
        saved_at=1.0,
        data_fingerprint="0" * 64,
        sampler_version=2,
        fastlm_version="0.1.0",
        environment=dict(HERE),
        clock={"step_seconds": 1.0, "run_seconds": 2.0},
        guard=Guard("skip", CPU).state_dict(),
    )


def _mutate(payload: dict[str, Any], rng: random.Random) -> str:
    """Changes a value, or an entry, at a random place; tells which, and how."""
    container, place = payload, []
    while True:
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = rng.choice(keys) if keys else None
        place.append(key)
        inner = None if key is None else container[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.85:
            container = inner
            continue
        break
    where = "/".join(map(shortened, place))
    how = rng.choice(("replace",) * 6 + ("delete", "insert", "rename"))
    value = rng.choice(_ODD)(inner)
    if isinstance(container, list):
        if key is None or how == "insert":
            container.insert(rng.randrange(len(container) + 1), value)
        elif how == "delete":
            del container[key]
        else:
            container[key] = value
    elif key is None or how == "insert":
        container[rng.choice(_ODD_KEYS)] = value
    elif how == "delete":
        del container[key]
    elif how == "rename":
        container[rng.choice(_ODD_KEYS)] = container.pop(key)
    else:
        container[key] = value
    what = f"a {type(value).__name__}" if how in ("replace", "insert") else ""
    return f"{how} {where} {what}"


def _nested(depth: int) -> list:
    result: list = []
    for _ in range(depth):
        result = [result]
    return result


def _of(value: Any) -> torch.Tensor:
    plain = shape_of(value).startswith("(") and value.numel() < 1 << 20
    return value if plain and value.device.type == "cpu" else torch.ones(3)


_ODD_KEYS = (
    "x",
    "",
    "a\nb",
    5,
    -1,
    None,
    10**5000,
    (1, 2),
    "model",
    "optimizer",
    "\ud800",
    "é" * 999,
)
_ODD = [
    *(
        lambda _, value=value: value
        for value in (
            *(None, True, -1, 0, 7, 2**63, 2**64, -(10**30), 10**5000),
            *(0.5, -1.0, 1e308, float("nan"), float("inf")),
            *("", "x", "a\nb", "\ud800", "x" * 100_000, b"x", bytearray(b"x")),
            *([], {}, (), [None], [1, "x"], {"x": 1}, {1: None}, (1, 2), set()),
            *(torch.float16, torch.Size([2]), torch.device("cpu"), complex(1, 2)),
        )
    ),
    lambda _: _nested(50),
    lambda _: torch.tensor(5),
    lambda _: torch.tensor(float("nan")),
    lambda _: torch.tensor([0, 0]),
    lambda _: torch.zeros(0),
    lambda _: torch.zeros(5056, dtype=torch.uint8),
    lambda _: torch.zeros(1).expand(1 << 40),
    lambda value: torch.zeros(()).expand(_of(value).shape),
    lambda value: torch.empty(_of(value).shape, device="meta"),
    lambda value: _of(value).to_sparse(),
    lambda value: _of(value).to(torch.complex64),
    lambda value: _of(value).to(torch.float64),
    lambda value: _of(value).to(torch.bfloat16),
    lambda value: _of(value).to(torch.int64),
    lambda value: _of(value) > 0,
    lambda value: _of(value).unsqueeze(0),
    lambda value: _of(value).flatten()[:-1],
    lambda value: torch.nn.Parameter(_of(value).float()),
    lambda value: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    lambda value: torch.quantize_per_tensor(torch.ones(_of(value).shape), 0.1, 0, torch.qint8),
    lambda value: [value, value],
    lambda value: {"x": value},
]
