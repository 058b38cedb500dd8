"""The processes that train together: who this one is, what all agree on, how all end.

torchrun starts them and tells each its rank. A process started without it is a world of its own:
size 1, no process group, and every function here is a plain call.

No rank may wait for one that will never come. A rank that fails writes that into the store, and
ends; gloo tells the others at once that a connection has closed, and `explain` tells them why.
"""

from __future__ import annotations  # torch may be built without distributed

import contextlib
import os
import pickle
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastlm.errors import ConfigError, Elsewhere, RankLostError, UserError, exit_code
from fastlm.hardware import select_device, use_all_cores

T = TypeVar("T")

# What rank 0 does alone (a corpus to tokenize, a model to write) may take longer than any
# collective. The wait still ends at once when rank 0 does: gloo sees the connection close.
PATIENCE = timedelta(days=2)
# In every message of gloo, NCCL or c10d about a peer that is gone or late.
BROKEN = ("/gloo/", "c10d", "NCCL", "ProcessGroup", "Operation timed out")


class Vote:
    """The elementwise maximum over the ranks of what each has voted; see World.vote."""

    def __init__(self, flags: Tensor, work: dist.Work | None):
        self._flags, self._work = flags, work

    def wait(self) -> list[int]:
        """The result, once every rank has voted. Raises RuntimeError if one of them is gone."""
        if self._work is not None:
            self._work.wait()
        return self._flags.tolist()


