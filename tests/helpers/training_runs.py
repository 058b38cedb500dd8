"""Tiny runs for the tests: token files, settings, and commands in processes that start quickly.

Importing torch takes seconds, so a command's process is forked from a server that has imported
everything: `commands()` starts fastlm.train's main in a directory of its own, with its own
environment, user, limits and signals, and tells exit code, stdout and stderr. As a program this
module is that server: it reads requests, one JSON object a line, and answers likewise.
"""

import atexit
import functools
import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

VOCAB_SIZE = 64
# A step of this model takes a millisecond or two.
TINY = dict(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    num_heads=2,
    num_layers=2,
    context_len=32,
    batch_size=4,
    total_steps=12,
    warmup_iters=2,
    log_every=1,
    eval_every=0,
    eval_batches=2,
    ckpt_every=0,
    dtype="float32",
    device="cpu",
)
NOBODY = 65534


def tiny_config(target_dir, **settings):
    """TrainingConfig of a tiny run whose schedule ends with it."""
    from fastlm.config import TrainingConfig

    settings = {**TINY, **settings}
    settings.setdefault("cosine_iters", settings["total_steps"])
    return TrainingConfig(target_dir=str(target_dir), **settings)


def flags(**settings) -> list[str]:
    """Command-line flags: a_b=1 is --a-b 1, True is the bare flag, None leaves one out."""
    result = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            result.append(flag)
        elif isinstance(value, list | tuple):
            result += [flag, *map(str, value)]
        elif value is not None:
            result += [flag, str(value)]
    return result


def tiny_flags(**settings) -> list[str]:
    """The flags of a tiny run on the files of write_tokens, into run/."""
    files = {"data": "train.npy", "val_data": "val.npy", "target_dir": "run"}
    return flags(**{**TINY, **files, **settings})


def tokens(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """(count,) uint16 ids that a model can learn: mostly, a token follows from the one before."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, vocab_size, count)
    ids = np.empty(count, dtype=np.uint16)
    ids[0] = 0
    for i in range(1, count):
        ids[i] = (5 * int(ids[i - 1]) + 3) % vocab_size if i % 4 else noise[i]
    return ids


def write_tokens(directory: Path, train: int = 4000, val: int = 500) -> None:
    """train.npy and val.npy."""
    np.save(directory / "train.npy", tokens(train))
    np.save(directory / "val.npy", tokens(val, seed=1))


def write_prepared(directory: Path) -> Path:
    """A prepared directory: a tokenizer, token files and their manifest."""
    from fastlm.data.manifest import Manifest, Shard, Split
    from fastlm.data.tokenizer import train_tokenizer

    directory.mkdir(parents=True)
    texts = {
        "train": "def f(x):\n    return x + 1\n\n" * 100,
        "val": "def g(y):\n    return y + 2\n\n" * 8,
    }
    tokenizer = train_tokenizer([texts["train"]], 270)
    tokenizer.save(str(directory / "tokenizer.json"))
    splits = {}
    for name, text in texts.items():
        ids = np.array([*tokenizer.encode(text).ids, 0], dtype="<u2")
        ids.tofile(directory / f"{name}_00000.bin")
        shard = Shard(f"{name}_00000.bin", len(ids), "")
        splits[name] = Split(len(ids), len(text.encode()), 1, [shard])
    manifest = Manifest(
        vocab_size=tokenizer.get_vocab_size(),
        dtype="uint16",
        splits=splits,
        tokenizer="tokenizer.json",
        end_of_text=0,
        fingerprint="f" * 64,
    )
    manifest.save(directory)
    return directory


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every path below `directory`, and what the files hold."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def metrics(target_dir: Path, event: str) -> list[dict]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (Path(target_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def losses(target_dir: Path) -> dict[int, float]:
    """step -> training loss; of a step that ran twice, the last one."""
    return {row["step"]: row["loss"] for row in metrics(target_dir, "train")}


def same(a, b) -> bool:
    """Are two nested structures of tensors and plain values equal, bit for bit?"""
    import torch

    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(checkpoint: Path) -> dict:
    """What training goes on from: all of a checkpoint that does not tell how the run was asked."""
    import torch

    payload = torch.load(checkpoint, weights_only=True)
    return {
        name: payload[name]
        for name in ("model_state", "optimizer_state", "iteration", "scaler", "random_state")
    }


@dataclass
class Result:
    returncode: int  # negative: the signal that ended it, as in subprocess
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


@dataclass
class Command:
    """A command that the server has started."""

    server: "CommandServer"
    pid: int
    files: tuple[Path, Path]

    def wait(self, timeout: float = 120) -> Result:
        """Its result, once it has ended; one that takes longer is killed."""
        code = self.server.ask({"wait": self.pid, "timeout": timeout})["code"]
        assert code is not None, f"still running after {timeout} s:\n{self._text(0)}{self._text(1)}"
        return Result(code, self._text(0), self._text(1))

    def until(self, pattern: str, timeout: float = 60) -> None:
        """Waits until stdout or stderr matches `pattern`."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self._text(0) + self._text(1)):
            assert time.monotonic() < deadline, f"no {pattern!r} in {timeout} s"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _text(self, index: int) -> str:
        return self.files[index].read_text()


class CommandServer:
    """Starts commands by forking a process that has the imports behind it."""

    def __init__(self):
        self._logs = tempfile.TemporaryDirectory()
        self._count = 0
        # One thread: OpenMP must not have run before a fork, and tiny matrices gain nothing.
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
        )

    def run(self, argv: list[str], cwd: Path, *, timeout: float = 120, **options) -> Result:
        """The result of `python -m fastlm.train argv...`; options: those of start."""
        return self.start(argv, cwd, **options).wait(timeout)

    def start(
        self,
        argv: list[str],
        cwd: Path,
        *,
        call: str = "fastlm.train:main",  # module:function, called with argv
        env: dict[str, str] | None = None,
        limits: dict[str, int] | None = None,  # RLIMIT_{name}
        uid: int | None = None,
        ceiling: bool = False,  # measure the matmul ceiling, which takes more than a second
    ) -> Command:
        logs = Path(self._logs.name)
        self._count += 1
        files = (logs / f"{self._count}.out", logs / f"{self._count}.err")
        for file in files:
            file.touch(0o600)
        request = dict(
            argv=argv, cwd=str(cwd), call=call, env=env or {}, limits=limits or {}, uid=uid,
            ceiling=ceiling, files=[str(file) for file in files],
        )  # fmt: skip
        return Command(self, self.ask(request)["pid"], files)

    def ask(self, request: dict) -> dict:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the command server has died"
        return json.loads(answer)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._logs.cleanup()


