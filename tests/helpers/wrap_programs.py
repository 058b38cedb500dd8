"""What the ranks of test_wrap.py run: a tiny model wrapped, against the same in one process; and
of test_loss_clients.py, without a wrap of ours."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastlm import AdamW, TransformerLM, cross_entropy_loss, linear_cross_entropy_loss
from fastlm.errors import ConfigError
from fastlm.model_interface import blocks_of
from fastlm.parallel.world import World
from fastlm.parallel.wrap import micro_step, wrap

V, T, B = 61, 8, 2


class Loss(nn.Module):
    """Model and loss in one."""

    def __init__(self, seed=0, tie=False, dtype=torch.float32, extra=False):
        super().__init__()
        torch.manual_seed(seed)
        self.model = TransformerLM(V, 16, 2, 2, T, tie_embeddings=tie)
        self.dtype = dtype
        self.extra = nn.Parameter(torch.ones(3)) if extra else None

    def forward(self, x, y, num_items):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32):
            hidden = self.model.hidden(x).to(self.dtype)
        weight = self.model.lm_head.weight
        assert not isinstance(weight, DTensor)  # gathered by the wrap, not by the op
        return linear_cross_entropy_loss(hidden, weight, y, num_items=num_items)


def batch(step, samples):
    """x, y: (samples, T), and how many labels count: their number differs from sample to sample."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(0, V, (samples, T + 1), generator=generator)
    x, y = tokens[:, :-1], tokens[:, 1:].clone()
    for row in range(samples):
        y[row, : row * 5 % T] = -100
    return x, y, int((y != -100).sum())


def optimizer_of(module):
    # With a large eps: where a gradient is almost 0, the default would divide its rounding by it.
    return AdamW(module.parameters(), lr=0.01, eps=1e-3, max_grad_norm=0.3)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def run_step(module, world, step, accum):
    """Forward and backward of this rank's micro-batches; returns the loss of all."""
    x, y, num_items = batch(step, world.size * accum * B)
    total = torch.zeros(())
    for micro in range(accum):
        first = (micro * world.size + world.rank) * B
        with micro_step(module, last=micro == accum - 1):
            loss = module(x[first : first + B], y[first : first + B], num_items)
            loss.backward()
        total += loss.detach()
    return world.sum(total)


def distance(actual, expected):
    """|actual - expected| / |expected|, over all tensors together."""
    pairs = [(full(a).double(), e.double()) for a, e in zip(actual, expected, strict=True)]
    off = sum((a - e).square().sum() for a, e in pairs).sqrt()
    return (off / sum(e.square().sum() for _, e in pairs).sqrt()).item()


def compare(
    world, accum, *, steps=3, tie=False, meta=False, compiled=None, tolerance=1e-6, **options
):
    """Runs steps wrapped, and in one process on the whole batch; they must agree."""
    alone = Loss(tie=tie)
    with torch.device("meta" if meta and not world.is_main else "cpu"):
        inner = Loss(seed=world.rank, tie=tie)  # rank 0's weights count
    if compiled:
        for block in blocks_of(inner):
            block.compile(dynamic=False, backend=compiled)
    module = wrap(inner, world, **options)
    optimizers = optimizer_of(module), optimizer_of(alone)
    for step in range(steps):
        loss = run_step(module, world, step, accum)
        expected = alone(*batch(step, world.size * accum * B))
        expected.backward()
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        gradients = [p.grad for p in module.parameters()]
        off = distance(gradients, [p.grad for p in alone.parameters()])
        assert off <= tolerance, f"gradients of step {step} are off by {off}"
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        norms = [float(o.last_grad_norm) for o in optimizers]
        assert abs(norms[0] / norms[1] - 1) <= tolerance and norms[1] > 0.3, norms
    off = distance([p.detach() for p in module.parameters()], list(alone.parameters()))
    assert off <= tolerance, f"weights are off by {off}"


@contextlib.contextmanager
def case(world, name):
    yield
    print(f"passed {name}")


def sums(argv):
    """Gradients, norms and weights are those of one process."""
    with World.start("cpu", timeout_minutes=1) as world:
        for parallel in ("ddp", "fsdp"):
            for accum in (1, 3):
                with case(world, f"{parallel} {accum}"):
                    compare(world, accum, parallel=parallel)
        with case(world, "fsdp kept"):
            compare(world, 3, parallel="fsdp", reshard=False)
        with case(world, "tied"):
            compare(world, 2, parallel="fsdp", tie=True)
        with case(world, "meta"):
            compare(world, 1, parallel="fsdp", tie=True, meta=True, steps=2)
            compare(world, 1, parallel="ddp", tie=True, meta=True, steps=2)


