"""AdamW and dtypes: 16-bit parameters, param_precision="split", loads that lose nothing."""

import copy
import io

import pytest
import torch
from adamw_runs import HYPER, SHAPES, AdamW, parameters, run, set_gradients
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = [torch.bfloat16, torch.float16]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_moments_of_16_bit_parameters_are_fp32(dtype):
    params = parameters(dtype)
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(3))
    for p in params:
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert optimizer.state[p][key].dtype == torch.float32
    # torch's own load_state_dict would round them to the parameters' dtype.
    other = AdamW(copies := [torch.nn.Parameter(p.detach().clone()) for p in params])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params, copies, strict=True):
        for key, value in optimizer.state[p].items():
            assert_bitwise_equal(other.state[q][key], value)
    run(optimizer, params, range(3, 6))
    run(other, copies, range(3, 6))
    for p, q in zip(params, copies, strict=True):
        assert_bitwise_equal(q.detach(), p.detach())


def test_a_tensor_of_the_state_dict_is_not_the_optimizers():
    # Else two optimizers that load one state dict would write into the same moments.
    params = parameters()
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(2))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    others = [AdamW(parameters(), **HYPER) for _ in range(2)]
    for other in others:
        other.load_state_dict(state)
        own = [p for group in other.param_groups for p in group["params"]]
        run(other, own, range(2, 4))
    for index, entry in state["state"].items():
        for key, value in entry.items():
            assert_bitwise_equal(value, before["state"][index][key])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_torchs_16_bit_state_loads(dtype):
    params = parameters(dtype)
    torchs = torch.optim.AdamW(params, **HYPER)
    run(torchs, params, range(4))
    optimizer = AdamW(params, **HYPER)
    optimizer.load_state_dict(torchs.state_dict())
    for p in params:
        assert_bitwise_equal(optimizer.state[p]["exp_avg"], torchs.state[p]["exp_avg"].float())
    run(optimizer, params, range(4, 6))
    # And back: torch rounds to what it can hold.
    torchs.load_state_dict(optimizer.state_dict())
    assert torchs.state[params[4]]["exp_avg"].dtype == dtype
    run(torchs, params, range(6, 8))


def test_lossy_loads_are_refused():
    params = parameters(torch.float64)
    double = AdamW(params, **HYPER)
    run(double, params, range(2))
    single_params = parameters()
    single = AdamW(single_params, **HYPER)
    run(single, single_params, range(1))
    before = copy.deepcopy(single.state_dict())
    with pytest.raises(ValueError, match=r"exp_avg of parameter 0 of group 0.*float64.*float32"):
        single.load_state_dict(double.state_dict())
    for index, entry in single.state_dict()["state"].items():  # nothing has changed
        for key, value in entry.items():
            assert_bitwise_equal(value, before["state"][index][key])
    # Values that fp32 holds exactly load.
    exact = double.state_dict()
    for entry in exact["state"].values():
        for key in ("exp_avg", "exp_avg_sq"):
            entry[key] = entry[key].float().double()
    single.load_state_dict(exact)
    assert single.state[single_params[4]]["exp_avg"].dtype == torch.float32


def spoiled(change):
    params = parameters(shapes=[(3, 2), (4,)])
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    return optimizer, state


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["state"][1].pop("exp_avg"), "parameter 1 of group 0.*no 'exp_avg'"),
        (lambda s: s["state"][1].pop("step"), "no 'step'"),
        (lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(3, 2)), "'max_exp_avg_sq'"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(2, 3)), r"shape \(2, 3\), not \(3, 2\)"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(3, 2, dtype=torch.int32)), "int32"),
        (lambda s: s["state"][0].update(step=2**24 + 1), "16777217, is no float32"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad=True"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize=True"),
    ],
    ids=range(8),
)
def test_states_that_do_not_fit(change, message):
    optimizer, state = spoiled(change)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    for index, entry in optimizer.state_dict()["state"].items():
        for key, value in entry.items():
            assert_bitwise_equal(value, before["state"][index][key])


def test_users_load_hooks_see_plain_tensors():
    params = parameters()
    optimizer = AdamW(params, **HYPER)
    run(optimizer, params, range(2))
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.append(type(state["state"][0]["exp_avg"]))
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(type(o.state[params[0]]["exp_avg"]))
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.Tensor, torch.Tensor]


def test_init_state():
    params = parameters()
    optimizer = AdamW(params, **HYPER)
    optimizer.init_state()
    state = optimizer.state_dict()["state"]
    assert sorted(state) == list(range(len(params)))
    for p, entry in zip(params, state.values(), strict=True):
        assert entry["step"].item() == 0 and entry["step"].dim() == 0
        assert entry["exp_avg"].shape == entry["exp_avg_sq"].shape == p.shape
    run(optimizer, params, range(3))
    optimizer.init_state()  # leaves what is there
    expected = parameters()
    run(AdamW(expected, **HYPER), expected, range(3))
    for p, q in zip(params, expected, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())
        assert optimizer.state[p]["step"].item() == 3


# param_precision="split"


