"""Sharded checkpoints on several ranks: what test_sharded.py starts once.

    python tests/helpers/sharded_cases.py DIRECTORY [CASE ...]

Every case prints a line where it holds. DIRECTORY: an empty one. Without a CASE: all of CASES.
"""

import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked_ranks import run_ranks
from sharded_runs import (
    MORE_STEPS,
    STEPS,
    VARIANTS,
    assert_continues,
    assert_equal,
    extra,
    make,
    run,
    save,
    values,
)
from torch import nn
from torch.distributed.fsdp import fully_shard

import fastlm.parallel.sharded as sharded
from fastlm import load_checkpoint, save_checkpoint
from fastlm.checkpoint import checkpoint_payload, list_checkpoints, read_checkpoint
from fastlm.errors import CheckpointError, OutputError
from fastlm.parallel.commit import remove_leftovers
from fastlm.parallel.sharded import write_sharded
from fastlm.run.saver import Saver

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def on_ranks(world_size: int, function, codes=None) -> None:
    found = run_ranks(world_size, lambda: function(dist.new_group(backend="gloo")))
    assert found == (codes or [0] * world_size), found


@case
def two_ranks_save(directory):
    def write(group):
        for variant in VARIANTS:
            save(variant, directory / f"{variant}_3.dcp", group)

    on_ranks(2, write)
    for variant in VARIANTS:
        names = sorted(path.name for path in (directory / f"{variant}_3.dcp").iterdir())
        shards = [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
        assert names == ["commit.json", *shards], names
    assert not list(directory.glob("*.partial"))


def load_all(directory, world_size, *, fsdp, variants=tuple(VARIANTS)):
    def load(group):
        for variant in variants:
            path = directory / f"{variant}_3.dcp"
            assert_continues(variant, path, path.with_suffix(".expected"), group, fsdp=fsdp)

    on_ranks(world_size, load)


@case
def another_number_of_ranks_goes_on(directory):
    load_all(directory, 1, fsdp=True, variants=["plain"])
    load_all(directory, 3, fsdp=True)
    load_all(directory, 4, fsdp=True, variants=["uneven", "tied"])


@case
def ranks_with_whole_tensors_go_on(directory):
    load_all(directory, 2, fsdp=False)


@case
def one_process_goes_on(directory):
    for variant in VARIANTS:
        path = directory / f"{variant}_3.dcp"
        assert_continues(variant, path, path.with_suffix(".expected"), None, fsdp=False)


@case
def ranks_go_on_from_one_file(directory):
    for variant in VARIANTS:
        model, optimizer = make(variant, 1, fsdp=False)
        load_checkpoint(model, optimizer, directory / f"{variant}_3.dcp")
        save_checkpoint(model, optimizer, 3, directory / f"{variant}_3.pt", **extra())

    def load(group):
        for variant in ("tied", "split", "uneven"):
            path = directory / f"{variant}_3.pt"
            assert_continues(variant, path, path.with_suffix(".expected"), group, fsdp=True)

    on_ranks(3, load)


@case
def several_files_a_rank(directory):
    def write_and_load(group):
        sharded._FILE_BYTES = 256
        path = directory / "files_3.dcp"
        save("plain", path, group)
        assert len(list(path.glob("shard-00002-*"))) > 3
        assert_continues("plain", path, path.with_suffix(".expected"), group, fsdp=True)

    on_ranks(2, write_and_load)


@case
def a_copy_is_written_while_the_run_goes_on(directory):
    path = directory / "copied_3.dcp"

    def write(group):
        model, optimizer = make("tied", 0, fsdp=True)
        run(model, optimizer, STEPS)
        saver = Saver(lambda name: path, keep_last=0)
        # As the saver will: what is copied once is copied anew into the same memory.
        for _ in range(2):
            copy = saver._copied(checkpoint_payload(model, optimizer, 3, **extra()))
        weights = copy["model_state"]
        assert weights["lm_head.weight"] is weights["token_embeddings.weight"]
        tensors = values(model, optimizer)
        thread = threading.Thread(target=write_sharded, args=(copy, path), kwargs={"group": group})
        thread.start()
        losses = run(model, optimizer, MORE_STEPS)
        thread.join()
        if dist.get_rank() == 0:
            torch.save((tensors, losses, extra()), path.with_suffix(".expected"))
        dist.barrier(group)
        assert_continues("tied", path, path.with_suffix(".expected"), group, fsdp=True)

    on_ranks(2, write)


# What goes wrong


def assert_nothing_but(path: Path, before: dict) -> None:
    assert [file.path for file in list_checkpoints(path.parent, "a")] == [path]
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name]
    assert_equal(read_checkpoint(path), before)


