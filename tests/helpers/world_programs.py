"""What the ranks of test_world.py run: main(argv) is a command that runs the function argv[0]."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

import fastlm.parallel.world
from fastlm.errors import DataError, Elsewhere, run_command
from fastlm.parallel.world import World

MINUTES = 2.0  # of a collective's timeout: tests end far earlier


def main(argv):
    return run_command(lambda: globals()[argv[0]](*argv[1:]))


def raises(error, match):
    """For a program's own checks: what `error` must be."""
    assert type(error) is match, repr(error)


def agreement():
    """Everything that works when nobody fails."""
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        assert world.device_name("cpu") == "cpu" and world.device == torch.device("cpu")
        assert world.is_main == (world.rank == 0)
        calls = []
        assert world.decide(lambda: calls.append(1) or {"steps": 7}) == {"steps": 7}
        assert calls == [1] * (world.rank == 0)
        assert world.together(lambda: world.rank * 10) == world.rank * 10
        assert world.gather(("rank", world.rank)) == [("rank", r) for r in range(world.size)]
        vote = world.vote(world.rank, 5 - world.rank, 0)
        tensor = torch.full((1000,), float(world.rank + 1))
        assert world.sum(tensor) is tensor
        assert tensor.eq(sum(range(1, world.size + 1))).all()
        other = world.vote(1)  # two at once
        assert vote.wait() == [world.size - 1, 5, 0] and other.wait() == [1]
        value = torch.ones(1)
        dist.all_reduce(value, group=world.new_cpu_group())
        assert value.item() == world.size
        world.barrier()
        print(f"restarts {world.restarts} of {world.max_restarts}")
    assert not dist.is_initialized()
    world.stop()  # a second time: nothing


def restarted(late):
    """Rank `late` comes last, so that the others find what it left in the store before."""
    if os.environ["RANK"] == late:
        time.sleep(0.5)
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        step(world)
        print("together")


def own_group():
    """A program that has made its process group: it stays, and one run after the other works."""
    rank, size = int(os.environ["RANK"]), int(os.environ.pop("WORLD_SIZE"))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    for _ in range(2):
        with World.start("cpu", timeout_minutes=MINUTES) as world:
            assert world.gather(1) == [1] * size
    dist.barrier()
    dist.destroy_process_group()


def fail_in_decide():
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        try:
            world.decide(lambda: missing("rank 0"))
        except Exception as error:
            raises(error, DataError if world.is_main else Elsewhere)
            raise


def unpicklable_decision():
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        world.decide(lambda: lambda: None)


def leave_in_decide():
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        world.decide(lambda: sys.exit(143))


def fail_together(*ranks):
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        try:
            world.together(lambda: str(world.rank) in ranks and missing(f"rank {world.rank}"))
        except Exception as error:
            first = min(map(int, ranks))
            raises(error, DataError if world.rank == first else Elsewhere)
            raise


def fail_to_start(*ranks):
    with World(os.environ) as world:
        if str(world.rank) in ranks:
            missing("the command line")
        world.connect("cpu", timeout_minutes=MINUTES)


def missing(who):
    raise DataError(f"train.bin is missing on {who}")


def step(world):
    """A step as the trainer runs it: a vote under way, DDP's kind of collective."""
    vote = world.vote(0)
    world.sum(torch.ones(100_000))
    vote.wait()


def fail_in_step(rank, how):
    """Rank `rank` fails between a vote's begin and a collective, after some good steps."""
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        for _ in range(3):
            step(world)
        if world.rank == int(rank):
            world.vote(0)
            # The others may join two of them; then they wait for the next vote.
            works = [dist.all_reduce(torch.ones(100_000), async_op=True) for _ in range(3)]
            print("failing", flush=True)
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "interrupt":
                raise KeyboardInterrupt
            if how == "bug":
                raise ZeroDivisionError("a bug")
            assert not works[-1].is_completed()
            raise DataError("label 99 at position 7 is out of range")
        while True:
            step(world)


def fail_in_backward(rank):
    """The broken collective is DDP's, inside the autograd engine."""
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        module = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(50, 50))
        for number in range(100):
            loss = module(torch.ones(2, 50)).sum()
            if number == 3 and world.rank == int(rank):
                missing(f"rank {rank}")
            loss.backward()


def killed_once(rank):
    """Under torchrun --max-restarts: the second attempt has a store without the first's failure."""
    with World.start("cpu", timeout_minutes=MINUTES) as world:
        step(world)
        if world.rank == int(rank) and world.restarts == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(3):
            step(world)
        print(world.gather(f"restart {world.restarts} of {world.max_restarts}"))


def hang(rank):
    """Rank `rank` comes to no collective any more."""
    with World.start("cpu", timeout_minutes=0.03) as world:
        step(world)
        if world.rank == int(rank):
            time.sleep(20)
            os._exit(7)
        step(world)


def lonely():
    """A world of which one rank never comes."""
    with World.start("cpu", timeout_minutes=0.02):
        pass


def patience():
    """Rank 0 takes longer for a decision than a collective may."""
    with World.start("cpu", timeout_minutes=0.01) as world:
        assert world.decide(lambda: time.sleep(1.2) or 5) == 5


def threads_of_8_cores():
    fastlm.hardware._cores = lambda: set(range(8))
    with World.start("cpu", timeout_minutes=MINUTES):
        print(f"threads {torch.get_num_threads()}\n", end="", flush=True)  # in one write


if __name__ == "__main__":  # for torchrun
    sys.exit(main(sys.argv[1:]))
