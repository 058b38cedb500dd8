"""AdamW against adamw_reference in fp64 and against torch.optim.AdamW."""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from tolerance import DEVICES, assert_as_accurate, assert_bitwise_equal

from fastlm import AdamW, clip_gradients
from fastlm.ops.adamw import adamw_reference
from fastlm.ops.clip_grad_norm import global_norm

HYPER = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1}

# One element, none, 0-d, odd sizes, a matrix, more than a block of the fused kernel.
SHAPES = [(1,), (0,), (), (7,), (33, 65), (5000,)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # The tensors are small: a second thread would cost more than it does, and ten times as much
    # where other programs keep it waiting.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(dtype=torch.float32, device="cpu", shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]


def set_gradients(params, step, scale=1.0):
    """The gradients of step number `step`: the same in every dtype, rounded to it."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)


def run(optimizer, params, steps, scale=1.0):
    for step in steps:
        set_gradients(params, step, scale)
        optimizer.step()
    return params


def reference_run(
    steps, update=adamw_reference, max_grad_norm=None, scale=1.0, dtype=torch.float32
):
    """What `steps` updates in fp64 make of the same parameters, with gradients rounded to dtype."""
    params = [p.detach().double() for p in parameters(dtype)]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in params]
    for t, step in enumerate(steps, start=1):
        rounded = [torch.empty_like(p, dtype=dtype) for p in params]
        set_gradients(rounded, step, scale)
        gradients = [p.grad.double() for p in rounded]
        if max_grad_norm is not None:
            norm = sum(g.square().sum() for g in gradients).sqrt()
            gradients = [g * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0) for g in gradients]
        for p, gradient, (exp_avg, exp_avg_sq) in zip(params, gradients, moments, strict=True):
            update(p, gradient, exp_avg, exp_avg_sq, t, **HYPER)
    return params, moments


def assert_close(params, expected):
    """The suite's comparison for fp64 runs: rounding of a hundred steps, no more."""
    for i, (p, true_p) in enumerate(zip(params, expected, strict=True)):
        torch.testing.assert_close(
            p.detach(), true_p, rtol=1e-11, atol=1e-13, msg=lambda text, i=i: f"{i}: {text}"
        )


@pytest.mark.parametrize("device", DEVICES)
def test_against_reference_in_fp64(device):
    params = parameters(torch.float64, device)
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(100))
    expected, moments = reference_run(range(100), dtype=torch.float64)
    assert_close([p.cpu() for p in params], expected)
    for p, (exp_avg, exp_avg_sq) in zip(params, moments, strict=True):
        state = optimizer.state[p]
        assert state["step"].item() == 100
        torch.testing.assert_close(state["exp_avg"].cpu(), exp_avg, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(state["exp_avg_sq"].cpu(), exp_avg_sq, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_accuracy(dtype, device):
    # As accurate as torch's for-loop, and the same bits as torch's fused kernel.
    params = parameters(dtype, device)
    run(AdamW(params, **HYPER), params, range(50))
    single = parameters(dtype, device)
    run(torch.optim.AdamW(single, **HYPER, foreach=False, fused=False), single, range(50))
    fused = parameters(dtype, device)
    run(torch.optim.AdamW(fused, **HYPER, fused=True), fused, range(50))
    expected, _ = reference_run(range(50), dtype=dtype)
    rows = zip(params, single, fused, expected, strict=True)
    for i, (p, single_p, fused_p, true_p) in enumerate(rows):
        assert_as_accurate(
            p.detach(), single_p.detach(), true_p.to(device), magnitude=true_p.to(device).abs() + 1,
            what=f"parameter {i}",
        )  # fmt: skip
        assert_bitwise_equal(p.detach(), fused_p.detach(), f"parameter {i}")


def test_cs336():
    # CS336's own test: 1000 steps of a linear model, compared with torch's at atol 1e-4.
    def optimised(optimizer_class):
        torch.manual_seed(42)
        model = torch.nn.Linear(3, 2, bias=False)
        optimizer = optimizer_class(
            model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
        )
        for _ in range(1000):
            optimizer.zero_grad()
            x = torch.rand(model.in_features)
            y = torch.tensor([x[0] + x[1], -x[2]])
            ((y - model(x)) ** 2).sum().backward()
            optimizer.step()
        return model.weight.detach()

    torch.testing.assert_close(optimised(AdamW), optimised(torch.optim.AdamW), atol=1e-4, rtol=0)


def test_defaults_are_those_of_the_seeds():
    (group,) = AdamW(parameters()).param_groups
    assert group["lr"] == 1e-3 and group["betas"] == (0.9, 0.95)
    assert group["eps"] == 1e-8 and group["weight_decay"] == 0.0
    (group,) = AdamW(parameters(), 2e-3, (0.8, 0.9), 1e-7, 0.3).param_groups  # by position
    assert (group["lr"], group["betas"], group["eps"]) == (2e-3, (0.8, 0.9), 1e-7)
    assert group["weight_decay"] == 0.3


def test_parameters_without_a_gradient():
    params = parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
    before = [p.detach().clone() for p in params]
    optimizer.step()  # none at all
    assert optimizer.last_grad_norm == 0
    set_gradients(params, 0)
    params[3].grad = None
    optimizer.step()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(p, old) == (i == 3 or p.numel() == 0)
    assert params[3] not in optimizer.state


# State dicts


def resumed(saved_by, loaded_by, through_file=False):
    """Parameters after 20 steps of one optimizer, its state loaded by another, 20 more steps."""
    params = parameters()
    first = saved_by(params)
    run(first, params, range(20))
    state = first.state_dict()
    if through_file:
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    second = loaded_by(params)
    second.load_state_dict(state)
    run(second, params, range(20, 40))
    return params, second


def fastlms(params):
    return AdamW(params, **HYPER)


def fastlms_clipping(params):
    return AdamW(params, **HYPER, max_grad_norm=1e9)


def torchs(params):
    return torch.optim.AdamW(params, **HYPER)


def torchs_fused(params):
    return torch.optim.AdamW(params, **HYPER, fused=True)


def torchs_loop(params):
    return torch.optim.AdamW(params, **HYPER, foreach=False, fused=False)


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize(
    "saved_by, loaded_by",
    [
        (fastlms, fastlms), (fastlms, torchs), (torchs, fastlms), (torchs_fused, fastlms),
        (fastlms, torchs_fused), (torchs_loop, fastlms), (fastlms, torchs_loop),
        (torchs, fastlms_clipping), (fastlms_clipping, torchs),
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_state_dicts_load_both_ways(saved_by, loaded_by, through_file):
    params, optimizer = resumed(saved_by, loaded_by, through_file)
    uninterrupted = parameters()
    run(torchs_fused(uninterrupted), uninterrupted, range(40))
    fused = {fastlms, fastlms_clipping, torchs_fused}
    for p, expected in zip(params, uninterrupted, strict=True):
        if {saved_by, loaded_by} <= fused:
            assert_bitwise_equal(p.detach(), expected.detach())
        else:
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == 40
    if isinstance(optimizer, AdamW):
        # The choice of implementation is this optimizer's own, not the loaded state's.
        assert optimizer.param_groups[0]["fused"] is True
        assert optimizer.param_groups[0]["foreach"] is False


def seeds_state(params, steps):
    """What the seeds' AdamW saves: an int step, four hyperparameters."""
    moments = {}
    for i, p in enumerate(params):
        moments[i] = {
            "step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p),
        }  # fmt: skip
    for step in steps:
        set_gradients(params, step)
        for i, p in enumerate(params):
            state = moments[i]
            state["step"] += 1
            adamw_reference(
                p, p.grad, state["exp_avg"], state["exp_avg_sq"], state["step"], **HYPER
            )
    return {
        "state": moments,
        "param_groups": [{**HYPER, "params": list(range(len(params)))}],
    }


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1e9}], ids=str)
def test_the_seeds_state_loads(options):
    params = parameters(torch.float64)
    state = seeds_state(params, range(20))
    optimizer = AdamW(params, lr=99.0, **options)
    optimizer.load_state_dict(state)
    (group,) = optimizer.param_groups
    assert group["lr"] == HYPER["lr"] and group["weight_decay"] == HYPER["weight_decay"]
    run(optimizer, params, range(20, 40))
    expected, _ = reference_run(range(40), dtype=torch.float64)
    assert_close(params, expected)
    assert all(optimizer.state[p]["step"].item() == 40 for p in params)


def test_the_loaded_state_dict_is_not_changed():
    params = parameters()
    optimizer = torchs(params)
    run(optimizer, params, range(3))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    AdamW(params).load_state_dict(state)
    assert state["param_groups"] == before["param_groups"]
    assert state["param_groups"][0]["fused"] is None


@pytest.mark.parametrize("device", DEVICES)
def test_step_counters_are_put_where_the_fused_kernel_reads_them(device):
    # torch's unfused optimizers count on the CPU and, under a default dtype of fp64, in fp64.
    params = parameters(device=device)
    unfused = torchs_loop(params)
    run(unfused, params, range(2))
    state = unfused.state_dict()
    for entry in state["state"].values():
        entry["step"] = entry["step"].double().cpu()
    optimizer = fastlms(params)
    optimizer.load_state_dict(state)
    for p in params:
        step = optimizer.state[p]["step"]
        assert step.dtype == torch.float32 and step.device == p.device
    run(optimizer, params, range(2, 4))
    assert optimizer.state[params[0]]["step"].item() == 4


def test_a_state_dict_of_other_parameters_is_refused():
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(AdamW(parameters(shapes=[(3,)])).state_dict())
    two_groups = AdamW([{"params": [p]} for p in parameters(shapes=[(3,), (4,)])])
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(two_groups.state_dict())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_can_step(copied):
    # torch's __getstate__ keeps groups and state only: clipping and skipping must survive.
    params = parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=0.5)
    run(optimizer, params, range(5))
    other_params, other = copied((params, optimizer))
    assert other.max_grad_norm == 0.5 and other.skip_nonfinite is True
    run(optimizer, params, range(5, 10))
    run(other, other_params, range(5, 10))
    for p, q in zip(params, other_params, strict=True):
        assert p is not q
        assert_bitwise_equal(q.detach(), p.detach())
    other_params[0].grad.fill_(torch.nan)
    other.step()
    assert other_params[0].isfinite().all()


