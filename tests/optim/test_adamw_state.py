"""AdamW's state: state dicts of torch.optim.AdamW and of the seeds, copies, pickles."""

import copy
import io
import pickle

import pytest
import torch
from adamw_runs import HYPER, AdamW, assert_close, parameters, reference_run, run, set_gradients
from tolerance import DEVICES, assert_bitwise_equal

from fastlm.ops.adamw import adamw_reference

pytestmark = pytest.mark.usefixtures("one_thread")


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
    whole = fastlms if saved_by is loaded_by else torchs_fused
    run(whole(uninterrupted), uninterrupted, range(40))
    for p, expected in zip(params, uninterrupted, strict=True):
        if {saved_by, loaded_by} == {fastlms}:
            assert_bitwise_equal(p.detach(), expected.detach())
        else:
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"].item() == 40
    if isinstance(optimizer, AdamW):
        # Which of torch's implementations saved it is not this optimizer's affair.
        assert optimizer.param_groups[0]["fused"] is None
        assert optimizer.param_groups[0]["foreach"] is None


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


@pytest.mark.parametrize("n", [100, 5000])
def test_one_tensor_of_the_state_is_saved_without_the_others(n):
    # Small ones share memory, which torch.save writes as a whole: 64 kB at most.
    params = parameters(shapes=[(n,)] * 300)
    optimizer = AdamW(params, **HYPER)
    optimizer.init_state()
    for key in ("step", "exp_avg"):
        file = io.BytesIO()
        torch.save(optimizer.state[params[7]][key], file)
        assert len(file.getvalue()) < max(1 << 16, 4 * n) + 4096