def compiled(argv):
    """Blocks compiled in place give the same losses, gradients and weights."""
    with World.start("cpu", timeout_minutes=5) as world:
        for parallel in ("ddp", "fsdp"):
            with case(world, parallel):
                compare(world, 2, parallel=parallel, compiled=argv[0], steps=2, tolerance=1e-5)


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def collectives(module, world):
    """[(operation, how often)] in a step of three micro-batches."""
    with Collectives() as mode:
        run_step(module, world, 1, 3)
    return sorted(mode.counts.items())


def communication(argv):
    """What a step of three micro-batches sends, and what is left behind an evaluation."""
    with World.start("cpu", timeout_minutes=1) as world:
        module = wrap(Loss(), world)
        for step in range(2):  # after the first, DDP arranges its buckets anew
            run_step(module, world, step, 1)
        print("ddp:", collectives(module, world))
        for reshard in (False, True):
            module = wrap(Loss(), world, parallel="fsdp", reshard=reshard)
            run_step(module, world, 0, 1)
            print(f"reshard={reshard}:", collectives(module, world))
            with torch.no_grad():
                module(*batch(0, B))
            assert all(isinstance(p, DTensor) for p in module.parameters())


def mixed(argv):
    """bfloat16: FSDP2's loss is DDP's up to rounding, its gradients and weights are fp32."""
    with World.start("cpu", timeout_minutes=1) as world:
        losses = {}
        for parallel in ("ddp", "fsdp"):
            module = wrap(
                Loss(dtype=torch.bfloat16), world, parallel=parallel, dtype=torch.bfloat16
            )
            optimizer = optimizer_of(module)
            losses[parallel] = []
            for step in range(6):
                losses[parallel].append(run_step(module, world, step % 2, 2).item())
                assert {p.grad.dtype for p in module.parameters()} == {torch.float32}
                optimizer.step()
                optimizer.zero_grad()
            assert {p.dtype for p in module.parameters()} == {torch.float32}
        print(losses)
        for a, b in zip(*losses.values(), strict=True):
            assert abs(a / b - 1) < 2e-3, losses
        assert losses["fsdp"][-1] < losses["fsdp"][0]


class Uneven(nn.Module):
    """Rank 0 uses `some`, nobody uses `none`."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank
        self.all, self.some, self.none = (nn.Parameter(torch.ones(4)) for _ in range(3))

    def forward(self, x):
        return (x * self.all).sum() + ((x * self.some).sum() if self.rank == 0 else 0)


def unused(argv):
    """Parameters without a gradient on some ranks, or on all. FSDP2 knows "some" since 2.13."""
    knows_some = hasattr(FSDPModule, "set_reduce_scatter_unused_params")
    with World.start("cpu", timeout_minutes=1) as world:
        for parallel in ("ddp", "fsdp"):
            all_use_it = parallel == "fsdp" and not knows_some
            rank = 0 if all_use_it else world.rank
            module = wrap(Uneven(rank), world, parallel=parallel, find_unused=True)
            for _ in range(3):
                with micro_step(module, last=True):
                    module(torch.full((4,), 1.0 + world.rank)).backward()
                named = {name.split(".")[-1]: p.grad for name, p in module.named_parameters()}
                total = sum(range(1, world.size + 1))
                assert full(named["all"]).tolist() == [total] * 4
                assert full(named["some"]).tolist() == [total if all_use_it else 1.0] * 4
                none = named["none"]
                assert none is None or (parallel == "fsdp" and full(none).tolist() == [0.0] * 4)
                module.zero_grad()


def refusals(argv):
    with World.start("cpu", timeout_minutes=1) as world:
        try:
            wrap(Loss(), world, parallel="fsdp", dtype=torch.float16)
        except ConfigError as error:
            print(error)


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 31)

    def forward(self, x, y):
        hidden = self.trunk(x)
        return linear_cross_entropy_loss(hidden, self.head.weight, y, bias=self.head.bias)


def sharded_head(argv):
    """A head that FSDP2 shards by itself, so that the loss gets DTensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = Head()
    x, y = torch.randn(12, 6), torch.randint(31, (12,))
    expected = F.cross_entropy(model.head(model.trunk(x)), y)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    fully_shard(model.trunk), fully_shard(model.head)  # apart
    assert isinstance(model.head.weight, DTensor)
    rows = slice(6 * rank, 6 * rank + 6)
    loss = model(x[rows], y[rows])
    loss.backward()
    dist.all_reduce(loss := loss.detach() / 2)
    torch.testing.assert_close(loss, expected.detach())
    for name, p in model.named_parameters():
        torch.testing.assert_close(full(p.grad), gradients[name], rtol=1e-5, atol=1e-6)
    logits = DTensor.from_local(torch.randn(3, 5), model.head.weight.device_mesh)
    with pytest.raises(TypeError, match=r"logits is a DTensor.*to_local"):
        cross_entropy_loss(logits, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"hidden is a DTensor.*to_local"):
        linear_cross_entropy_loss(logits, torch.ones(9, 5), y[:6])
    dist.destroy_process_group()
    print("right")