# Clipping in the step


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("skip_nonfinite", [True, False])
@pytest.mark.parametrize("max_grad_norm", [0.5, 70.0, 1e6])
def test_max_grad_norm_is_clip_then_step(max_grad_norm, skip_nonfinite, device):
    # The norms lie around 84: all steps are clipped, all hard, or none.
    params = parameters(device=device)
    optimizer = AdamW(params, **HYPER, max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite)
    apart = parameters(device=device)
    plain = torch.optim.AdamW(apart, **HYPER, fused=True)
    for step in range(20):
        set_gradients(params, step)
        set_gradients(apart, step)
        norm = clip_gradients(apart, max_grad_norm)
        optimizer.step()
        plain.step()
        torch.testing.assert_close(optimizer.last_grad_norm.item(), norm, rtol=1e-6, atol=0)
        assert optimizer.last_grad_norm.shape == ()
        assert optimizer.last_grad_norm.device == params[0].device
    for p, expected in zip(params, apart, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_clipping_against_reference_in_fp64():
    params = parameters(torch.float64)
    run(AdamW(params, **HYPER, max_grad_norm=2.0), params, range(50))
    expected, _ = reference_run(range(50), max_grad_norm=2.0, dtype=torch.float64)
    assert_close(params, expected)


def test_the_norm_is_over_all_groups():
    params = parameters()
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:]}], max_grad_norm=1.0)
    set_gradients(params, 0)
    norm = global_norm([p.grad for p in params])
    optimizer.step()
    assert_bitwise_equal(optimizer.last_grad_norm, norm)


