"""Steps of one's own and of the trainer on a GPU: graphs, streams, scalers, no waiting.

N rows, D model width, V vocabulary.
"""

import copy

import pytest
import torch
from gpu import DEVICES, NO_GPU, nothing_waits, on_another_stream, on_cuda, recorded
from torch import nn
from training_runs import tiny_config, tokens

from fastlm import (
    AdamW,
    check_labels,
    clip_gradients,
    create_model_and_optimizer,
    cross_entropy_loss,
    linear_cross_entropy_loss,
)
from fastlm.data.loader import TrainLoader
from fastlm.model_loss import ModelLoss
from fastlm.step import TrainStep, set_seed

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, V = 48, 32, 200


class Model(nn.Module):
    """Two layers and a head; linear: head and loss in one op."""

    def __init__(self, linear: bool):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D))
        self.head, self.linear = nn.Linear(D, V, bias=False), linear

    def forward(self, x, y):
        hidden = self.body(x)
        if self.linear:
            return linear_cross_entropy_loss(hidden, self.head.weight, y)
        return cross_entropy_loss(self.head(hidden), y)


def make_model(device, *, linear=True, dtype=torch.float32):
    torch.manual_seed(0)
    return Model(linear).to(device, dtype)


def batch(number: int, device):
    generator = torch.Generator().manual_seed(number)
    y = torch.randint(V, (N,), generator=generator)
    y[::5] = -100
    return torch.randn(N, D, generator=generator).to(device), y.to(device)


def assert_same_parameters(model, other, *, mean=1e-5, largest=5e-3):
    """mean: of the differences' sizes, a thousandth of what one step of lr = 1e-2 changes. Single
    elements may be as far apart as a step: Adam divides a gradient by its size, and of one that is
    nearly 0 two kernels may find another sign."""
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        error = (p.detach().cpu().double() - q.detach().cpu().double()).abs()
        assert error.mean() <= mean and error.max() <= largest, f"{name}: {error.mean()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_whole_step_in_a_graph(split, linear, device):
    """Loss, backward, clipping and update are recorded once; batches and the learning rate, a
    tensor, change between replays. The same as without a graph."""
    device = torch.device(device)
    dtype, precision = (torch.bfloat16, "split") if split else (torch.float32, "native")
    model = make_model(device, linear=linear, dtype=dtype)
    twin = copy.deepcopy(model)
    lr = torch.tensor(1e-2, device=device)
    optimizers = [
        AdamW(m.parameters(), lr=rate, max_grad_norm=0.5, param_precision=precision)
        for m, rate in ((model, lr), (twin, 1e-2))
    ]
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in batch(0, device))
    loss = torch.zeros((), device=device)

    def step() -> None:
        optimizers[0].zero_grad(set_to_none=True)
        now = model(x, y)
        now.backward()
        optimizers[0].step()
        loss.copy_(now.detach())

    with on_another_stream(device):
        for _ in range(2):
            step()
    replay = recorded(step, device)
    expected = []
    for number, rate in ((0, 1e-2), (0, 1e-2), (1, 1e-2), (2, 3e-3), (3, 3e-2), (4, 1e-2)):
        optimizers[1].param_groups[0]["lr"] = rate
        optimizers[1].zero_grad()
        their_x, their_y = batch(number, device)
        their_loss = twin(their_x.to(dtype), their_y)
        their_loss.backward()
        optimizers[1].step()
        expected.append(float(their_loss.detach()))
        if len(expected) > 2:  # the first two were the warm-up
            x.copy_(their_x)
            y.copy_(their_y)
            lr.fill_(rate)
            replay()
            assert float(loss) == pytest.approx(expected[-1], rel=2e-2 if split else 1e-5)
    assert optimizers[0].state[model.head.weight]["step"].item() == 6
    assert_same_parameters(model, twin, **({"mean": 1e-3, "largest": 2e-2} if split else {}))
    check_labels()


@pytest.mark.parametrize("device", DEVICES)
def test_a_replay_keeps_the_steps_outside_right(device):
    """An eager step between two replays: each reads its own copy of addresses and settings."""
    device = torch.device(device)
    model = make_model(device)
    twin = copy.deepcopy(model)
    optimizers = [AdamW(m.parameters(), lr=1e-2, max_grad_norm=1.0) for m in (model, twin)]
    x, y = batch(0, device)

    def step(m=model, optimizer=optimizers[0]) -> None:
        m(x, y).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    replay = recorded(step, device)
    for run in (replay, step, replay, step):
        run()
    for _ in range(5):
        step(twin, optimizers[1])
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_training_step_waits_for_nothing(dtype, optimizer, device, tmp_path):
    """All of TrainStep.run: batches, two micro-batches, guard, scaler, clipping, update."""
    cfg = tiny_config(
        tmp_path, device=device, dtype=dtype, optimizer=optimizer, grad_accum=2, dropout=0.1,
        guard="skip", qk_norm=True,
    )  # fmt: skip
    device = torch.device(device)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(tokens(4000), cfg.batch_size, cfg.context_len, seed=0, device=device)
    runner = TrainStep(ModelLoss(model, device, cfg), optimizer, loader, cfg)
    losses = [runner.run(0, lr=1e-3)]
    norms = []
    with nothing_waits(device):
        for step in range(1, 4):
            losses.append(runner.run(step * runner.samples, lr=1e-3))
            norms.append(optimizer.last_grad_norm)
    assert all(torch.stack(losses).isfinite().tolist()) and all(float(n) > 0 for n in norms)
    assert runner.good.item() and runner.guard.steps == 4
    check_labels()