class World:
    """This process among those that train together. Use it as a context manager: an error inside
    is told to the other ranks, and replaced by Elsewhere where another rank has failed first.

    rank, size: this process's number and how many there are, over all machines.
    local_rank, local_size: the same on this machine.
    restarts, max_restarts: how often torchrun has started the ranks anew, and how often it may.
    device: this rank's, once it is connected; None in a world of one.
    """

    left_open = False  # has a process group of this process been left as it was?

    def __init__(self, environment: Mapping[str, str]):
        self.size = _number(environment, "WORLD_SIZE", 1)
        # With WORLD_SIZE the rest must be there; without it the process is alone.
        alone = self.size == 1
        self.rank = 0 if alone else _number(environment, "RANK")
        self.local_rank = 0 if alone else _number(environment, "LOCAL_RANK")
        self.local_size = _number(environment, "LOCAL_WORLD_SIZE", self.size)
        self.restarts = _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
        self.max_restarts = _number(environment, "TORCHELASTIC_MAX_RESTARTS", 0)
        self._by_torchrun = "TORCHELASTIC_RUN_ID" in environment
        self.device: torch.device | None = None
        self.cpu_group: dist.ProcessGroup | None = None  # of votes and small values
        self._patient: dist.ProcessGroup | None = None  # of decisions
        self._store: dist.Store | None = None
        self._minutes = 0.0  # a collective may take
        self._owns_group = self._failed = self._stopped = False

    @classmethod
    def start(cls, device: str = "auto", *, timeout_minutes: float = 10.0) -> World:
        """The world that torchrun's environment variables describe, or the process group that the
        program has made already; connected."""
        environment = dict(os.environ)
        if dist.is_available() and dist.is_initialized():
            environment["WORLD_SIZE"] = str(dist.get_world_size())
            environment["RANK"] = str(dist.get_rank())
        return cls(environment).connect(device, timeout_minutes=timeout_minutes)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_managed(self) -> bool:
        """Does torchrun, or what started several processes, pass signals on to this one?"""
        return self.size > 1 or self._by_torchrun

    def device_name(self, asked: str) -> str:
        """This rank's device: "auto" and "cuda" are cuda:LOCAL_RANK where there are GPUs, one for
        each process. In a world of one it is what was asked for."""
        if self.size == 1:
            return asked
        if str(asked).startswith("cuda:") and self.local_size > 1:
            raise ConfigError(
                f"device={str(asked)!r} with {self.local_size} processes on this machine: each "
                f"needs a GPU of its own; --device cuda takes cuda:LOCAL_RANK"
            )
        device = select_device(asked)
        if device.type == "mps":
            raise ConfigError("several processes train on CPUs or CUDA GPUs, not mps: --device cpu")
        if device.type != "cuda" or device.index is not None:
            return str(device)
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise ConfigError(
                f"{self.local_size} processes on a machine of {count} GPU(s): each needs its own; "
                f"start torchrun with --nproc-per-node {count}"
            )
        return f"cuda:{self.local_rank}"

    def connect(self, device: str = "auto", *, timeout_minutes: float = 10.0) -> World:
        """Makes the process groups, once all ranks are here; returns itself. Before that, only an
        error is shared (`explain`).

        device: as in select_device; gloo on CPUs, NCCL on CUDA. timeout_minutes: how long a
        collective may wait for the slowest rank. Raises ConfigError for a device that cannot be,
        UserError if the ranks do not find each other. A process group that the program has made
        already is used, and left alone at the end.
        """
        if self.size == 1:
            return self
        self.device = torch.device(self.device_name(device))
        self._minutes = timeout_minutes
        timeout = timedelta(minutes=timeout_minutes)
        self._owns_group = not dist.is_initialized()
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        if self._owns_group:
            if not on_cuda:
                use_all_cores(self.local_size)
            try:
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
                    store=self._fresh_store(timeout),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=timeout,
                    device_id=self.device if on_cuda else None,
                )
            except (RuntimeError, ValueError) as error:
                raise UserError(
                    f"rank {self.rank} of {self.size} finds no others at "
                    f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
                    f"{timeout_minutes:g} minutes: start all of them with torchrun, at the same "
                    f"time ({str(error).splitlines()[0][:200]})"
                ) from error
        self.cpu_group = self.new_cpu_group()
        self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        store = dist.distributed_c10d._get_default_store()
        # By the group's name: a program may use its own process group for one run after another.
        self._store = dist.PrefixStore(f"fastlm/{self.cpu_group.group_name}", store)
        return self

    def _fresh_store(self, timeout: timedelta) -> dist.Store:
        """A part of the launcher's store for this start of the ranks alone.

        torchrun keeps one store over all restarts, and init_process_group may read there the
        addresses of ranks that are dead (torch 2.13). TORCHELASTIC_RESTART_COUNT would not tell
        them apart: each machine counts its own. So rank 0 draws a name; the others take it once
        rank 0 has answered with what they have drawn.
        """
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        mine, pause = uuid.uuid4().hex, 0.005
        if self.is_main:
            store.set("fastlm/start", mine)
            for rank in range(1, self.size):
                key = f"fastlm/{mine}/{rank}"
                store.set(f"{key}/answer", store.get(key))
            return dist.PrefixStore(mine, store)
        deadline = time.monotonic() + timeout.total_seconds()
        while time.monotonic() < deadline:
            start = store.get("fastlm/start").decode()  # an earlier one's, perhaps
            key = f"fastlm/{start}/{self.rank}"
            store.set(key, mine)
            if store.check([f"{key}/answer"]) and store.get(f"{key}/answer").decode() == mine:
                return dist.PrefixStore(start, store)
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        raise RuntimeError("rank 0 does not answer")

    def new_cpu_group(self) -> dist.ProcessGroup | None:
        """Another gloo group over all ranks, for one more thread: within a group, collectives must
        have the same order on all ranks. To be called by all at once. None in a world of one."""
        if self.size == 1:
            return None
        return dist.new_group(backend="gloo", timeout=timedelta(minutes=self._minutes))

    def decide(self, function: Callable[[], T]) -> T:
        """What `function` returns on rank 0, which alone calls it. The result must be picklable.

        If it raises, rank 0 raises that and the others Elsewhere. May take hours.
        """
        if self.size == 1:
            return function()
        failure: BaseException | None = None
        message = [b""]
        if self.is_main:
            try:
                message = [pickle.dumps((function(), None))]
            except BaseException as error:  # Ctrl-C too: the others are waiting
                failure = error
                message = [pickle.dumps((None, exit_code(error)))]
        dist.broadcast_object_list(message, src=0, group=self._patient)
        if failure is not None:
            self._failed = True
            raise failure
        result, code = pickle.loads(message[0])
        if code is not None:
            self._failed = True
            raise Elsewhere(0, code)
        return result

    def together(self, function: Callable[[], T]) -> T:
        """What `function` returns on this rank; every rank calls it, and waits for the others.

        If it raises anywhere, the lowest such rank raises its own error and the others Elsewhere.
        """
        if self.size == 1:
            return function()
        failure: BaseException | None = None
        try:
            result = function()
            first = torch.tensor([self.size, 0])
        except BaseException as error:
            failure = error
            first = torch.tensor([self.rank, exit_code(error)])
        first = first[0] * 256 + first[1] % 256  # one number, so that the lowest rank's code wins
        dist.all_reduce(first, dist.ReduceOp.MIN, group=self._patient)
        rank, code = divmod(first.item(), 256)
        if rank == self.size:
            return result
        self._failed = True
        if rank == self.rank:
            raise failure
        raise Elsewhere(rank, code)

    def vote(self, *flags: int) -> Vote:
        """Begins a vote: its wait() gives the elementwise maximum over the ranks.

        All ranks must begin the same votes in the same order. Nothing waits here: begin a vote
        before a step and read it after.
        """
        tensor = torch.tensor(flags, dtype=torch.int64)
        if self.size == 1:
            return Vote(tensor, None)
        work = dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.cpu_group, async_op=True)
        return Vote(tensor, work)

    def sum(self, tensor: Tensor) -> Tensor:
        """Adds up `tensor` over the ranks in place, on its device; returns it. On CUDA nothing
        waits for the result."""
        if self.size > 1:
            # NCCL adds up nothing on the CPU.
            on_cpu = tensor.device.type == "cpu" != self.device.type
            dist.all_reduce(tensor, group=self.cpu_group if on_cpu else None)
        return tensor

    def gather(self, value: T) -> list[T]:
        """The small picklable values of all ranks, in their order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def barrier(self) -> None:
        """Waits until every rank is here, however long that takes."""
        if self.size > 1:
            dist.barrier(group=self._patient)

    def explain(self, error: BaseException) -> BaseException:
        """What this rank should raise for `error`, after which it ends; tells the others.

        The first rank that fails gets its own error back, or RankLostError where that is a broken
        collective: a peer was killed, or hangs. All others get Elsewhere.
        """
        known = isinstance(error, Elsewhere) or not isinstance(error, Exception)
        if self.size == 1 or known:
            self._failed = True
            return error
        if self._failed:  # in decide() or together(), which have told all
            return error
        self._failed = True
        own = self._lost(error) if _is_broken_collective(error) else error
        message = f"{self.rank} {exit_code(own)}"
        try:
            if self._store is None:  # not connected yet
                store, *_ = next(dist.rendezvous("env://", timeout=timedelta(seconds=10)))
                self._store = dist.PrefixStore(f"fastlm/before/{self.restarts}", store)
            first = self._store.compare_set("failed", "", message).decode()
        except (RuntimeError, ValueError):
            return own  # the store is gone: torchrun's agent keeps it; without that, rank 0 does
        if first == message:
            return own
        rank, code = first.split()
        return Elsewhere(int(rank), int(code))

    def _lost(self, error: BaseException) -> RankLostError:
        # Gloo's begin with the C++ file, and end with advice.
        reason = re.sub(r"^\[\S*\] |\. This is .*", "", " ".join(str(error).split()))[:200]
        if "imed out" in reason or "imeout" in reason:
            what = (
                f"a collective has taken more than {self._minutes:g} minutes: another process "
                f"hangs, or is as slow as that"
            )
        else:
            what = "another process has ended without a message: killed, or its machine is gone"
        return RankLostError(
            f"rank {self.rank} of {self.size}: {what}; --resume continues from the newest "
            f"checkpoint ({reason})"
        )

    def stop(self) -> None:
        """Leaves the process group. Waits for the others, unless a rank has failed; never raises.

        After an error the process must end: gloo cannot cancel the collectives under way, and
        destroying their groups would wait for them.
        """
        if self.size == 1 or self._stopped:
            return
        self._stopped = True
        if self._patient is None:
            return
        if not self._failed:
            try:
                self.barrier()  # rank 0 may keep the store: it must not be the first to go
                if self._owns_group:
                    dist.destroy_process_group()
                return
            except (RuntimeError, ValueError):
                self._failed = True
        World.left_open = self._owns_group
        if self._owns_group and dist.is_initialized():
            # NCCL's kernels would keep the GPU, and the end of the process, waiting.
            with contextlib.suppress(RuntimeError, AttributeError):
                dist.distributed_c10d._get_default_group()._get_backend(
                    torch.device("cuda")
                ).abort()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        explained = None if error is None else self.explain(error)
        self.stop()
        if explained is not error:
            raise explained from error


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise ConfigError(f"WORLD_SIZE is set in the environment and {name} is not: use torchrun")
    if not (value.isascii() and value.isdigit()) or (name.endswith("_SIZE") and int(value) < 1):
        raise ConfigError(f"{name}={value!r} in the environment is no number: use torchrun")
    return int(value)


def _is_broken_collective(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in BROKEN)


ALONE = World({})  # a process that nobody else trains with


def end_process(code: int) -> NoReturn:
    """Ends a command. Where a process group could not be closed, without the interpreter's own end:
    the group's threads would abort that, and the exit code with it."""
    if World.left_open:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