def test_no_norm_is_taken_unless_it_is_wanted():
    params = parameters()
    optimizer = AdamW(params)
    run(optimizer, params, range(1))
    assert optimizer.last_grad_norm is None and optimizer.skip_nonfinite is False


# Steps that are skipped


def snapshot(optimizer, params):
    """All that a step may change: parameters, moments, step counters."""
    tensors = [p.detach() for p in params]
    for p in params:
        if p in optimizer.state:
            tensors += [optimizer.state[p][key] for key in ("step", "exp_avg", "exp_avg_sq")]
    return [t.clone() for t in tensors]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}], ids=str)
def test_a_bad_step_changes_nothing(options, value, dtype, device):
    params = parameters(dtype, device)
    optimizer = AdamW(params, **HYPER, **options)
    run(optimizer, params, range(3))
    set_gradients(params, 3)
    params[4].grad[7, 11] = value
    before, gradients = snapshot(optimizer, params), [p.grad.clone() for p in params]
    optimizer.step()
    for old, new in zip(before, snapshot(optimizer, params), strict=True):
        assert_bitwise_equal(new, old)
    for p, old in zip(params, gradients, strict=True):  # no factor, and no NaN, has spread to them
        torch.testing.assert_close(p.grad, old, rtol=0, atol=0, equal_nan=True)
    assert not optimizer.last_grad_norm.isfinite()
    # And it is as though it had never been.
    run(optimizer, params, range(4, 6))
    without = parameters(dtype, device)
    run(AdamW(without, **HYPER, **options), without, [0, 1, 2, 4, 5])
    for p, expected in zip(params, without, strict=True):
        assert_bitwise_equal(p.detach(), expected.detach())
    assert optimizer.last_grad_norm.isfinite()


