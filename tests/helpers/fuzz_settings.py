"""Hostile settings: stored in checkpoints, in TOML files, on the command line.

Each case is a start of the trainer with one or two values changed into what nobody writes. It must
end well (the training itself is left out), or as a user's mistake does: exit code 2 and one line.
As a program: python tests/helpers/fuzz_settings.py CASES SEED, in a directory that it may fill.
"""

import contextlib
import copy
import dataclasses
import io
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from training_runs import tiny_flags, write_tokens

MEMORY = 12 << 30  # bytes of address space: a size that passes the checks fails at once
SECONDS = 30  # a case may take

NUMBERS = [-1, 0, 1, 2, 7, 2**31, 2**63 - 1, 2**63, 2**64, 10**19, 10**30, 0.5, -0.5, 1e308]
NUMBERS += [float("nan"), float("inf"), float("-inf"), True, 10**600]
TEXTS = ["", "x", "-", "../../evil/x", "a/b", "a\\b", "..", "a\0b", "\ud800", "é", "x" * 5000]
SHAPES = [None, [], (), {}, [1], ["x"], [[[]]], {"a": 1}, (0.5, "x"), b"x", (0.9, 0.99, 0.9)]
# In TOML's own spelling.
TOML = [
    *("1", "-1", "0.5", "1e999", "inf", "nan", "9" * 30, "9" * 5000, "0x" + "f" * 5000, "true"),
    *('"x"', '""', '"a/b"', '"\\u0000"', '"\\ud800"', "[]", '["x"]', "[1, 2]", "[[[]]]", "{a = 1}"),
    *("[" * 5000 + "]" * 5000, "{a=" * 3000 + "1" + "}" * 3000, "1979-05-27", '"""', "", "= 3"),
]
PLACES = ("target_dir", "ckpt_dir", "log_dir")  # where a person may write is his to say


def main(argv: list[str]) -> int:
    """argv: [cases, seed]. Prints what went wrong; the exit code tells whether anything did."""
    cases, seed = map(int, argv)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    rng = random.Random(seed)
    root = Path("inside")
    root.mkdir()
    before = set(Path().iterdir())
    with _inside(root):
        whole = _prepare()
        names = {path.name for path in Path().iterdir()}
        failures = refused = 0
        for number in range(cases):
            kind, case = CASES[number % len(CASES)](rng, whole)
            code, problem = _ending(case, kind)
            refused += code == 2
            if problem:
                failures += 1
                print(f"case {number} of seed {seed}, {kind}: {_short(case)}\n{problem}\n")
            for path in Path().iterdir():
                if path.name not in names and path.name not in ("bad.pt", "bad.toml"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if outside := set(Path().iterdir()) - before:
        failures += 1
        print("written outside the run:", *outside)
    print(f"{cases} cases, seed {seed}: {refused} refused, {failures} failures")
    return int(failures > 0)


@contextlib.contextmanager
def _inside(path: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 lacks."""
    before = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(before)


def _prepare() -> dict:
    """Tokens, and a checkpoint of two steps. From now on runs end before their first step."""
    from fastlm.loop import Run
    from fastlm.step import TrainStep
    from fastlm.train import main as train

    write_tokens(Path())
    with contextlib.redirect_stdout(io.StringIO()):
        assert train(tiny_flags(total_steps=2, num_layers=1, target_dir="good")) == 0
    Run.train = TrainStep.warm_up = lambda self: None
    TrainStep.seconds_per_step = lambda self, **options: 0.01
    return torch.load("good/checkpoints/checkpoint_final.pt", weights_only=True)


def _checkpoint(rng: random.Random, whole: dict) -> tuple[str, list[str]]:
    payload = copy.deepcopy(whole)
    group = payload["optimizer_state"]["param_groups"][0]
    parts = [payload, payload["config"], payload["config"], payload["clock"], group]
    parts += [payload["optimizer_state"], payload["environment"]]
    parts += [payload["optimizer_state"]["state"], payload["optimizer_state"]["state"][0]]
    tensors = [torch.tensor(1), torch.tensor([0, 0]), torch.zeros(3, 3), torch.zeros(0)]
    for _ in range(rng.choice((1, 1, 2))):
        part = rng.choice(parts)
        value = rng.choice([*NUMBERS, *TEXTS, *SHAPES, *tensors])
        part[rng.choice(list(part))] = value
    torch.save(payload, "bad.pt")
    extra = rng.choice(([], [], ["--total-steps", "5"], ["--eval-only"], ["--allow-data-change"]))
    return "checkpoint", ["--resume", "bad.pt", "--device", "cpu", "--target-dir", "out", *extra]


def _toml(rng: random.Random, whole: dict) -> tuple[str, list[str]]:
    from fastlm.config import TrainingConfig
    from fastlm.run.settings import to_toml

    config = {k: v for k, v in whole["config"].items() if v is not None and k not in PLACES}
    lines = [f"{name} = {to_toml(value)}" for name, value in config.items()]
    names = [f.name for f in dataclasses.fields(TrainingConfig) if f.name not in PLACES]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*names, "preset", "x"])
        lines = [line for line in lines if not line.startswith(f"{name} =")]
        lines.insert(rng.randrange(len(lines) + 1), f"{name} = {rng.choice(TOML)}")
    content = bytearray("\n".join(lines).encode())
    if rng.random() < 0.2:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    Path("bad.toml").write_bytes(content)
    return "TOML", ["--config", "bad.toml", "--device", "cpu", "--target-dir", "out"]


def _flags(rng: random.Random, whole: dict) -> tuple[str, list[str]]:
    from fastlm.config import TrainingConfig

    argv = tiny_flags(num_layers=1, target_dir="out")
    argv += rng.choice(([], ["--resume", "good"], ["--resume", "good", "--total-steps", "2"]))
    names = [f.name for f in dataclasses.fields(TrainingConfig)]
    texts = [*TEXTS, "nan", "inf", "1e400", "10**19", "9" * 30, "9" * 5000, "-1", "0", "1"]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice([*names, "resume", "config", "preset"])
        text = rng.choice([t for t in texts if ".." not in t or name not in PLACES])
        argv += [f"--{name.replace('_', '-')}", text]
    return "flags", argv


CASES = (_checkpoint, _toml, _flags)


def _ending(argv: list[str], kind: str) -> tuple[int | None, str | None]:
    """(exit code of `fastlm.train argv`, what is wrong with it or None)."""
    from fastlm.train import main as train

    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("always")
            for noise in (ResourceWarning, DeprecationWarning):  # a log left open; torch's own
                warnings.simplefilter("ignore", noise)
            code = train(argv)
    except SystemExit as error:
        # tyro's own refusal of a flag has several lines.
        fine = kind == "flags" and error.code == 2
        return error.code, None if fine else f"exit {error.code}: {err.getvalue()[-2000:]}"
    except BaseException:
        return None, traceback.format_exc()[-3000:]
    finally:
        signal.alarm(0)
    text = err.getvalue()
    one_line = text.startswith("error: ") and text.count("\n") == 1
    if (code == 0 and not text) or (code == 2 and one_line):
        return code, None
    return code, f"exit {code}: {text[-2000:]}"


def _too_long(number, frame):
    raise TimeoutError(f"longer than {SECONDS} s")


def _short(argv: list[str]) -> str:
    if "bad.toml" in argv:
        argv = [*argv, Path("bad.toml").read_text(errors="replace")[:3000]]
    return " ".join(ascii(token)[:200] for token in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
