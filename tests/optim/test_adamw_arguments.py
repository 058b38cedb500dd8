"""What AdamW accepts, what it refuses, and what it tells afterwards."""

import copy

import pytest
import torch
from adamw_runs import HYPER, AdamW, parameters, run, set_gradients
from tolerance import assert_bitwise_equal

from fastlm import active_implementation, clip_gradients

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


def test_decay_that_is_not_decoupled():
    groups = torch.optim.Adam(parameters(), weight_decay=0.5).param_groups
    with pytest.raises(ValueError, match=r"group 0: weight_decay=0\.5 with decoupled"):
        AdamW(groups)
    plain = AdamW(torch.optim.Adam(parameters()).param_groups)  # without decay they are the same
    plain.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=r"group 0: weight_decay=0\.5 with decoupled"):
        run(plain, plain.param_groups[0]["params"], range(1))
    AdamW(torch.optim.AdamW(parameters()).param_groups)


@pytest.mark.parametrize("name", ["lr", "betas", "eps", "weight_decay"])
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_a_group_without_a_hyperparameter(name, impl):
    params = parameters()
    optimizer = AdamW(params, **HYPER, impl=impl)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0][name]
    if impl == "auto":
        with pytest.raises(ValueError, match=f"group 0 of the state dict has no '{name}'"):
            optimizer.load_state_dict(saved)
        assert name in optimizer.param_groups[0]
    del optimizer.param_groups[0][name]
    with pytest.raises(ValueError, match=f"group 0 has no '{name}', which AdamW needs"):
        run(optimizer, params, range(1))


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_that_are_set_later(option):
    params = parameters()
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(2))
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[0][option] = True
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), old)


def test_shards_of_fsdp1():
    # Its parameters are shards that look like whole tensors: norms would be wrong in silence.
    params = parameters()
    params[1]._fsdp_flattened = True  # as FullyShardedDataParallel marks them
    AdamW(params)
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel.*model.clip_grad_norm_"):
            AdamW(params, **options)


def test_a_lazy_layer():
    layer = torch.nn.LazyLinear(3)
    optimizer = AdamW(layer.parameters(), lr=1e-2, max_grad_norm=1.0)
    layer(torch.ones(2, 4)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert (layer.weight != before).all()
    with pytest.raises(TypeError, match=r"shape not known yet.*complex64"):
        AdamW(torch.nn.LazyLinear(3, dtype=torch.complex64).parameters())


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite", "impl"])
def test_options_of_the_optimizer_in_a_group(option):
    message = f"{option} is the optimizer's, not a group's.*ZeroRedundancyOptimizer"
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": parameters(), option: 1.0}])


def test_lightning_is_told_what_torchs_fused_step_tells_it():
    # So its Trainer refuses gradient_clip_val with either, and GradScaler leaves both the scale.
    (param,) = parameters(shapes=[(3,)])
    torchs = torch.optim.AdamW([param], fused=True)
    assert AdamW([param])._step_supports_amp_scaling == torchs._step_supports_amp_scaling
    assert not AdamW([param], impl="torch")._step_supports_amp_scaling


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_torchs_implementation(dtype):
    # What devices without kernels run: the same but for torch's rounding and clipping in place.
    assert active_implementation("adamw") == active_implementation("clip_grad_norm") == "cpp"
    params, expected = parameters(dtype), parameters(dtype)
    optimizer = AdamW(params, **HYPER, max_grad_norm=2.0, impl="torch")
    other = AdamW(expected, **HYPER, max_grad_norm=2.0)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # torch wraps its step with the hooks
    run(optimizer, params, range(6))
    assert len(calls) == 6
    params[3].grad = torch.full_like(params[3], torch.nan)  # skipped
    optimizer.step()
    assert optimizer.first_nonfinite()[:2] == (0, 3)
    run(optimizer, params, range(6, 8))
    run(other, expected, range(8))
    assert optimizer.first_nonfinite() is None
    tolerance = 1e-6 if dtype != torch.bfloat16 else 4 * torch.finfo(dtype).eps
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)
        assert optimizer.state[p]["exp_avg"].dtype == dtype  # as torch's own
    torch.testing.assert_close(optimizer.last_grad_norm, other.last_grad_norm)
    # Its state loads, comes back, and can be made before the first step; copies can step.
    again = AdamW(copies := parameters(dtype), **HYPER, max_grad_norm=2.0, impl="torch")
    again.init_state()
    again.load_state_dict(optimizer.state_dict())
    again = copy.deepcopy(again)
    copies = again.param_groups[0]["params"]
    for p, q in zip(copies, params, strict=True):
        p.data.copy_(q.data)
    run(again, copies, range(8, 10))
    run(optimizer, params, range(8, 10))
    for p, q in zip(copies, params, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


@pytest.fixture
def swapped():
    """module.to() changes the parameters themselves, which the optimizer holds, to any device."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_model_moved_to_a_device_without_kernels(swapped):
    layer = torch.nn.Linear(3, 4)
    weight, optimizer = layer.weight, AdamW(layer.parameters(), **HYPER)
    assert optimizer._step_supports_amp_scaling
    layer.to("meta")
    assert layer.weight is weight and weight.is_meta
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[weight]["exp_avg"].is_meta
    assert optimizer.state[weight]["step"] == 2
    assert not optimizer._step_supports_amp_scaling  # torch's step takes no scale
    optimizer.init_state()
    optimizer.load_state_dict(optimizer.state_dict())

    halves = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    optimizer = AdamW(halves.parameters(), **HYPER, param_precision="split")
    halves.to("meta")
    for p in halves.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match='param_precision="split" needs impl "cpp" or "triton"'):
        optimizer.step()


def test_torchs_implementation_refuses_the_split():
    with pytest.raises(ValueError, match='param_precision="split" needs impl "cpp" or "triton"'):
        AdamW(parameters(torch.bfloat16), param_precision="split", impl="torch")


def test_a_scaler_with_torchs_implementation():
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    params, expected = parameters(), parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=2.0, impl="torch")
    other = AdamW(expected, **HYPER, max_grad_norm=2.0)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(expected, step)
        scaler.scale(torch.ones(()))
        for p in params:
            p.grad.mul_(scaler.get_scale())
        if step == 2:
            params[0].grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            other.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


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
    gradient = torch.zeros(2**31 + 100, dtype=torch.bfloat16)
    gradient[-1], gradient[2**31 - 1], gradient[5] = 3.0, 4.0, 12.0
    param = torch.nn.Parameter(gradient)
    param.grad = gradient
    assert clip_gradients(param, 20.0) == 13.0