def test_the_first_step_may_be_bad():
    params = parameters()
    optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
    set_gradients(params, 0)
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    run(optimizer, params, range(1, 4))
    without = parameters()
    run(AdamW(without, **HYPER, max_grad_norm=1.0), without, range(1, 4))
    for p, expected in zip(params, without, strict=True):
        assert_bitwise_equal(p.detach(), expected.detach())
        assert optimizer.state[p]["step"].item() == 3


def test_skipping_can_be_left_out():
    # torch's behaviour then: the NaN goes into the parameter, and into it alone.
    for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": False}):
        params = parameters()
        optimizer = AdamW(params, **HYPER, **options)
        set_gradients(params, 0)
        params[4].grad[7, 11] = torch.nan
        optimizer.step()
        assert params[4].isnan().sum() == 1 and params[5].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("unscaled", [True, False], ids=["unscale_", "no unscale_"])
def test_grad_scaler(unscaled, options):
    # fp16 gradients arrive scaled by 2^10. Whether the loop calls unscale_ (as it must before it
    # clips by itself) or leaves it to the step, the norm and the clipping are of the true ones.
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    params = parameters()
    optimizer = AdamW(params, **HYPER, **options)
    plain_params = parameters()
    plain = AdamW(plain_params, **HYPER, **options)
    for step in range(6):
        bad = step == 2
        set_gradients(params, step)
        set_gradients(plain_params, step)
        for p in params:
            p.grad.mul_(1024.0 if step < 3 else 512.0)
        if bad:
            params[3].grad[0] = torch.inf
        scaler.scale(torch.ones(()))  # what makes the scale known to the scaler
        before = [p.detach().clone() for p in params]
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")
        if bad:
            assert scaler.get_scale() == 512.0
            for p, old in zip(params, before, strict=True):
                assert_bitwise_equal(p.detach(), old)
            continue
        plain.step()
        if options:
            torch.testing.assert_close(optimizer.last_grad_norm, plain.last_grad_norm)
    for p, expected in zip(params, plain_params, strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-7)
        assert optimizer.state[p]["step"].item() == 5


