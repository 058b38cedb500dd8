"""What AdamW accepts, what it refuses, and what it tells afterwards."""

import pytest
import torch
from adamw_runs import HYPER, AdamW, parameters, run, set_gradients
from tolerance import assert_bitwise_equal

from fastlm import active_implementation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_arguments_of_torchs_class():
    # nanoGPT passes fused=True; others what picks torch's implementation. It picks nothing here.
    params, expected = parameters(), parameters()
    optimizer = AdamW(params, **HYPER, fused=True, foreach=False, capturable=False, amsgrad=False)
    run(optimizer, params, range(3))
    run(AdamW(expected, **HYPER), expected, range(3))
    for p, q in zip(params, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@pytest.mark.parametrize("option", ["amsgrad", "maximize", "differentiable"])
def test_refused_options(option):
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        AdamW(parameters(), **{option: True})
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        AdamW([{"params": parameters(), option: True}])


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite", "impl"])
def test_options_of_the_optimizer_in_a_group(option):
    with pytest.raises(ValueError, match=f"{option} is the optimizer's, not a group's"):
        AdamW([{"params": parameters(), option: 1.0}])


def test_unknown_options():
    with pytest.raises(TypeError, match="no argument 'momentum'"):
        AdamW(parameters(), momentum=0.9)
    with pytest.raises(ValueError, match="param_precision='fp8': it must be 'native' or 'split'"):
        AdamW(parameters(), param_precision="fp8")


def test_parameters_that_cannot_be_trained():
    with pytest.raises(TypeError, match=r"shape \(3,\).*float8_e4m3fn"):
        AdamW([torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn))])
    with pytest.raises(TypeError, match="complex64"):
        AdamW([torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    with pytest.raises(ValueError, match=r"shape \(5, 3\).*overlaps itself"):
        AdamW([torch.nn.Parameter(torch.ones(3)).data.expand(5, 3).requires_grad_()])
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="twice"), pytest.warns(UserWarning, match="duplicate"):
        AdamW([param, param])


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = AdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match=r"sparse.*sparse=False"):
        optimizer.step()
    assert_bitwise_equal(embedding.weight.detach(), before)


@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_implementations_agree(impl):
    assert active_implementation("adamw") == active_implementation("clip_grad_norm") == "cpp"
    for dtype, precision in (
        (torch.float32, "native"), (torch.bfloat16, "native"), (torch.bfloat16, "split"),
        (torch.float64, "native"),
    ):  # fmt: skip
        params, expected = parameters(dtype), parameters(dtype)
        options = dict(**HYPER, max_grad_norm=2.0, param_precision=precision)
        optimizer = AdamW(params, **options, impl=impl)
        other = AdamW(expected, **options)
        run(optimizer, params, range(6))
        params[3].grad = torch.full_like(params[3], torch.nan)  # skipped
        optimizer.step()
        assert optimizer.first_nonfinite()[:2] == (0, 3)
        run(optimizer, params, range(6, 8))
        run(other, expected, range(8))
        weights = zip(optimizer.master_weights(), other.master_weights(), strict=True)
        tolerance = 4 * torch.finfo(dtype).eps if precision == "native" else 1e-6
        for p, q in weights:
            torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(optimizer.last_grad_norm, other.last_grad_norm)


# Which gradient was NaN


def test_first_nonfinite():
    params = parameters()
    optimizer = AdamW([{"params": params[:3]}, {"params": params[3:]}], max_grad_norm=1.0)
    run(optimizer, params, range(1))
    assert optimizer.first_nonfinite() is None
    set_gradients(params, 1)
    params[0].grad = None  # rows of the table are not the parameters' positions
    params[5].grad[77] = torch.inf
    params[4].grad[3, 4] = torch.nan
    optimizer.step()
    position = optimizer.first_nonfinite()
    assert (position.group, position.index, position.name) == (1, 1, None)
    run(optimizer, params, range(2, 3))
    assert optimizer.first_nonfinite() is None


def test_first_nonfinite_by_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = AdamW(model.named_parameters(), skip_nonfinite=True)
    model(torch.ones(1, 3)).sum().backward()
    model[1].weight.grad[0, 0] = torch.inf
    optimizer.step()
    assert optimizer.first_nonfinite().name == "1.weight"
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"


def test_first_nonfinite_needs_a_norm():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, range(1))
    with pytest.raises(RuntimeError, match="max_grad_norm or skip_nonfinite"):
        optimizer.first_nonfinite()


def test_beside_a_compiled_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    plain = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    plain.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(32, 8)
    for net in (compiled, plain):
        optimizer = AdamW(net.parameters(), lr=1e-2, max_grad_norm=1.0)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_inside_a_compiled_function():
    params, expected = parameters(shapes=[(5, 3)]), parameters(shapes=[(5, 3)])
    optimizer, other = AdamW(params, **HYPER), AdamW(expected, **HYPER)

    @torch.compile(backend="eager")
    def train(x):
        loss = (params[0] * x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    for i in range(3):
        train(torch.full((5, 3), 1.0 + i))
        (expected[0] * (1.0 + i)).square().sum().backward()
        other.step()
        other.zero_grad()
    assert_bitwise_equal(params[0].detach(), expected[0].detach())


def test_more_elements_than_an_int32_counts():
    # Pages of zeros that are only read take no memory.
    from fastlm.ops.clip_grad_norm import global_norm

    gradient = torch.zeros(2**31 + 100, dtype=torch.bfloat16)
    gradient[-1], gradient[2**31 - 1], gradient[5] = 3.0, 4.0, 12.0
    assert global_norm([gradient]) == 13.0