@functools.cache
def commands() -> CommandServer:
    """The server, one for all tests."""
    server = CommandServer()
    atexit.register(server.close)
    return server


def save_forever(argv: list[str]) -> None:
    """In a process of its own: overwrites one checkpoint again and again, until it is killed."""
    import torch

    from fastlm import AdamW, save_checkpoint

    model = torch.nn.Linear(256, 1024)
    optimizer = AdamW(model.parameters())
    model(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    iteration = 0
    while True:
        iteration += 1
        with torch.no_grad():
            model.weight.fill_(iteration)
        save_checkpoint(model, optimizer, iteration, argv[0])
        print(iteration, flush=True)


def save_once(argv: list[str]) -> None:
    """In a process of its own: saves, and tells how that failed."""
    import torch

    from fastlm import save_checkpoint

    try:
        save_checkpoint(torch.nn.Linear(256, 256), None, 8, argv[0])
    except OSError as error:
        print(type(error).__name__, error)


def train_and_tell_curve(argv: list[str]) -> int:
    """In a process of its own: trains, and tells the steps of the curve that is saved."""
    from fastlm.plot import LivePlotter
    from fastlm.train import main

    told = []
    LivePlotter.save = lambda self, path: told.append(
        f"train {self.train_steps}\nval {self.eval_steps}"
    )
    code = main(argv)
    print(*told, sep="\n")
    return code


def tell_peak_memory(argv: list[str]) -> None:
    """In a process of its own: the peak before and after 200 MiB are used."""
    import torch

    from fastlm.hardware import peak_memory_bytes

    cpu = torch.device("cpu")
    # What the fork inherited must not hide it: use what is there first.
    print(peak_memory_bytes(cpu))
    torch.ones(200 << 18)
    print(peak_memory_bytes(cpu))


def train_slowly_from_3(argv: list[str]) -> int:
    """In a process of its own: a run whose step 3 takes a minute."""
    from fastlm.step import TrainStep
    from fastlm.train import main

    run = TrainStep.run

    def slow(self, step, lr):
        if step == 3:
            time.sleep(60)
        return run(self, step, lr)

    TrainStep.run = slow
    return main(argv)


def _serve() -> None:
    for module in (
        "fastlm.train", "fastlm.generate", "fastlm.cli", "fastlm.prepare", "tyro", "tokenizers",
        "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "numpy.random",
        "tomllib" if sys.version_info >= (3, 11) else "tomli",
    ):  # fmt: skip
        importlib.import_module(module)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": _wait(request["wait"], request["timeout"])}
            running.discard(request["wait"])
        else:
            pid = os.fork()
            if pid == 0:
                _become(request)
            running.add(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def _wait(pid: int, timeout: float) -> int | None:
    deadline = time.monotonic() + timeout
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.002)


def _become(request: dict) -> None:
    """The forked child: sets itself up, calls the function and ends with what it returns."""
    for name, descriptor in zip(request["files"], (1, 2), strict=True):
        handle = os.open(name, os.O_WRONLY)
        os.dup2(handle, descriptor)
        os.close(handle)
    # A shell's background jobs ignore SIGINT, and hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        module, name = request["call"].split(":")
        function = getattr(importlib.import_module(module), name)
        if not request["ceiling"]:
            importlib.import_module("fastlm.summary").matmul_ceiling = lambda *_: 1e12
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        for name, value in request["limits"].items():
            number = getattr(resource, f"RLIMIT_{name.upper()}")
            resource.setrlimit(number, (value, value))
        if request["uid"] is not None:
            os.setgroups([])
            os.setgid(request["uid"])
            os.setuid(request["uid"])
        code = function(request["argv"]) or 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