def test_grad_scaler_in_a_loop():
    # The whole fp16 flow: autocast, scaled loss, a scale that is too large at first.
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = AdamW(model.parameters(), lr=1e-2, max_grad_norm=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    x = torch.randn(64, 8)
    y = x.sum(-1, keepdim=True)
    losses = []
    for _ in range(60):
        with torch.autocast("cpu", torch.float16):
            output = model(x)
        loss = torch.nn.functional.mse_loss(output.float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() < 2.0**24  # steps were skipped
    steps = optimizer.state[model[0].weight]["step"].item()
    assert 0 < steps < 60
    assert losses[-1] < 0.5 * losses[0] and math.isfinite(losses[-1])


# The rest of an optimizer's interface


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
def test_closure(options):
    param = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([param], lr=0.1, **options)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()  # needs gradients enabled, inside step's no_grad
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 9.0 and param.item() < 3.0
    assert optimizer.step() is None


def test_lr_as_a_tensor():
    params, expected = parameters(), parameters()
    rate = torch.tensor(3e-3)
    optimizer = AdamW(params, **{**HYPER, "lr": rate})
    plain = AdamW(expected, **HYPER)
    run(optimizer, params, range(10))
    run(plain, expected, range(10))
    rate.fill_(1e-4)  # a schedule writes into it
    plain.param_groups[0]["lr"] = 1e-4
    run(optimizer, params, range(10, 20))
    run(plain, expected, range(10, 20))
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameter_groups():
    params = parameters()
    groups = [
        {"params": params[:3], "lr": 1e-2, "weight_decay": 0.5},
        {"params": []},
        {"params": params[3:4], "betas": (0.5, 0.6), "eps": 1e-1},
    ]
    optimizer = AdamW(groups, max_grad_norm=1e9)
    run(optimizer, params[:4], range(5))
    optimizer.add_param_group({"params": params[4:], "lr": 5e-3})
    run(optimizer, params, range(5, 10))

    expected = parameters()
    apart = [
        torch.optim.AdamW(expected[:3], lr=1e-2, weight_decay=0.5, betas=(0.9, 0.95), fused=True),
        torch.optim.AdamW(
            expected[3:4], lr=1e-3, weight_decay=0, betas=(0.5, 0.6), eps=0.1, fused=True
        ),
    ]
    for step in range(10):
        if step == 5:
            apart.append(
                torch.optim.AdamW(
                    expected[4:], lr=5e-3, weight_decay=0, betas=(0.9, 0.95), fused=True
                )
            )
        set_gradients(expected if step >= 5 else expected[:4], step)
        for plain in apart:
            plain.step()
    for p, q in zip(params, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


# name: a parameter's memory layout. The last two have gaps between their elements.
LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x[..., None, None].to(memory_format=torch.channels_last),
    "columns": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "rows": lambda x: x.repeat_interleave(2, dim=0)[::2],
}


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout, options):
    # torch's fused CPU kernel reads raw memory: without a word it pairs the wrong elements where a
    # gradient has other strides than its parameter, and writes into the gaps of a view.
    values = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    param = torch.nn.Parameter(LAYOUTS[layout](values))
    expected = torch.nn.Parameter(values.reshape(param.shape).contiguous())
    gaps = layout in ("columns", "rows")
    if gaps and options:
        with pytest.raises(ValueError, match=r"gaps in memory \(shape \(6, 4\)\)"):
            AdamW([param], **HYPER, **options)
        options = {**options, "skip_nonfinite": False}
    optimizer = AdamW([param], **HYPER, **options)
    plain = torch.optim.AdamW([expected], **HYPER, foreach=False)
    for step in range(6):
        set_gradients([param], step)  # contiguous
        if step % 2:
            param.grad = torch.empty_like(param).copy_(param.grad)  # as autograd makes it
        set_gradients([expected], step)
        if options:
            clip_gradients(expected, 1.0)
        optimizer.step()
        plain.step()
    torch.testing.assert_close(param.detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    assert optimizer.param_groups[0]["fused"] is (None if gaps else True)


def test_threads_do_not_change_the_result():
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = parameters(shapes=[(300_000,), (5, 7)])
            optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
            run(optimizer, params, range(2))
            results.append([*snapshot(optimizer, params), optimizer.last_grad_norm])
    finally:
        torch.set_num_threads(1)
    for result in results[1:]:
        for tensor, expected in zip(result, results[0], strict=True):
            assert_bitwise_equal(tensor, expected)


def test_a_group_that_cannot_be_added_is_not():
    params = parameters()
    optimizer = AdamW(params[:3], max_grad_norm=1.0)
    with pytest.raises(ValueError, match="one device"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2, device="meta"))]})
    assert len(optimizer.param_groups) == 1
    run(optimizer, params[:3], range(2))


def test_hooks_run_once():
    # torch wraps torch.optim.AdamW.step with the hooks once somebody has made one: the inner step.
    (param,) = parameters(shapes=[(3,)])
    torch.optim.AdamW([param])
    for options in ({}, {"max_grad_norm": 1.0}, {"max_grad_norm": 1.0, "skip_nonfinite": False}):
        optimizer = AdamW([param], **options)
        calls = []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_, calls=calls: calls.append("post"))
        set_gradients([param], 0)
        optimizer.step()
        assert calls == ["pre", "post"]