@case
def a_rank_that_cannot_write_is_an_error_of_all(directory):
    directory = directory / "full"
    path = directory / "a_3.dcp"
    write_sharded(extra(), path)

    def write(group):
        model, optimizer = make("plain", 0, fsdp=True)
        payload = checkpoint_payload(model, optimizer, 3)
        if dist.get_rank() == 1:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(OutputError) as caught:
            write_sharded(payload, path, group=group)
        assert str(caught.value) == (
            f"{path}: cannot be written (File too large on rank 1); make room there or choose "
            f"another directory"
        )
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier(group)
        assert_nothing_but(path, extra())
        if dist.get_rank() == 1:
            sharded._save = on_a_full_disk(sharded._save)
        with pytest.raises(OutputError) as caught:
            write_sharded(payload, path, group=group)
        assert str(caught.value).startswith(
            f"{path}: cannot be written (No space left on device on rank 1); make room"
        )
        dist.barrier(group)
        assert_nothing_but(path, extra())

    def on_a_full_disk(save):
        def wrapped(tensors, partial, group):
            name = "shard-00002-model-00001-of-00001.safetensors"
            (partial / name).symlink_to("/dev/full")
            save(tensors, partial, group)

        return wrapped

    on_ranks(2, write)


@case
def errors_of_one_rank_reach_all(directory):
    directory = directory / "errors"
    path = directory / "a_3.dcp"
    write_sharded(extra(), path)
    sha256 = sharded.sha256

    def write(group):
        rank = dist.get_rank()
        with pytest.raises((TypeError, RuntimeError), match="config is a object, which no"):
            write_sharded({"config": object() if rank == 1 else 1}, path, group=group)
        # Rank 1's file is another than it wrote.
        sharded.sha256 = lambda file, from_disk=False: sha256(file) + rank * from_disk * "0"
        payload = {"model_state": fully_shard(nn.Linear(3, 3)).state_dict()}
        with pytest.raises(OutputError, match="SHA-256 does not match on rank 1"):
            write_sharded(payload, path, group=group, read_back=True)
        # Directories that are not one.
        mine = path if rank == 0 else path.with_name("b_3.dcp")
        with pytest.raises(OutputError, match="choose a directory that all ranks share"):
            write_sharded(payload, mine, group=group)
        dist.barrier(group)
        if rank == 0:
            sharded.shutil.rmtree(path.with_name("b_3.dcp.partial"))
            assert_nothing_but(path, extra())

    on_ranks(2, write)


@case
def damage_that_one_rank_finds_is_an_error_of_all(directory):
    path = directory / "damaged_3.dcp"
    sharded.shutil.copytree(directory / "plain_3.dcp", path)
    file = path / "shard-00002-model-00001-of-00001.safetensors"  # which rank 1 hashes
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)

    def load(group):
        model, optimizer = make("plain", 1, fsdp=True)
        before = values(model, optimizer)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(model, optimizer, path, group=group)
        assert str(caught.value) == f"{file}: is damaged (its SHA-256 does not match)"
        assert_equal(values(model, optimizer), before)

    on_ranks(2, load)


@case
def another_architecture_is_refused_before_anything_is_read(directory):
    def load(group):
        model, optimizer = make("uneven", 1, fsdp=True)
        before = values(model, optimizer)
        tied = make("tied", 1, fsdp=True)
        for name in ("plain_3.dcp", "plain_3.pt"):
            with pytest.raises(CheckpointError, match="are two matrices, not one"):
                load_checkpoint(*tied, directory / name, group=group)
        sharded._load = None  # not reached
        with pytest.raises(CheckpointError, match=r"0\.weight is missing, not \(11, 5\) and"):
            load_checkpoint(model, optimizer, directory / "plain_3.dcp", group=group)
        with pytest.raises(CheckpointError, match=r"nothing_3\.dcp: no such checkpoint"):
            load_checkpoint(model, optimizer, directory / "nothing_3.dcp", group=group)
        assert_equal(values(model, optimizer), before)

    on_ranks(2, load)


