"""Functions that tests call in a process of their own: `commands().start(..., call=)`."""

import os
import re
import time


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
    from fastlm.run.plot import LivePlotter
    from fastlm.train import main

    told = []
    LivePlotter.save = lambda self, path: told.append(
        f"train {self.train_steps}\nval {self.eval_steps}"
    )
    code = main(argv)
    print(*told, sep="\n")
    return code


def tell_peak_memory(argv: list[str]) -> None:
    """In a process of its own: the peak before and after 200 MiB are read from a mapped file, are
    allocated, and are freed."""
    import numpy as np
    import torch

    from fastlm.measure import PeakMemory

    peak = PeakMemory(torch.device("cpu"))

    def tell() -> None:
        peak.sample()
        print(peak.bytes)

    tell()
    np.zeros(200 << 20, np.uint8).tofile("tokens.bin")
    mapped = np.memmap("tokens.bin", np.uint8, mode="r")
    mapped[:: 1 << 10].sum()
    tell()
    tensor = torch.ones(200 << 18)
    tell()
    del tensor
    tell()


def train_slowly_from_3(argv: list[str]) -> int:
    """In a process of its own: a run whose step 3 takes a minute."""
    from fastlm.step import TrainStep
    from fastlm.train import main

    run = TrainStep.run

    def slow(self, first_sample, lr, *stop):
        if first_sample == 3 * self.samples:
            time.sleep(60)
        return run(self, first_sample, lr, *stop)

    TrainStep.run = slow
    return main(argv)


def train_onto(argv: list[str]) -> int:
    """In a process of its own: trains with stdout or stderr (argv[0]) on a full disk, on a pipe
    that nobody reads ("pipe"), a terminal's path, or closed from the start (argv[1])."""
    import sys

    from fastlm.train import main

    stream, kind, *argv = argv
    descriptor = {"stdout": 1, "stderr": 2}[stream]
    kept = os.dup(descriptor)
    if kind == "closed":
        os.close(descriptor)
        setattr(sys, stream, None)  # as Python does at its start
    else:
        if kind.startswith("/dev/"):
            handle = os.open(kind, os.O_WRONLY | os.O_NOCTTY)
        elif kind == "full":
            handle = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, handle = os.pipe()
            os.close(reader)
        os.dup2(handle, descriptor)
        os.close(handle)
    code = main(argv)
    os.dup2(kept, descriptor)
    return code


