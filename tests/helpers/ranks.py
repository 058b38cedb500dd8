"""Starts the ranks of a distributed run without torchrun, whose start takes seconds.

The store is kept here, as torchrun's agent keeps it: it outlives every rank.
"""

import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from command_server import Command, Result, commands
from torch.distributed import TCPStore


@dataclass
class Ranks:
    """The ranks' commands, by rank."""

    commands: list[Command]
    store: TCPStore

    def wait(self, timeout: float = 60) -> list[Result]:
        """Their results; `timeout` is for each."""
        return [command.wait(timeout) for command in self.commands]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def new_store() -> TCPStore:
    # With no time to wait: nobody waits for keys here, and the server does not use it.
    return TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=60))


def start_ranks(
    size: int,
    argv: list[str],
    cwd: Path,
    *,
    env: dict[str, str] | None = None,
    own_store: bool = False,
    store: TCPStore | None = None,
    **options: Any,
) -> Ranks:
    """Starts `size` processes with torchrun's environment; options: those of CommandServer.start.

    env: for all ranks, on top of that; "{rank}" in a value is replaced by the rank. own_store:
    rank 0 keeps the store, as without torchrun. store: that of ranks before, as in a restart.
    """
    store = store or new_store()
    port = free_port() if own_store else store.port
    started = []
    for rank in range(size):
        of_rank = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": str(not own_store),
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_MAX_RESTARTS": "0",
        }
        of_rank |= {name: value.format(rank=rank) for name, value in (env or {}).items()}
        started.append(commands().start(argv, cwd, env=of_rank, **options))
    return Ranks(started, store)


def run_ranks(size: int, argv: list[str], cwd: Path, *, timeout: float = 60, **options) -> list:
    """The results of start_ranks."""
    return start_ranks(size, argv, cwd, **options).wait(timeout)
