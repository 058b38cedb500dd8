"""AdamW's tables of pointers: whatever a program does to parameters, gradients and state between
steps, the next step sees it. Both ways to read them: the extension's and the one in Python."""

import copy
import gc
import weakref

import pytest
import torch
from adamw_runs import HYPER, AdamW, parameters, run, set_gradients, snapshot
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")


class PythonAdamW(AdamW):
    def _read_tables(self):
        return None


@pytest.fixture(params=[AdamW, PythonAdamW], ids=["C++", "Python"])
def adamw(request):
    return request.param


def expected_after(params, optimizer, steps, fresh=AdamW):
    """What an optimizer that has seen nothing before makes of copies of all this."""
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = fresh(copies, **HYPER)
    other.init_state()
    for p, q in zip(params, copies, strict=True):
        for key, value in optimizer.state.get(p, {}).items():
            other.state[q][key].copy_(torch.as_tensor(value))
    run(other, copies, steps)
    return copies


def assert_same(params, expected):
    for p, q in zip(params, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def count_slow_readings(monkeypatch):
    from fastlm.kernels import optimizer as module

    built = []
    monkeypatch.setattr(
        module, "collect_step", lambda *a, f=module.collect_step: built.append(1) or f(*a)
    )
    return built


def test_what_the_extension_reads(monkeypatch):
    # Everything but what has to be converted or refused; the state is made at the first step.
    built = count_slow_readings(monkeypatch)
    shapes = [(3, 4, 5, 6, 7), (), (1, 9), (0,), (5, 1)]
    params = [
        *parameters(shapes=shapes), *parameters(torch.bfloat16), *parameters(torch.float16),
        *parameters(torch.float64),
    ]  # fmt: skip
    optimizer = AdamW(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(3))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_gradients(params, 3)
    params[2].grad = None
    optimizer.step()
    run(optimizer, params, range(4, 5))
    split = AdamW(halves := parameters(torch.bfloat16), **HYPER, param_precision="split")
    run(split, halves, range(3))
    assert len(built) == 2


def test_gradients_are_let_go(adamw):
    # Nothing of a step outlives it.
    params = parameters(shapes=[(1000,)])
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    gradient, moment = (
        weakref.ref(params[0].grad), weakref.ref(optimizer.state[params[0]]["exp_avg"])
    )  # fmt: skip
    assert gradient() is not None and moment() is not None
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    assert gradient() is None and moment() is None


def test_a_tensor_that_goes_during_the_step_is_held(adamw, monkeypatch):
    # Other threads run while a kernel does.
    from fastlm.ops import optimizer_cpp

    params = parameters(shapes=[(1000,)])
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(1))
    set_gradients(params, 1)
    gone = [weakref.ref(params[0].grad), weakref.ref(optimizer.state[params[0]]["exp_avg"])]
    alive, step = [], optimizer_cpp.step

    def racing(*args):
        params[0].grad = None
        optimizer.state.clear()
        alive.extend(ref() is not None for ref in gone)
        return step(*args)

    monkeypatch.setattr(optimizer_cpp, "step", racing)
    optimizer.step()
    assert alive == [True, True]


def data_swapped(params, optimizer):
    params[4].data = params[4].data.clone()


def data_of_another_value(params, optimizer):
    params[1 + 4].data = torch.full_like(params[5], 3.0)


def data_shrunk(params, optimizer):
    # At the same address: a vocabulary that is cut. The state is cut with it.
    params[5].data = params[5].data[:10]
    for key in ("exp_avg", "exp_avg_sq"):
        entry = optimizer.state[params[5]]
        entry[key].data = entry[key].data[:10]


def data_reshaped(params, optimizer):
    params[4].data = params[4].data.reshape(65, 33)
    for key in ("exp_avg", "exp_avg_sq"):
        entry = optimizer.state[params[4]]
        entry[key] = entry[key].reshape(65, 33)


def layout_changed(params, optimizer):
    params[5].data = params[5].data.view(50, 100)
    for key in ("exp_avg", "exp_avg_sq"):
        entry = optimizer.state[params[5]]
        entry[key] = entry[key].view(50, 100).mT.contiguous().mT  # another layout


def moments_replaced(params, optimizer):
    entry = optimizer.state[params[4]]
    entry["exp_avg"] = entry["exp_avg"].clone() * 2


def moments_data_swapped(params, optimizer):
    # The snippet everybody copies to move an optimizer to another device.
    for entry in optimizer.state.values():
        for value in entry.values():
            value.data = value.data.clone()