def count_page_faults(argv: list[str]) -> None:
    """The least page faults of five times 64 MiB, once memory has been used; argv: ["keep"] or not.

    The least of five: the kernel may take pages away now and then.
    """
    import resource

    import torch

    from fastlm import keep_freed_memory

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            torch.ones(16 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    told = [keep_freed_memory(), keep_freed_memory()] if argv == ["keep"] else []
    for _ in range(3):
        step()
    print(*told, min(step() for _ in range(5)))


def move_heap(argv: list[str]) -> None:
    """Moves the heap to huge pages, 64 MiB of numbers on it; tells the bytes, and what changed."""
    import torch

    from fastlm.hardware import back_heap_with_huge_pages, keep_freed_memory

    keep_freed_memory()
    before = torch.arange(8 << 20)
    asked = back_heap_with_huge_pages()
    again = back_heap_with_huge_pages()
    after = torch.arange(8 << 20)
    print(asked, torch.equal(before, after), asked <= again)


def prepare_without_rights(argv: list[str]) -> None:
    """Prepares into open/out, then tries what another user may not."""
    from fastlm.prepare import main

    # Imports what it needs.
    assert main(["in", "--out", "open/out", "--vocab-size", "300"]) == 0
    if os.getuid() == 0:  # who may read and write anywhere
        os.setgid(65534)
        os.setuid(65534)
    print("now without rights")
    for arguments in (
        ["in", "--out", "locked/new/out"],
        ["closed.txt", "in", "--out", "open/other"],
        ["hidden/a.txt", "--out", "open/other"],
        ["in", "--out", "hidden/out"],
    ):
        assert main(arguments) == 2


def prepare_slowly(argv: list[str]) -> int:
    """In a process of its own: saves its progress after each small batch; a tenth of a second for
    each of the second file on."""
    from fastlm import prepare
    from fastlm.data import encoding

    prepare.SAVE_SECONDS, encoding.BATCH_CHARACTERS = 0.0, 2_000
    genuine = encoding.encode

    def encode(encoder, texts, *options):
        time.sleep(0.1 if "second" in texts[0] else 0.0)
        return genuine(encoder, texts, *options)

    encoding.encode = encode
    return prepare.main(argv)


def prepare_and_tell_growth(argv: list[str]) -> int:
    """Prepares, and tells by how many bytes its peak memory has grown."""
    from fastlm.prepare import main

    def peak() -> int:  # of this process; ru_maxrss would be the parent's if that is larger
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\s+(\d+)", file.read())[1]) * 1024

    before = peak()
    code = main(argv)
    print(peak() - before)
    return code


def prepare_corpus(argv: list[str]) -> None:
    """Prepares the library in argv[0] as the default corpus, once a file `go` is there."""
    import sysconfig

    from fastlm import corpus

    library = argv[0]
    sysconfig.get_paths = lambda: {"stdlib": library}
    corpus.MIN_BYTES = 1000
    print("ready", flush=True)
    while not os.path.exists(os.path.join(library, "go")):
        time.sleep(0.001)
    print(corpus.default_corpus(300, log=lambda line: None))


def die_in_every_call_of_a_save(argv: list[str]) -> None:
    """Dies in each system call of a save in turn, half of a write done; tells what is left then.

    argv: the path, which has to hold iteration 1, and a seed. A line each: the call, the iteration
    that the file holds, the leftovers.
    """
    import fcntl
    import io
    import random
    from pathlib import Path

    import torch

    from fastlm.checkpoint import checkpoint_payload, read_checkpoint, remove_stale_temporaries
    from fastlm.checkpoint_file import write_checkpoint

    path, rng = Path(argv[0]), random.Random(int(argv[1]))
    before = path.read_bytes()

    def save_until(call: int, told: int) -> None:
        """In a child: counts its calls, and dies in the one of that number."""
        count = 0

        def dies(name: str, *, half=lambda: None) -> None:
            nonlocal count
            count += 1
            if count == call:
                half()
                os.write(told, name.encode())
                os._exit(9)

        class File(io.FileIO):
            def write(self, data) -> int:
                part = bytes(data)[: rng.randrange(len(data) + 1)]
                dies("write", half=lambda: os.write(self.fileno(), part))
                return super().write(data)

        def wrapped(module, name: str) -> None:
            real = getattr(module, name)

            def function(*arguments, **options):
                dies(name)
                return real(*arguments, **options)

            setattr(module, name, function)

        os.fdopen = lambda handle, mode: io.BufferedWriter(File(handle, mode))
        for name in ("statvfs", "open", "fsync", "replace", "close", "posix_fadvise"):
            wrapped(os, name)
        wrapped(fcntl, "flock")
        model = torch.nn.Linear(64, 64)
        torch.nn.init.constant_(model.weight, 2)
        write_checkpoint(checkpoint_payload(model, None, 2), path, read_back=True)

    call, code = 0, -1
    while code != 0:
        call += 1
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            save_until(call, write)
            os._exit(0)
        os.close(write)
        name = os.read(read, 100).decode() or "done"
        os.close(read)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        payload = read_checkpoint(path)
        assert (payload["model_state"]["weight"] == payload["iteration"]).all()
        leftovers = [entry.name for entry in path.parent.iterdir() if entry != path]
        assert [removed.name for removed in remove_stale_temporaries(path.parent)] == leftovers
        assert list(path.parent.iterdir()) == [path]
        print(name, payload["iteration"], len(leftovers))
        path.write_bytes(before)
