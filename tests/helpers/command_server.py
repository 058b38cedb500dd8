"""Commands in processes that start quickly.

Importing torch takes seconds, so a command's process is forked from a server that has imported
everything: `commands()` starts fastlm.train's main in a directory of its own, with its own
environment, user, limits and signals, and tells exit code, stdout and stderr. As a program this
module is that server: it reads requests, one JSON object a line, and answers likewise.
"""

import atexit
import functools
import gc
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOBODY = 65534
# What torch 2.10 writes to stdout when ranks are connected.
_GLOO = re.compile(r"^\[Gloo\] Rank \d+ is connected to .*\n", re.MULTILINE)


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
        self.until_true(
            lambda: re.search(pattern, self._text(0) + self._text(1)), repr(pattern), timeout
        )

    def until_true(
        self, condition: Callable[[], Any], what: str = "it", timeout: float = 60
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, f"no {what} in {timeout} s"
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _text(self, index: int) -> str:
        return _GLOO.sub("", self.files[index].read_text(errors="surrogateescape"))


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
        extras: bool = False,  # the matmul ceiling, the loss curve, huge pages: 1.5 s
    ) -> Command:
        logs = Path(self._logs.name)
        self._count += 1
        files = (logs / f"{self._count}.out", logs / f"{self._count}.err")
        for file in files:
            file.touch(0o600)
        request = dict(
            argv=argv, cwd=str(cwd), call=call, env=env or {}, limits=limits or {}, uid=uid,
            extras=extras, files=[str(file) for file in files],
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


def _serve() -> None:
    for module in (
        "fastlm.train", "fastlm.generate", "fastlm.run.cli", "fastlm.prepare", "tyro", "tokenizers",
        "torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "numpy.random",
        "torch.distributed.fsdp", "torch.distributed.tensor", "fastlm.parallel.sharded",
        "safetensors.torch", "fastlm.ops.cross_entropy_cpp", "fastlm.ops.optimizer_cpp",
        "fastlm._C", "tomllib" if sys.version_info >= (3, 11) else "tomli",
    ):  # fmt: skip
        importlib.import_module(module)
    importlib.import_module("fastlm.run.cli").parse([])  # what tyro imports when it is used
    # A child's collector would write to every object, and so copy the pages that it shares.
    gc.collect()
    gc.freeze()
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
    # A shell's background jobs ignore SIGINT, those of nohup SIGHUP, and hand that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    code = 1
    try:
        module, name = request["call"].split(":")
        function = getattr(importlib.import_module(module), name)
        if not request["extras"]:
            importlib.import_module("fastlm.run.summary").matmul_ceiling = lambda *_: 1e12
            plotter = importlib.import_module("fastlm.run.plot").LivePlotter
            plotter.save = lambda self, path: None
            # Of a fork the heap is its parent's, which would be copied.
            importlib.import_module("fastlm.train").back_heap_with_huge_pages = lambda: None
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
