"""causal_attention as an op of torch's dispatcher: compiled, exported, checkpointed, transformed.

B batch, H query heads, H_kv key heads, T positions, d head width.
"""

import pytest
import torch
from causal_attention_cases import NAMES, make, results
from tolerance import assert_bitwise_equal
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastlm import causal_attention
from fastlm.model import rope_tables
from fastlm.ops import causal_attention_cpp as cpp
from fastlm.ops.causal_attention import causal_attention_reference

pytestmark = pytest.mark.usefixtures("one_thread")

H, H_KV, WIDTH = 4, 2, 8


class Layer(nn.Module):
    """Attention between two projections."""

    def __init__(self, max_T: int = 100):
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(6, (H + 2 * H_KV) * WIDTH)
        self.after = nn.Linear(H * WIDTH, 6)
        cos, sin = rope_tables(max_T, WIDTH, 100.0)
        self.register_buffer("cos", cos), self.register_buffer("sin", sin)

    def forward(self, x):  # (B, T, 6)
        rope = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        heads = self.before(x).unflatten(-1, (H + 2 * H_KV, -1)).transpose(1, 2)
        y = causal_attention(*heads.split((H, H_KV, H_KV), dim=1), rope=rope)
        return self.after(y.transpose(1, 2).flatten(-2))


def batch(B, T):
    return torch.randn(B, T, 6, generator=torch.Generator().manual_seed(B * T))


