"""gather_batch with any number of threads, by several callers, after fork(); instruction sets."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from batches import assert_equals_reference, tokens_of

import fastlm
from fastlm import gather_batch
from fastlm.extension import extension
from fastlm.ops.gather_batch import gather_batch_reference

ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture
def restored():
    """Gives back the instruction set and the number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    extension().force_isa(None)


def large_batch():
    """Tokens and starts enough for several threads: a part is 16 K tokens at least."""
    tokens = tokens_of("uint16", 50_000)
    starts = np.random.default_rng(1).integers(0, 50_000 - 1024, 128)
    return tokens, starts, 1024


def test_threads_and_instruction_sets_do_not_change_the_result(restored):
    tokens, starts, context_len = large_batch()
    scanned = np.tile(tokens, 20) % 1000
    scanned[[777_777, 900_000]] = 1000
    tested = []
    for isa in ISAS:
        try:
            extension().force_isa(isa)
        except ValueError:
            continue  # not on this machine
        assert extension().isa() == isa
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            batch = gather_batch(tokens, starts, context_len)
            assert_equals_reference(batch, tokens, starts, context_len)
            assert extension().first_out_of_range(scanned, 1000) == 777_777
            tested.append((isa, threads))
    assert len(tested) >= 4


def test_torch_sets_the_number_of_threads(restored):
    if not extension().THREADS_ARE_OPENMPS:
        pytest.skip("built without OpenMP")
    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        assert extension().max_threads() == threads


def test_the_gil_is_released():
    # With a switch interval of 100 s the other thread can run between the two lines marked (*) only
    # if the call itself releases the GIL. The call takes some 20 ms; should the machine wake the
    # other thread later than that, it gets another chance.
    segments = [tokens_of("uint16", 100_000)]
    starts = np.random.default_rng(1).integers(0, 90_000, 4096)
    x, y = np.empty((4096, 1024), dtype=np.int64), np.empty((4096, 1024), dtype=np.int64)
    call, interval = extension().gather_batch, sys.getswitchinterval()
    progress = []
    try:
        for _ in range(50):
            gate = threading.Lock()
            gate.acquire()
            thread = threading.Thread(
                target=lambda gate=gate: gate.acquire() and progress.append(1)
            )
            thread.start()
            sys.setswitchinterval(100)
            gate.release()  # (*)
            call(segments, starts, x, y)
            done = bool(progress)  # (*)
            sys.setswitchinterval(interval)
            thread.join()
            if done:
                return
            progress.clear()
    finally:
        sys.setswitchinterval(interval)
    raise AssertionError("no other Python thread ran during 50 calls")


def test_concurrent_calls():
    tokens, starts, context_len = large_batch()
    expected = gather_batch_reference(tokens, starts, context_len)
    wrong = []

    def caller():
        for _ in range(10):
            x, y = gather_batch(tokens, starts, context_len)
            if not (torch.equal(x, expected[0]) and torch.equal(y, expected[1])):
                wrong.append(1)

    threads = [threading.Thread(target=caller) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_a_child(tokens, starts, context_len, expected_x) -> None:
    x, _ = fastlm.gather_batch(tokens, starts, context_len)
    right = np.array_equal(x.numpy(), expected_x)
    scanned = extension().first_out_of_range(np.tile(tokens, 40), 65536)
    sys.exit(0 if right and scanned == -1 else 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fork() after threads is Linux's")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_works_in_a_forked_child(restored):
    # As in a DataLoader's worker: the parent's threads do not exist there, waiting for them hangs.
    torch.set_num_threads(4)
    tokens, starts, context_len = large_batch()
    x, _ = gather_batch(tokens, starts, context_len)  # the pool exists now
    child = multiprocessing.get_context("fork").Process(
        target=in_a_child, args=(tokens, starts, context_len, x.numpy())
    )
    child.start()
    child.join(timeout=60)
    hung = child.exitcode is None
    if hung:
        child.kill()
        child.join()
    assert not hung, "the child hung"
    assert child.exitcode == 0
    assert_equals_reference(
        gather_batch(tokens, starts, context_len), tokens, starts, context_len
    )  # and the parent goes on


BOUND = """
import numpy as np, torch, fastlm
from fastlm.extension import extension
from fastlm.ops.cross_entropy import cross_entropy_loss_reference
from fastlm.ops.gather_batch import gather_batch_reference

torch.manual_seed(0)
tokens = np.random.default_rng(0).integers(0, 50_000, 50_000).astype(np.uint16)
starts = np.random.default_rng(1).integers(0, 50_000 - 1024, 128)
logits, targets = torch.randn(600, 2000), torch.randint(2000, (600,))
expected = gather_batch_reference(tokens, starts, 1024)
truth = cross_entropy_loss_reference(logits.double(), targets)
assert extension().max_threads() == 2
for _ in range(10):
    assert all(map(torch.equal, fastlm.gather_batch(tokens, starts, 1024), expected))
    x, _ = fastlm.get_batch(tokens, 128, 1024)
    assert x.shape == (128, 1024) and x.max() < 50_000
    copy = logits.clone().requires_grad_()
    loss = fastlm.cross_entropy_loss(copy, targets)
    loss.backward()
    assert abs(loss - truth) < 1e-5 and abs(copy.grad.sum()) < 1e-3
print("right")
"""


@pytest.mark.parametrize(
    "bind",
    [
        {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"},
        pytest.param({"OMP_PROC_BIND": "true"}, marks=pytest.mark.exhaustive),
        pytest.param({"OMP_PLACES": "threads"}, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_threads_bound_to_cores(bind):
    # Right results, and no waiting for ever: a thread started by a bound one inherits its core.
    if not extension().THREADS_ARE_OPENMPS:
        pytest.skip("built without OpenMP")
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_PROC_BIND", "OMP_PLACES")}
    result = subprocess.run(
        [sys.executable, "-c", BOUND], env={**kept, "OMP_NUM_THREADS": "2", **bind},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0 and result.stdout == "right\n", result.stderr
