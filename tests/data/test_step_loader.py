"""fastlm/data/step_loader.py: batches made one step ahead are the batches asked for."""

import threading

import numpy as np
import pytest
import torch

from fastlm.data.loader import TrainLoader
from fastlm.data.step_loader import StepLoader

TOKENS = np.arange(10_000, dtype=np.uint16)  # token = position: a batch tells where it is from
STEPS = [[0, 4], [8, 12], [16, 20], [200, 204], [8, 12]]  # a jump: another branch of the run


def loader() -> TrainLoader:
    return TrainLoader(TOKENS, 4, 16, seed=1)


class Noting(TrainLoader):
    """Notes which thread makes which batch."""

    def __init__(self):
        super().__init__(TOKENS, 4, 16, seed=1)
        self.made: list[tuple[int, bool]] = []  # (first sample, in the caller's thread?)

    def batch(self, first):
        self.made.append((first, threading.current_thread() is threading.main_thread()))
        return super().batch(first)


@pytest.mark.parametrize("ahead", [True, False])
def test_batches_are_those_of_the_samples_whatever_was_expected(ahead):
    steps = StepLoader(loader(), ahead=ahead)
    for firsts in STEPS:
        found = steps.batches(firsts, [first + 8 for first in firsts])
        for first, batch in zip(firsts, found, strict=True):
            assert all(map(torch.equal, batch, loader().batch(first)))


def test_what_follows_is_made_meanwhile_and_only_once():
    noting = Noting()
    steps = StepLoader(noting)
    for firsts in ([0, 4], [8, 12], [16, 20]):
        steps.batches(firsts, [first + 8 for first in firsts])
    steps.batches([24, 28])
    assert noting.made == [(0, True), (4, True), *((n, False) for n in range(8, 32, 4))]
    assert steps.waited > 0


def test_without_a_thread_nothing_is_made_ahead():
    noting = Noting()
    steps = StepLoader(noting, ahead=False)
    steps.batches([0, 4], [8, 12])
    assert noting.made == [(0, True), (4, True)]


def test_what_a_batch_raises_comes_when_it_is_asked_for():
    source, batch = loader(), TrainLoader.batch

    def failing(first):
        if first == 8:
            raise KeyError("cut")
        return batch(source, first)

    source.batch = failing
    steps = StepLoader(source)
    steps.batches([0, 4], [8, 12])
    steps.batches([16, 20], [8, 12])  # it was not needed
    with pytest.raises(KeyError, match="cut"):
        steps.batches([8, 12], [16, 20])


def test_waiting_counts_what_the_thread_had_not_done_yet():
    source, batch, goes_on = loader(), TrainLoader.batch, threading.Event()

    def slow(first):
        if first >= 8:
            goes_on.wait(10)
        return batch(source, first)

    source.batch = slow
    steps = StepLoader(source)
    steps.batches([0, 4], [8, 12])
    before = steps.waited
    threading.Timer(0.05, goes_on.set).start()
    steps.batches([8, 12])
    assert 0.03 < steps.waited - before < 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_copies_have_a_stream_of_their_own_and_nothing_waits_for_the_host():
    steps = StepLoader(TrainLoader(TOKENS, 4, 16, seed=1, device="cuda"))
    steps.batches([0, 4], [8, 12])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for first in range(8, 400, 8):
            firsts = [first, first + 4]
            torch.cuda._sleep(1_000_000)  # the step before still runs
            found = steps.batches(firsts, [n + 8 for n in firsts])
            kept = [(x + 0, y + 0) for x, y in found]
            del found  # its memory may serve the next copy only behind the sums above
            torch.cuda.set_sync_debug_mode("default")
            for n, (x, y) in zip(firsts, kept, strict=True):
                expected = loader().batch(n)
                assert torch.equal(x.cpu(), expected[0]) and torch.equal(y.cpu(), expected[1])
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