def assert_same(run, model, x):
    found = []
    for function in (run, model):
        model.zero_grad()
        y = function(x)
        y.square().sum().backward()
        found.append((y.detach(), *(p.grad.clone() for p in model.parameters())))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "dtype, rope",
    [
        (torch.bfloat16, True),
        pytest.param(torch.float32, False, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_opcheck(dtype, rope):
    case = make((2, H, H_KV), 9, WIDTH, dtype, rope=rope, scale=0.4)
    tables = case.rope or (None, None)
    ops = torch.ops.fastlm
    leaves = [x.detach().requires_grad_() for x in (case.q, case.k, case.v)]
    torch.library.opcheck(ops.causal_attention.default, (*leaves, 0.4, *tables))
    out, stats = ops.causal_attention(case.q, case.k, case.v, None, *tables)
    arguments = (out.clone(), case.q, case.k, case.v, out, stats, None, *tables)
    torch.library.opcheck(ops.causal_attention_gradients.default, arguments)


@pytest.mark.parametrize(
    "dynamic, graphs", [pytest.param(True, 1, marks=pytest.mark.exhaustive), (None, 2)]
)
def test_one_graph_for_all_sizes(dynamic, graphs):
    # By default the first size has a graph of its own, the second is where sizes become dynamic.
    counter = CompileCounterWithBackend("aot_eager")
    model = Layer()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
    for B, T in ((2, 7), (3, 12), (2, 33), (5, 64)):
        assert_same(compiled, model, batch(B, T))
    # The backend may be handed an empty graph as well.
    nodes = [[node.op for node in graph.graph.nodes] for graph in counter.graphs]
    assert 0 < sum("call_function" in ops for ops in nodes) <= graphs


@pytest.mark.parametrize("dynamic", [True, None])
def test_sdpa_compiles_for_any_size(dynamic):
    # What a GPU runs, and generated tokens. Of a size that varies a comparison is no bool.
    def attend(q, k):
        return causal_attention(q, k, k, impl="torch")

    for sizes in ([(5, 5), (6, 6), (9, 9)], [(1, 5), (1, 6), (1, 9)], [(3, 5), (3, 6), (4, 9)]):
        torch._dynamo.reset()
        compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for Tq, Tk in sizes:
            q, k = torch.randn(2, H, Tq, WIDTH), torch.randn(2, H_KV, Tk, WIDTH)
            torch.testing.assert_close(compiled(q, k), attend(q, k))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dynamic", [True, False])
def test_inductor(dynamic):
    model = Layer()
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic)
    for B, T in ((2, 7), (3, 12)):
        assert_same(compiled, model, batch(B, T))
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = compiled(batch(B, T)), model(batch(B, T))
        torch.testing.assert_close(y, expected, rtol=3e-2, atol=3e-2)


def test_export_with_dynamic_sizes():
    model = Layer()
    sizes = {0: torch.export.Dim("B", min=2, max=64), 1: torch.export.Dim("T", min=2, max=64)}
    program = torch.export.export(model, (batch(3, 5),), dynamic_shapes={"x": sizes})
    for B, T in ((3, 5), (2, 64), (9, 2)):
        torch.testing.assert_close(program.module()(batch(B, T)), model(batch(B, T)))


def test_activation_checkpointing():
    model = Layer()
    assert_same(lambda x: checkpoint(model, x, use_reentrant=False), model, batch(2, 9))


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_under_autocast(impl):
    case = make((2, 4, 2), 19, 16, rope=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(causal_attention, case, impl=impl)
        mixed = causal_attention(case.q, case.k.bfloat16(), case.v, rope=case.rope, impl=impl)
    expected = results(causal_attention, case.to(torch.bfloat16), impl=impl)
    assert got[0].dtype == torch.bfloat16 and got[1].dtype == torch.float32
    for name, x, y in zip(NAMES, got, expected, strict=True):
        assert_bitwise_equal(x.bfloat16(), y, name)
    assert_bitwise_equal(mixed.detach(), expected[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fast", [True, False])
def test_few_queries_in_16_bits_go_to_sdpa_but_on_amd(monkeypatch, fast, dtype):
    monkeypatch.setattr(cpp, "runs_bf16_dots", lambda: fast)
    for Tq, Tk in ((1, 64), (7, 64), (1, 63), (1, 1)):
        case = make((2, 4, 2), Tk, 8, dtype=dtype, Tq=Tq)
        counted = FlopCounterMode(display=False)
        with counted:
            found = results(causal_attention, case)
            causal_attention(case.q, case.k, case.v, dropout_p=0.5)  # by SDPA, whatever the rest
        by_cpp = "fastlm" in str(counted.get_flop_counts())
        assert by_cpp == (fast and dtype != torch.float32 and Tk == 64), (Tq, Tk)
        expected = results(causal_attention_reference, case.to(torch.float64))
        for name, x, y in zip(NAMES, found, expected, strict=True):  # which keys; no accuracy
            torch.testing.assert_close(x.double(), y, rtol=0.05, atol=0.05, msg=f"{name} {Tq} {Tk}")


def test_one_query_in_16_bits_is_compiled_as_one_graph():
    case = make((2, 2, 2), 64, 8, dtype=torch.bfloat16, Tq=1)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(case.q, case.k, case.v)
        expected = causal_attention(case.q, case.k, case.v, impl="torch")
        assert_bitwise_equal(out, expected, "out")


def test_few_queries_and_dropout_go_to_sdpa():
    case = make((2, 2, 2), 9, 8, Tq=7)
    counted = FlopCounterMode(display=False)
    with counted:
        causal_attention(case.q, case.k, case.v)
        causal_attention(case.q[..., :1, :], case.k[..., :1, :], case.v[..., :1, :])
        one = causal_attention(case.k, case.k, case.v, dropout_p=0.5)
        torch.manual_seed(0)
        two = causal_attention(case.k, case.k, case.v, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(causal_attention(case.k, case.k, case.v, dropout_p=0.5), two)
    assert not torch.equal(one, two)
    assert "fastlm" not in str(counted.get_flop_counts()["Global"])
    for Tq, Tk in ((7, 7), (8, 9)):
        with counted:
            causal_attention(case.k[..., :Tq, :], case.k[..., :Tk, :], case.v[..., :Tk, :])
        assert "fastlm" in str(counted.get_flop_counts()["Global"]), (Tq, Tk)


def test_flops_are_counted_as_sdpas():
    model, x = Layer(), batch(2, 9)
    counted = FlopCounterMode(display=False)
    with counted:
        model(x).sum().backward()
    by_op = counted.get_flop_counts()["Global"]
    attention = sum(flops for op, flops in by_op.items() if "causal_attention" in str(op))
    assert attention == 7 * 2 * 2 * H * 9 * 9 * WIDTH


def test_second_derivative():
    case = make(T=7, d=8)
    q = case.q.requires_grad_()
    out = causal_attention(q, case.k, case.v)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl='torch' inside .*MATH"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
    with sdpa_kernel(SDPBackend.MATH):
        out = causal_attention(q, case.k, case.v, impl="torch")
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert first.square().sum().requires_grad


def test_transforms():
    case = make(T=7, d=8)

    def loss(q, **options):
        return causal_attention(q, case.k, case.v, **options).square().sum()

    gradient = torch.func.grad(loss)(case.q)
    leaf = case.q.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"use impl='torch' under torch\.func.grad, vmap"):
        torch.func.grad(lambda q: loss(q, impl="cpp"))(case.q)


def test_gradient_numerically():
    # Central differences of the fp64 reference along random directions.
    case = make((1, 4, 2), 11, 8, rope=True)
    _, *gradients = results(causal_attention, case)
    wide = case.to(torch.float64)
    for index, gradient in enumerate(gradients):
        tensors = [wide.q, wide.k, wide.v]
        direction = torch.randn_like(tensors[index])
        values = []
        for step in (1e-6, -1e-6):
            moved = list(tensors)
            moved[index] = moved[index] + step * direction
            out = causal_attention_reference(*moved, rope=case.rope)
            values.append((out * wide.grad_out).sum())
        expected = (values[0] - values[1]) / 2e-6
        torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-4)


def test_some_gradients_only():
    case = make(T=9, d=8)
    dk = results(causal_attention, case)[2]
    k = case.k.clone().requires_grad_()
    (only,) = torch.autograd.grad(causal_attention(case.q, k, case.v), k, case.grad_out)
    assert_bitwise_equal(only, dk)
    assert not causal_attention(case.q, case.k, case.v).requires_grad