def step_replaced(params, optimizer):
    optimizer.state[params[4]]["step"] = torch.tensor(100.0)


def step_of_another_type(params, optimizer):
    optimizer.state[params[4]]["step"] = 7  # the seeds count in int
    optimizer.state[params[5]]["step"] = torch.tensor(9, dtype=torch.int64)


def entry_replaced(params, optimizer):
    optimizer.state[params[4]] = {k: v.clone() for k, v in optimizer.state[params[4]].items()}


def state_copied(params, optimizer):
    optimizer.state = copy.copy(optimizer.state)
    optimizer.state[params[4]] = {k: v.clone() for k, v in optimizer.state[params[4]].items()}


def state_deleted(params, optimizer):
    del optimizer.state[params[4]]  # it starts from 0 again


def state_dict_reloaded(params, optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][4]["exp_avg"].mul_(3)
    optimizer.load_state_dict(state)


@pytest.mark.parametrize(
    "change",
    [
        data_swapped, data_of_another_value, data_shrunk, data_reshaped, layout_changed,
        moments_replaced, moments_data_swapped, step_replaced, step_of_another_type,
        entry_replaced, state_copied,
        state_deleted, state_dict_reloaded,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_changes_between_steps_are_seen(change, adamw):
    params = parameters()
    optimizer = adamw(params, **HYPER)
    run(optimizer, params, range(3))
    change(params, optimizer)
    expected = expected_after(params, optimizer, range(3, 5))
    run(optimizer, params, range(3, 5))
    assert_same(params, expected)
    for p in params:  # and the state that the program can see is the one that is updated
        assert p in optimizer.state
    assert optimizer.state[params[0]]["step"].item() == 5


def test_a_parameter_is_replaced_in_its_group(adamw):
    # As programs do that prune or add to their parameters in the middle of a run.
    params = parameters()
    optimizer = adamw(params, **HYPER)
    run(optimizer, params, range(3))
    old = params[4]
    new = torch.nn.Parameter(old.detach()[:7].clone())
    entry = optimizer.state.pop(old)
    optimizer.state[new] = {
        k: v.clone() if v.dim() == 0 else v[:7].clone() for k, v in entry.items()
    }
    optimizer.param_groups[0]["params"][4] = params[4] = new
    expected = expected_after(params, optimizer, range(3, 6))
    run(optimizer, params, range(3, 6))
    assert_same(params, expected)
    untouched = old.detach().clone()
    run(optimizer, params, range(6, 7))
    assert_bitwise_equal(old.detach(), untouched)


def test_gradients_come_and_go(adamw):
    params, expected = parameters(), parameters()
    optimizer = adamw(params, **HYPER)
    plain = torch.optim.AdamW(expected, **HYPER, foreach=False)
    for step in range(9):
        for each in (params, expected):
            set_gradients(each, step)
            for i, p in enumerate(each):
                if (step + i) % 3 == 0:
                    p.grad = None
        optimizer.step()
        plain.step()
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == plain.state[q]["step"].item()


def test_gradients_change_dtype_and_layout(adamw):
    (param,) = parameters(shapes=[(6, 8)])
    param.grad_dtype = None  # any
    optimizer = adamw([param], **HYPER)
    (expected,) = parameters(shapes=[(6, 8)])
    other = AdamW([expected], **HYPER)
    generator = torch.Generator().manual_seed(0)
    for form in (
        lambda g: g, lambda g: g, lambda g: g.bfloat16(), lambda g: g.half(), lambda g: g.double(),
        lambda g: g.mT.contiguous().mT, lambda g: g[:1].expand(6, 8),
        lambda g: g[:, :1].expand(6, 8), lambda g: torch.cat([g, g], 1)[:, :8], lambda g: g,
    ):  # fmt: skip
        param.grad = form(torch.randn(6, 8, generator=generator))
        expected.grad = param.grad.float().contiguous()
        optimizer.step()
        other.step()
        assert_bitwise_equal(param.detach(), expected.detach())


def test_groups_change(adamw):
    params = parameters()
    optimizer = adamw(params[:3], **HYPER)
    run(optimizer, params[:3], range(2))
    optimizer.add_param_group({"params": params[3:], "lr": 1e-2})
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.param_groups[0]["betas"] = (0.5, 0.6)
    run(optimizer, params, range(2, 4))
    expected = parameters()
    other = AdamW(expected[:3], **HYPER)
    run(other, expected[:3], range(2))
    second = AdamW(expected[3:], **{**HYPER, "lr": 1e-2})
    other.param_groups[0].update(lr=0.5, betas=(0.5, 0.6))
    for step in range(2, 4):
        set_gradients(expected, step)
        other.step()
        second.step()
    # The second group has HYPER's defaults of the first optimizer.
    assert_same(params, expected)


def test_the_same_gradient_for_two_parameters(adamw):
    params = parameters(shapes=[(40,), (40,)])
    shared = torch.randn(40)
    optimizer = adamw(params, **HYPER, max_grad_norm=1e9)
    for p in params:
        p.grad = shared
    optimizer.step()
    expected = parameters(shapes=[(40,), (40,)])
    for p in expected:
        p.grad = shared.clone()
    AdamW(expected, **HYPER).step()
    assert_same(params, expected)


def test_a_step_allocates_nothing(adamw):
    # No memory beyond the state: what a step makes is a norm and a few numbers.
    from torch.utils._python_dispatch import TorchDispatchMode

    class Allocations(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                known = {id(a) for a in args}
                self.bytes += 0 if id(result) in known else result.nbytes
            return result

    params = parameters(shapes=[(300, 300), (1000,)])
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(2))
    set_gradients(params, 2)
    with Allocations() as mode:
        optimizer.step()
    assert mode.bytes < 2000  # of 364,000 in the parameters
    with Allocations() as mode:  # which sees those of torch's own clipping
        torch.nn.utils.clip_grad_norm_(params, 1e-3, foreach=False)
        torch.empty(1000)
    assert mode.bytes >= 4000


def test_closure_that_replaces_gradients(adamw):
    params = parameters()
    optimizer = adamw(params, **HYPER)
    run(optimizer, params, range(2))
    optimizer.step(lambda: set_gradients(params, 2))
    expected = parameters()
    run(AdamW(expected, **HYPER), expected, range(3))
    assert_same(params, expected)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_gradient_of_another_shape_is_refused(adamw, steps):
    params = parameters()
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(steps))
    set_gradients(params, 2)
    params[5].grad.data = torch.zeros(10)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"shape \(10,\), the parameter \(5000,\)"):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert_bitwise_equal(p.detach(), old)