def split_pair(steps, seed_shapes=SHAPES):
    """(fp32 parameters, their optimizer, the same split into bf16 and remainder, its optimizer)."""
    whole = parameters(shapes=seed_shapes)
    halves = [torch.nn.Parameter(p.detach().bfloat16()) for p in whole]
    exact, split = AdamW(whole, **HYPER), AdamW(halves, **HYPER, param_precision="split")
    split.load_master_weights([p.detach() for p in whole])
    both(whole, exact, halves, split, steps)
    return whole, exact, halves, split


def both(whole, exact, halves, split, steps):
    for step in steps:
        set_gradients(halves, step)
        for p, q in zip(whole, halves, strict=True):
            p.grad = q.grad.float()
        exact.step()
        split.step()


def assert_masters(split, whole):
    for master, p in zip(split.master_weights(), whole, strict=True):
        assert master.dtype == torch.float32
        assert_bitwise_equal(master, p.detach())


def test_split_resumes_bit_for_bit():
    whole, exact, halves, split = split_pair(range(5))
    state = through_a_file({"model": [p.detach() for p in halves], "opt": split.state_dict()})
    assert state["opt"]["state"][0]["remainder"].dtype == torch.int16
    resumed = [torch.nn.Parameter(p) for p in state["model"]]
    other = AdamW(resumed, **HYPER, param_precision="split")
    other.load_state_dict(state["opt"])
    assert_masters(other, whole)
    both(whole, exact, resumed, other, range(5, 10))
    assert_masters(other, whole)


def test_split_and_fp32_exchange_their_states():
    whole, exact, halves, split = split_pair(range(5))
    # Split -> fp32: the weights are exported, the moments load as they are, the remainder goes.
    single = [torch.nn.Parameter(master) for master in split.master_weights()]
    state = copy.deepcopy(split.state_dict())
    for entry in state["state"].values():
        del entry["remainder"]
    other = AdamW(single, **HYPER)
    other.load_state_dict(state)
    # fp32 -> split.
    again = [torch.nn.Parameter(p.detach().bfloat16()) for p in whole]
    third = AdamW(again, **HYPER, param_precision="split")
    third.load_state_dict(exact.state_dict())
    third.load_master_weights([p.detach() for p in whole])
    for step in range(5, 9):
        set_gradients(halves, step)
        for p, q in zip(halves, single, strict=True):
            q.grad = p.grad.float()
        other.step()
    both(whole, exact, again, third, range(5, 9))
    assert_masters(third, whole)
    for p, q in zip(single, whole, strict=True):
        assert_bitwise_equal(p.detach(), q.detach())


def test_torchs_bf16_state_loads_into_split():
    # Weights that come without a remainder are their own master.
    params = parameters(torch.bfloat16)
    torchs = torch.optim.AdamW(params, **HYPER)
    run(torchs, params, range(3))
    split = AdamW(params, **HYPER, param_precision="split")
    split.load_state_dict(torchs.state_dict())
    assert_masters(split, [p.detach().float() for p in params])
    run(split, params, range(3, 5))
    # torch loads the state, and leaves the remainder alone.
    torchs.load_state_dict(split.state_dict())
    run(torchs, params, range(5, 6))


def test_a_remainder_is_not_dropped_in_silence():
    _, _, halves, split = split_pair(range(3))
    native = AdamW([torch.nn.Parameter(p.detach().clone()) for p in halves], **HYPER)
    with pytest.raises(ValueError, match=r'param_precision="split".*master_weights'):
        native.load_state_dict(split.state_dict())


def test_split_leaves_full_precision_parameters_alone():
    mixed = [*parameters(torch.bfloat16), *parameters(), *parameters(torch.float64)]
    optimizer = AdamW(mixed, **HYPER, param_precision="split", max_grad_norm=1.0)
    run(optimizer, mixed, range(2))
    assert ["remainder" in optimizer.state[p] for p in mixed] == [
        p.dtype == torch.bfloat16 for p in mixed
    ]
    for p, master in zip(mixed, optimizer.master_weights(), strict=True):
        assert master.dtype == (torch.float32 if p.dtype == torch.bfloat16 else p.dtype)
    with pytest.raises(TypeError, match="float16"):
        AdamW(parameters(torch.float16), param_precision="split")


def test_master_weights_that_do_not_fit():
    optimizer = AdamW(parameters(torch.bfloat16), param_precision="split")
    with pytest.raises(ValueError, match="6 tensors"):
        optimizer.load_master_weights([torch.ones(3)])


@pytest.mark.parametrize("copied", [copy.deepcopy, through_a_file], ids=["deepcopy", "file"])
def test_copies_keep_the_precision(copied):
    _, _, halves, split = split_pair(range(2))
    if copied is copy.deepcopy:
        other_params, other = copied((halves, split))
        assert other.param_precision == "split"
    else:
        other_params = [torch.nn.Parameter(p.detach().clone()) for p in halves]
        other = AdamW(other_params, **HYPER, param_precision="split")
        other.load_state_dict(copied(split.state_dict()))
    run(split, halves, range(2, 4))
    run(other, other_params, range(2, 4))
    for a, b in zip(split.master_weights(), other.master_weights(), strict=True):
        assert_bitwise_equal(a, b)
