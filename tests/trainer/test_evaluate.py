"""Validation losses against sums written out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from training_runs import VOCAB_SIZE, tiny_config, tokens

from fastlm import TransformerLM, evaluate_model_loss, validate
from fastlm.data.dataset import as_dataset
from fastlm.evaluate import bits_per_byte, evaluating, loss_over_all, mean_loss, summed_loss

pytestmark = pytest.mark.usefixtures("one_thread")

T = 8


def make_model(**settings) -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(VOCAB_SIZE, 16, 2, 1, T, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def config(**settings):
    return tiny_config("unused", context_len=T, **settings)


def window_loss(model, data, start: int) -> torch.Tensor:
    """(T,) fp64 losses of one window."""
    x = torch.tensor(np.asarray(data[start : start + T], dtype=np.int64))[None]
    y = torch.tensor(np.asarray(data[start + 1 : start + 1 + T], dtype=np.int64))
    with torch.no_grad():
        return F.cross_entropy(model(x)[0].double(), y, reduction="none")


@pytest.mark.parametrize("batch_size, num_batches", [(1, 1), (3, 4), (4, 20)])
def test_the_loss_is_the_mean_over_windows_spread_evenly(batch_size, num_batches):
    data = tokens(300)
    model = make_model()
    count = batch_size * num_batches
    last = len(data) - T - 1
    starts = [round(i * last / (count - 1)) if count > 1 else 0 for i in range(count)]
    expected = float(torch.stack([window_loss(model, data, s) for s in starts]).mean())
    cfg = config(batch_size=batch_size)
    assert evaluate_model_loss(model, data, cfg, num_batches) == pytest.approx(expected, rel=1e-5)
    assert validate(
        model, data, batch_size, T, device="cpu", num_val_batches=num_batches
    ) == pytest.approx(expected, rel=1e-5)


class Rank:
    """One of several ranks: keeps what it would add up, and gets what `total` says."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, total=None):
        self.rank, self.size, self.total, self.own = rank, size, total, None

    def sum(self, tensor):
        self.own = tensor.clone()
        return tensor if self.total is None else self.total


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_share_the_batches_and_get_the_mean_of_all(size):
    """Eight have more ranks than there are batches."""
    data, model = tokens(300), make_model()
    x = torch.tensor(data[:160].astype("int64")).view(5, 4, T)
    y = x.roll(-1, -1)
    y[1, :3] = -100
    batches = list(zip(x, y, strict=True))
    calls = []

    def loss(x, y):
        calls.append(x.shape)
        with torch.no_grad():
            return summed_loss(model(x), y)

    expected = mean_loss(loss, batches)
    own, counts = [], []
    for rank in range(size):
        calls.clear()
        world = Rank(rank, size)
        mean_loss(loss, batches, world) if rank < 5 else _mean_of_nothing(loss, batches, world)
        own.append(world.own)
        counts.append(len(calls))
    assert set(counts) == {-(-5 // size)}  # sharded weights are gathered by all at a time
    total = torch.stack(own).sum(0)
    assert total[1] == 5 * 4 * T - 3 * T
    for rank in range(size):
        got = mean_loss(loss, batches, Rank(rank, size, total))
        assert got == pytest.approx(expected, rel=1e-12)
        found = loss_over_all(
            loss, as_dataset(data), 4, T, torch.device("cpu"), world=Rank(rank, size, total)
        )
        assert found.loss == got and found.targets == total[1]


def _mean_of_nothing(loss, batches, world):
    assert math.isnan(mean_loss(loss, batches, world))


def test_data_without_a_target_ends_no_run():
    def nothing(x, y):
        y.fill_(-100)
        return torch.zeros(())

    found = loss_over_all(nothing, as_dataset(tokens(40)), 2, T, torch.device("cpu"))
    assert math.isnan(found.loss) and found.targets == 0


def test_the_default_numbers_of_batches():
    """20 for the notebook's function, 10 for the guide's."""
    data, model, cfg = tokens(300), make_model(), config(batch_size=2)
    assert evaluate_model_loss(model, data, cfg) == evaluate_model_loss(model, data, cfg, 20)
    ten = validate(model, data, 2, T, device="cpu")
    assert ten == evaluate_model_loss(model, data, cfg, num_batches=10)
    assert ten != evaluate_model_loss(model, data, cfg)


def test_validate_takes_the_guides_arguments():
    """All eleven in order, as the training guide's loop passes them."""
    model, data = make_model(), tokens(300)
    loss = validate(model, data, 2, T, VOCAB_SIZE, 16, 1, 2, 64, 10000.0, "cpu", 3)
    assert loss == evaluate_model_loss(model, data, config(batch_size=2), 3)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_and_dropout_is_off(training):
    plain, dropping = make_model(), make_model(dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    data, cfg = tokens(300), config()
    dropping.train(training)
    assert evaluate_model_loss(dropping, data, cfg) == evaluate_model_loss(plain, data, cfg)
    assert dropping.training is training
    assert all(module.training is training for module in dropping.modules())


def test_the_mode_is_restored_after_an_error():
    model = make_model().train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert model.training and torch.is_grad_enabled()


def test_no_random_number_and_no_gradient():
    model, data = make_model(dropout=0.5).train(), tokens(300)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate_model_loss(model, data, config())
    validate(model, data, 2, T, device="cpu")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert evaluate_model_loss(model, data, config()) == first  # the same batches
    assert all(p.grad is None for p in model.parameters())


def test_too_little_data_is_an_error():
    for short in (tokens(T), tokens(1)):
        with pytest.raises(ValueError, match=f"context_len={T} needs at least {T + 1}"):
            evaluate_model_loss(make_model(), short, config())
    assert evaluate_model_loss(make_model(), tokens(T + 1), config()) > 0


def test_sizes_below_1_are_errors():
    data = tokens(300)
    for name in ("batch_size", "context_length", "num_val_batches"):
        sizes = dict(batch_size=2, context_length=T, num_val_batches=2) | {name: 0}
        with pytest.raises(ValueError, match=f"{name}=0: it must be at least 1"):
            validate(make_model(), data, device="cpu", **sizes)
    with pytest.raises(ValueError, match="num_batches=-1: it must be at least 1"):
        evaluate_model_loss(make_model(), data, config(), -1)


@pytest.mark.parametrize("length", [T + 1, T + 2, 2 * T, 2 * T + 1, 5 * T - 3, 101])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_loss_over_all_targets_counts_each_once(length, batch_size):
    data = tokens(length)
    model = make_model().eval()
    # A loss that tells targets apart: the bigger batch repeats some, and labels them -100.
    seen = torch.zeros(VOCAB_SIZE, dtype=torch.int64)

    def loss(x, y):
        assert x.shape == y.shape == (batch_size, T)
        assert ((y == -100) | (y >= 0)).all()
        seen.add_(torch.bincount(y[y >= 0], minlength=VOCAB_SIZE))
        with torch.no_grad():
            return summed_loss(model(x), y)

    mean, targets, of_targets = loss_over_all(
        loss, as_dataset(data), batch_size, T, torch.device("cpu")
    )
    assert targets == of_targets == length - 1
    assert seen.tolist() == np.bincount(data[1:], minlength=VOCAB_SIZE).tolist()
    # By hand: window after window, the last one moved back to fit, its first targets left out.
    total = 0.0
    for begin in range(0, length - 1, T):
        start = min(begin, length - 1 - T)
        total += float(window_loss(model, data, start)[begin - start :].sum())
    assert mean == pytest.approx(total / (length - 1), rel=1e-6)


def test_the_loss_over_all_targets_of_several_files():
    whole = tokens(100)
    parts = as_dataset([whole[:30], whole[30:31], whole[31:]])
    model = make_model().eval()

    def loss(x, y):
        with torch.no_grad():
            return summed_loss(model(x), y)

    cpu = torch.device("cpu")
    assert loss_over_all(loss, parts, 4, T, cpu) == loss_over_all(
        loss, as_dataset(whole), 4, T, cpu
    )


def test_the_loss_over_a_part_is_of_windows_spread_evenly():
    data = tokens(100 * T + 1)
    model = make_model().eval()

    def loss(x, y):
        with torch.no_grad():
            return summed_loss(model(x), y)

    def over(max_targets):
        cpu = torch.device("cpu")
        return loss_over_all(loss, as_dataset(data), 4, T, cpu, max_targets=max_targets)

    part = over(12 * T + 3)
    assert (part.targets, part.of_targets) == (12 * T, 100 * T)
    # The first window, the last, and ten between: no target twice, none of them chosen.
    starts = [T * round(i * 99 / 11) for i in range(12)]
    expected = np.mean([float(window_loss(model, data, start).mean()) for start in starts])
    assert part.loss == pytest.approx(expected, rel=1e-6)
    assert part.extent == f"over {12 * T} of {100 * T} targets, evenly spread"
    assert over(0) == over(100 * T) == over(10**9)
    assert over(0).targets == 100 * T and over(0).extent == f"over all {100 * T} targets"
    assert over(1).targets == T  # a window at least


@pytest.mark.parametrize("segments", [[101], [1, 40, 60], [0, 101]])
def test_tokens_that_are_no_targets_are_not_missed(segments):
    """As in conversations. Only where windows are left out it is a sample."""
    ids, no_target = tokens(101), np.arange(101) % 4 != 3
    ends = np.cumsum(segments)[:-1]
    data = as_dataset(np.split(ids, ends))
    data.ignored = as_dataset(np.split(no_target.astype(np.uint8), ends))

    def over(max_targets):
        cpu = torch.device("cpu")
        return loss_over_all(
            lambda x, y: torch.tensor(1.0), data, 2, T, cpu, max_targets=max_targets
        )

    for all_of_them in (0, 100):
        assert over(all_of_them).extent == "over all 25 targets"
    assert over(50).extent == "over 11 of 25 targets, evenly spread"


def test_a_long_evaluation_says_how_far_it_is(monkeypatch, capsys):
    now = iter(range(0, 10_000, 4))  # 4 s a look at the clock
    monkeypatch.setattr("fastlm.data.progress.time.monotonic", lambda: next(now))
    data = as_dataset(tokens(12 * T + 1))
    loss_over_all(lambda x, y: torch.tensor(1.0), data, 2, T, torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[VAL] final loss: 48 of 96 targets"
    assert lines[-1] == "[VAL] final loss: 96 targets (28.0 s)" and len(lines) == 3


def test_mean_loss_weighs_targets_and_not_batches():
    batches = [
        (torch.tensor([[1, 2]]), torch.tensor([[10, -100]])),
        (torch.tensor([[3, 4]]), torch.tensor([[20, 30]])),
    ]
    assert mean_loss(lambda x, y: y[y != -100].sum(), batches) == 20.0


def test_the_loss_is_in_the_configured_dtype():
    """config.dtype as in training: bfloat16 differs from float32 and is what autocast gives."""
    model, data = make_model(), tokens(300)
    full, low = (evaluate_model_loss(model, data, config(dtype=d)) for d in ("float32", "bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = validate(model, data, 4, T, device="cpu", num_val_batches=20)
    assert low == expected != full
    assert low == pytest.approx(full, rel=2e-3)
    assert validate(model, data, 4, T, device="cpu", num_val_batches=20) == full


def test_labels_are_checked_after_the_last_loss(monkeypatch):
    """On a GPU a bad label makes a loss NaN, and check_labels() raises; it reads from the device,
    so it is called once."""
    calls = []
    monkeypatch.setattr("fastlm.evaluate.check_labels", lambda: calls.append("check"))

    def loss(x, y):
        calls.append("loss")
        return torch.tensor(1.0)

    x = y = torch.zeros(2, 3, dtype=torch.int64)
    assert mean_loss(loss, [(x, y)] * 3) == 3 / 18
    assert calls == ["loss", "loss", "loss", "check"]
    data = tokens(300)
    data[-1] = VOCAB_SIZE  # a target alone
    with pytest.raises(ValueError, match=rf"{VOCAB_SIZE}"):
        evaluate_model_loss(make_model(), data, config())


def test_bits_per_byte():
    # 100 tokens at 8 bits each, over 200 bytes of text.
    assert bits_per_byte(8 * math.log(2), 100, 200) == pytest.approx(4.0)