def test_a_backward_through_changed_weights_raises(adamw):
    # Two losses, one step between them: torch's steps are seen by autograd, and so must ours be.
    weight, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = adamw([weight], lr=1.0)
    loss = (weight * other).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_cycles_are_collected(adamw):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([param], **HYPER)
    optimizer.param_groups[0]["owner"] = optimizer
    param.grad = torch.ones(3)
    optimizer.step()
    gone = weakref.ref(optimizer)
    del param, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_does_not_matter(adamw, dtype):
    params = parameters()
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    run(optimizer, params, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"].fill_(1001)
    torch.set_default_dtype(dtype)
    try:
        optimizer.load_state_dict(state)
        optimizer.zero_grad()
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.last_grad_norm.dtype == torch.float32
    for p in params:
        assert_bitwise_equal(optimizer.state[p]["step"], torch.tensor(1001.0))


def test_the_default_device_does_not_matter(adamw):
    params, expected = parameters(), parameters()
    optimizer = adamw(params, **HYPER, max_grad_norm=1.0)
    set_gradients(params, 0)
    params[4].grad[0, 0] = torch.nan
    with torch.device("meta"):
        optimizer.step()
        assert optimizer.first_nonfinite()[:2] == (0, 4)
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.last_grad_norm.isnan()
    run(optimizer, params, range(1, 3))
    run(AdamW(expected, **HYPER, max_grad_norm=1.0), expected, range(1, 3))
    assert_same(params, expected)


def test_threads_and_tables(adamw):
    # Two optimizers stepping in turn share nothing.
    params, others = parameters(), parameters(shapes=[(9,), (100, 3)])
    first, second = adamw(params, **HYPER), adamw(others, **HYPER)
    for step in range(4):
        set_gradients(params, step)
        set_gradients(others, step)
        first.step()
        second.step()
    expected = parameters()
    run(AdamW(expected, **HYPER), expected, range(4))
    assert_same(params, expected)
    assert all(t.isfinite().all() for t in snapshot(second, others))


def test_a_gradient_that_stands_for_the_negative_of_its_memory(adamw):
    # Autograd makes such gradients of the conjugates of complex numbers.
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = adamw([param], lr=0.1)
    for _ in range(3):
        param.grad = torch._neg_view(-torch.ones(3))
        assert param.grad.is_neg()
        optimizer.step()
    assert torch.allclose(param.detach(), torch.full((3,), 0.7), atol=1e-5)