# Kills


def kill_at(count: int, directory: Path) -> None:
    """Kills this process before its `count`-th opening, renaming or removing in `directory`."""
    left = count

    def hook(event, arguments):
        nonlocal left
        changes = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
        if event in changes and str(arguments[0]).startswith(str(directory)):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@case
def a_kill_at_any_moment_leaves_the_old_or_the_new(directory):
    """Of a write of a new checkpoint, and of one that replaces another of its name."""
    directory = directory / "killed"
    older, path = directory / "a_1.dcp", directory / "a_3.dcp"
    old, new = ({"iteration": i, "model_state": {"w": torch.full((400,), i)}} for i in (2, 3))
    for replaces in (False, True):
        count, seen, leftovers = 0, [], []
        while True:
            count += 1
            sharded.shutil.rmtree(directory, ignore_errors=True)
            write_sharded({"iteration": 1}, older)
            if replaces:
                write_sharded(old, path)
            pid = os.fork()
            if pid == 0:
                kill_at(count, directory)
                write_sharded(new, path)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            for file in list_checkpoints(directory):
                assert file.readable, (count, file)
            leftovers += remove_leftovers(directory)
            names = sorted(p.name for p in directory.iterdir())
            assert names in (["a_1.dcp"], ["a_1.dcp", "a_3.dcp"]), (count, names)
            assert replaces <= (path.name in names), (count, names)
            if path.exists():
                seen.append(read_checkpoint(path)["iteration"])
            else:
                seen.append(None)
            assert_equal(read_checkpoint(older), {"iteration": 1})
            if os.waitstatus_to_exitcode(status) == 0:
                break
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        first = 2 if replaces else None
        assert seen == sorted(seen, key=lambda i: i == 3), seen
        assert seen[0] == first and seen[-1] == 3 and len(seen) > 8 and leftovers, seen


@case
def a_killed_rank_leaves_no_checkpoint(directory):
    directory = directory / "killed_rank"
    write_sharded(extra(), directory / "a_3.dcp")

    def write(group):
        if dist.get_rank() == 1:
            kill_at(1, directory / "a_4.dcp.partial")  # its file
        with pytest.raises(Exception):  # noqa: B017 - gloo's, of a lost connection
            model, optimizer = make("plain", 0, fsdp=True)
            payload = checkpoint_payload(model, optimizer, 4)
            write_sharded(payload, directory / "a_4.dcp", group=group)

    on_ranks(2, write, [0, -signal.SIGKILL])
    remove_leftovers(directory)
    assert_nothing_but(directory / "a_3.dcp", extra())


def a_kill_of_a_rank_at_any_moment_leaves_the_old_or_the_new(directory):
    """Not one of the cases: it takes a minute."""
    path = directory / "a_3.dcp"
    for victim in (0, 1):
        count, seen, codes = 0, [], []
        while not codes or codes[victim]:
            count += 1
            sharded.shutil.rmtree(directory, ignore_errors=True)
            write_sharded({"iteration": 2}, path)

            def write(group, victim=victim, count=count):
                model, optimizer = make("plain", 0, fsdp=True)
                if dist.get_rank() == victim:
                    kill_at(count, directory)
                write_sharded(checkpoint_payload(model, optimizer, 3), path, group=group)

            codes = run_ranks(2, lambda write=write: write(dist.new_group(backend="gloo")))
            assert codes[victim] in (0, -signal.SIGKILL), codes
            assert all(file.readable for file in list_checkpoints(directory)), count
            remove_leftovers(directory)
            assert sorted(p.name for p in directory.iterdir()) == [path.name], count
            seen.append(read_checkpoint(path)["iteration"])
        assert seen == sorted(seen) and seen[0] == 2 and seen[-1] == 3, seen
        print(f"rank {victim} was killed at {len(seen) - 1} moments: {seen}")


def main(directory: Path, *names: str) -> int:
    torch.set_num_threads(1)
    for name in names or CASES:
        function = CASES.get(name) or globals()[name]
        try:
            function(directory)
        except Exception:
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
            return 1
        print(f"passed {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
