"""Both losses under torch.compile and torch.export: how many graphs, for which sizes.

N rows, D model width, V vocabulary.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastlm import cross_entropy_loss, linear_cross_entropy_loss

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo warns users of a cached function in what it traces.
    pytest.mark.filterwarnings("error:.*lru_cache"),
]

SIZES = [7, 12, 5, 33, 8, 64, 21, 12, 100, 3, 46, 19]  # as in clients.md: 12 sizes


class Model(nn.Module):
    """A model with its loss inside."""

    def __init__(self, linear: bool, **options):
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(6, 8), nn.Linear(8, 31, bias=False)
        self.linear, self.options = linear, options

    def forward(self, x, y, num_items=None):
        hidden = self.trunk(x)
        options = {"num_items": num_items, **self.options}
        if self.linear:
            return linear_cross_entropy_loss(hidden, self.head.weight, y, **options)
        return cross_entropy_loss(self.head(hidden), y, **options)


def batch(N):
    generator = torch.Generator().manual_seed(N)
    y = torch.randint(31, (N,), generator=generator)
    y[::4] = -100
    return torch.randn(N, 6, generator=generator), y


def assert_same(compiled, model, *arguments):
    results = []
    for run in (compiled, model):
        model.zero_grad()
        loss = run(*arguments)
        loss.backward()
        results.append((loss.detach(), *(p.grad.clone() for p in model.parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def graphs_with_operations(counter):
    """torch 2.10 hands the backend an empty graph as well."""
    nodes = [[node.op for node in graph.graph.nodes] for graph in counter.graphs]
    return sum("call_function" in ops for ops in nodes)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


both = pytest.mark.parametrize("linear", [False, True], ids=["cross_entropy", "linear"])
CHUNKED = {"memory_budget": 3000}


@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)])
@both
def test_one_graph_for_all_numbers_of_rows(linear, dynamic, graphs):
    # By default the first size has a graph of its own, the second is where sizes become dynamic.
    for options in ({}, CHUNKED) if linear else ({}, {"inplace": True}):
        counter = CompileCounterWithBackend("aot_eager")
        model = Model(linear, **options)
        compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=counter)
        for N in SIZES:
            assert_same(compiled, model, *batch(N))
        assert 0 < graphs_with_operations(counter) <= graphs
        torch._dynamo.reset()


@both
def test_rows_marked_as_dynamic(linear):
    counter = CompileCounterWithBackend("aot_eager")
    model = Model(linear)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for N in SIZES[:4]:
        x, y = batch(N)
        for tensor in (x, y):
            torch._dynamo.mark_dynamic(tensor, 0)
        assert_same(compiled, model, x, y)
    assert counter.frame_count == 1


def test_number_of_valid_rows_is_no_constant():
    counter = CompileCounterWithBackend("aot_eager")

    def loss_of(hidden, weight, y, num_valid):
        return linear_cross_entropy_loss(hidden, weight, y, num_valid=num_valid)

    compiled = torch.compile(loss_of, fullgraph=True, backend=counter)
    weight = torch.randn(31, 6)
    for N in (8, 12, 16, 20, 24):
        x, y = batch(N)
        num_valid = int((y != -100).sum())
        torch.testing.assert_close(
            compiled(x, weight, y, num_valid), loss_of(x, weight, y, num_valid)
        )
    assert counter.frame_count <= 2


@both
def test_changing_num_items_makes_no_graph(linear):
    # A Python float is a constant at first, a number from its second value on.
    for values, graphs in (
        ([torch.tensor(float(n)) for n in range(1, 7)], 1),
        ([float(n) + 0.5 for n in range(1, 7)], 2),
        (range(2, 8), 2),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = Model(linear)
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for value in values:
            assert_same(compiled, model, *batch(12), value)
        assert 0 < graphs_with_operations(counter) <= graphs


@both
def test_export_with_a_dynamic_batch(linear):
    model = Model(linear)
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(model, batch(12), dynamic_shapes={"x": {0: rows}, "y": {0: rows}})
    for N in (5, 12, 300):
        torch.testing.assert_close(program.module()(*batch(N)), model(*batch(N)))


@pytest.mark.exhaustive
@both
def test_inductor_with_dynamic_rows(linear):
    model = Model(linear)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for N in (7, 12, 100):
        assert_same(compiled, model, *batch(N))
        assert_same(compiled, model, *batch(N), 3.5)
