"""Ranks of torch.distributed that start quickly: forks of a process that has imported torch."""

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch._dynamo  # noqa: F401 - which FSDP2 would import in every rank
import torch.distributed as dist

import fastlm.parallel.sharded  # noqa: F401 - nor this
from fastlm.extension import extension

extension()


def run_ranks(world_size: int, function: Callable[[], object], timeout: float = 60) -> list[int]:
    """Runs `function` in `world_size` processes that form a gloo group; their exit codes.

    Negative: a signal. A process that takes longer than `timeout` seconds is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    gc.freeze()  # a collection in a child would copy the pages that it shares
    children = []
    for rank in range(world_size):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            _become(rank, world_size, port, function)
        children.append(pid)
    return wait_for(children, timeout)


def wait_for(children: list[int], timeout: float) -> list[int]:
    deadline = time.monotonic() + timeout
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for pid in [pid for pid in children if pid not in codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in children]


def _become(rank: int, world_size: int, port: int, function: Callable[[], object]) -> None:
    code = 1
    try:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        )  # fmt: skip
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))
        function()
        code = 0
    except BaseException:
        # In one write: the ranks share a pipe.
        print(f"on rank {rank}:\n{traceback.format_exc()}", end="", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)