def test_schedulers_see_the_step():
    params = parameters()
    optimizer = AdamW(params, lr=1.0, max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of a scheduler that goes before the optimizer
        for _ in range(3):
            set_gradients(params, 0)
            optimizer.step()
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize(
    "hyper, message",
    [
        ({"lr": -1.0}, "learning rate: -1.0"),
        ({"lr": float("nan")}, "learning rate: nan"),
        ({"betas": (1.0, 0.9)}, "beta parameter at index 0: 1.0"),
        ({"betas": (0.9, -0.1)}, "beta parameter at index 1: -0.1"),
        ({"eps": -1e-8}, "epsilon value: -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay value: -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"impl": "cuda"}, "impl='cuda'"),
    ],
    ids=str,
)
def test_bad_hyperparameters(hyper, message):
    with pytest.raises(ValueError, match=message):
        AdamW(parameters(), **hyper)


def test_bad_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
        AdamW([3])
    param = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW([{"params": [param]}, {"params": [param]}])


def test_skipping_needs_the_fused_kernel():
    meta = torch.nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"skip_nonfinite=True.*meta.*skip_nonfinite=False"):
        AdamW([meta], max_grad_norm=1.0)
    AdamW([meta], max_grad_norm=1.0, skip_nonfinite=False)
    with pytest.raises(ValueError, match="one device"):
        AdamW([meta, *parameters()], max_grad_norm=1.0)


# Wrong updates, which assert_close must tell from the right one


def decay_after_the_update(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": 0.0})
    param.mul_(1 - hyper["lr"] * hyper["weight_decay"])


def decay_in_the_gradient(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    grad = grad + hyper["weight_decay"] * param
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": 0.0})


def decay_without_the_learning_rate(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    decay = hyper["weight_decay"] / hyper["lr"]
    adamw_reference(param, grad, exp_avg, exp_avg_sq, step, **{**hyper, "weight_decay": decay})


def no_bias_correction(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, 10**9, **hyper)


def steps_counted_from_0(param, grad, exp_avg, exp_avg_sq, step, **hyper):
    adamw_reference(param, grad, exp_avg, exp_avg_sq, max(step - 1, 1), **hyper)


def update_with(denominator):
    def update(param, grad, exp_avg, exp_avg_sq, step, *, lr, betas, eps, weight_decay):
        beta1, beta2 = betas
        param.mul_(1 - lr * weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).add_(grad.square(), alpha=1 - beta2)
        param.sub_(lr * exp_avg / (1 - beta1**step) / denominator(exp_avg_sq, 1 - beta2**step, eps))

    return update


eps_under_the_root = update_with(lambda v, correction, eps: (v / correction + eps).sqrt())
eps_before_the_correction = update_with(
    lambda v, correction, eps: (v.sqrt() + eps) / correction**0.5
)
eps_left_out = update_with(lambda v, correction, eps: (v / correction).sqrt())
MUTATIONS = {
    "decay after the update": decay_after_the_update,
    "decay in the gradient": decay_in_the_gradient,
    "decay without the learning rate": decay_without_the_learning_rate,
    "no bias correction": no_bias_correction,
    "steps counted from 0": steps_counted_from_0,
    "eps under the root": eps_under_the_root,
    "eps before the correction": eps_before_the_correction,
    "eps left out": eps_left_out,
}


@pytest.fixture(scope="module")
def right_params():
    params = parameters(torch.float64)
    return run(AdamW(params, **HYPER), params, range(10))


def test_the_formula_of_the_mutations_is_the_references(right_params):
    right = update_with(lambda v, correction, eps: (v / correction).sqrt() + eps)
    assert_close(right_params, reference_run(range(10), right, dtype=torch.float64)[0])


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_wrong_update_is_rejected(mutation, right_params):
    expected, _ = reference_run(range(10), mutation, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(right_params, expected)


def test_a_dropped_clip_is_rejected(right_params):
    expected, _ = reference_run(range(10), max_grad_norm=2.0, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close(right_params, expected)