MODELS = {
    "joint": dict(joint_projections=True),
    "mixes": dict(value_residual=True, embedding_residual=True, joint_projections=True),
    "mask and groups": dict(num_heads=4, num_kv_heads=2),
}


@pytest.mark.parametrize(
    "device, compiled", [("cpu", False), pytest.param("cuda", True, marks=on_cuda.marks)]
)
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_a_step_of_every_model(options, device, compiled, tmp_path):
    """In bf16, near the loss of float32 without what only CUDA has; nothing waits."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        cfg = tiny_config(tmp_path, device=device, dtype=dtype, compile=compiled, **options)
        place = torch.device(device)
        set_seed(cfg.seed)
        model, optimizer, _ = create_model_and_optimizer(cfg)
        model.document_end = 3 if "num_kv_heads" in options else None
        loader = TrainLoader(tokens(4000), cfg.batch_size, cfg.context_len, seed=0, device=place)
        runner = TrainStep(ModelLoss(model, place, cfg), optimizer, loader, cfg)
        steps = [runner.run(0, lr=1e-3)]
        with nothing_waits(place):
            steps += [runner.run(step * runner.samples, lr=1e-3) for step in range(1, 4)]
        losses[dtype] = torch.stack(steps).cpu()
    torch.testing.assert_close(losses["bfloat16"], losses["float32"], rtol=5e-3, atol=5e-3)
    check_labels()


def test_what_waits_is_found():
    with nothing_waits(torch.device("cpu")), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones(()).item()


@pytest.mark.parametrize("device", DEVICES)
def test_steps_on_another_stream(device):
    """Kernels, their tables and what is freed stay on the stream that the caller is on."""
    device = torch.device(device)
    model = make_model(device)
    twin = copy.deepcopy(model)
    optimizers = [AdamW(m.parameters(), lr=1e-2, max_grad_norm=1.0) for m in (model, twin)]
    for number in range(4):
        with on_another_stream(device):
            if device.type == "cuda":
                torch.cuda._sleep(20_000_000)  # 10 ms: what does not wait for it comes too early
            x, y = batch(number, device)
            loss = model(x, y)
            loss.backward()
            clip_gradients(model.parameters(), 0.5)
            optimizers[0].step()
            optimizers[0].zero_grad()
        expected = twin(*batch(number, device))
        expected.backward()
        clip_gradients(twin.parameters(), 0.5)
        optimizers[1].step()
        optimizers[1].zero_grad()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_parameters(model, twin)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("linear", [False, True])
def test_grad_scaler(linear, device):
    """float16 under autocast, as torch's own step with its scaler and clip_grad_norm_; a step that
    overflows changes nothing and halves the scale; nothing waits for the device."""
    device = torch.device(device)
    model = make_model(device, linear=linear)
    twin = copy.deepcopy(model)
    ours = AdamW(model.parameters(), lr=1e-2, max_grad_norm=0.5)
    theirs = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**12) for _ in range(2)]

    def step(m, optimizer, scaler, x, y, clip=None):
        with torch.autocast(device.type, torch.float16):
            loss = m(x, y)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(m.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    for number in range(4):
        x, y = batch(number, device)
        if number:
            with nothing_waits(device):
                step(model, ours, scalers[0], x, y)
        else:
            step(model, ours, scalers[0], x, y)
        step(twin, theirs, scalers[1], x, y, clip=0.5)
    # Gradients of either are rounded to 11 bits, and Adam divides by their size.
    assert_same_parameters(model, twin, mean=5e-4, largest=2e-2)

    before = copy.deepcopy(model)
    scale = scalers[0].get_scale()
    x, y = batch(9, device)
    step(model, ours, scalers[0], x * 1e30, y)
    assert scalers[0].get_scale() == scale / 2
    assert_same_parameters(model, before, mean=0, largest=0)
    step(model, ours, scalers[0], x, y)
    assert not torch.equal(model.head.weight, before.head.weight)


SECOND = pytest.param(
    "cuda:1",
    marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"{NO_GPU} and a second one"),
)


@pytest.mark.parametrize("device", ["cpu", SECOND])
def test_a_device_that_is_not_the_current_one(device):
    model, twin = make_model(device), make_model("cpu")
    for m, place in ((model, device), (twin, "cpu")):
        optimizer = AdamW(m.parameters(), lr=1e-2, max_grad_norm=0.5)
        for number in range(3):
            m(*batch(number, place)).backward()
            clip_gradients(m.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        x, y = batch(0, place)
        y[7] = V
        if place == "cpu":
            with pytest.raises(ValueError, match=rf"targets\[7\] = {V}"):
                m(x, y)
        else:
            assert torch.cuda.current_device() == 0 and m(x, y).isnan()
            with pytest.raises(ValueError, match=rf"\[7\] = {V}"):
                check_labels()
    assert_same_parameters(model, twin)
