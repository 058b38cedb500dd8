"""clip_gradients against its fp64 reference and torch.nn.utils.clip_grad_norm_."""

import math

import pytest
import torch
from fastlm.kernels import collect
from tolerance import DEVICES, assert_as_accurate, assert_bitwise_equal

from fastlm import clip_gradients
from fastlm.ops.clip_grad_norm import clip_gradients_reference

pytestmark = pytest.mark.usefixtures("one_thread")

# One element, none at all, odd sizes, 0-d, a matrix, more than a block of threads.
SHAPES = [(1,), (0,), (7,), (), (33, 65), (70_001,)]


def parameters(shapes=SHAPES, dtype=torch.float32, device="cpu", *, scale=1.0, seed=0):
    """Parameters with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))
        p.grad = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
        made.append(p)
    return made


def copies(params, dtype=None):
    """The same parameters with gradients of their own."""
    made = []
    for p in params:
        copy = torch.nn.Parameter(p.detach().to(dtype or p.dtype), p.requires_grad)
        copy.grad = None if p.grad is None else p.grad.to(dtype or p.dtype, copy=True)
        made.append(copy)
    return made


def assert_clipped(params, norm, before, max_norm):
    """Is this what clipping `before` gives? The truth in fp64, PyTorch's error as the measure."""
    truth, torchs = copies(before, torch.float64), copies(before)
    true_norm = clip_gradients_reference(truth, max_norm)
    torch.nn.utils.clip_grad_norm_(torchs, max_norm)
    assert isinstance(norm, float)
    # fp32 sums of 70,000 squares; in bf16 or fp16 they would be off by 1e-3 at least.
    assert math.isclose(norm, true_norm, rel_tol=1e-5), f"norm {norm}, not {true_norm}"
    for i, (p, torch_p, true_p) in enumerate(zip(params, torchs, truth, strict=True)):
        assert (p.grad is None) == (true_p.grad is None), f"gradient {i}"
        if p.grad is not None:
            assert_as_accurate(p.grad, torch_p.grad, true_p.grad, what=f"gradient {i}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_norm", [0.01, 1.0, 200.0, 1e6])
def test_against_reference_and_torch(max_norm, dtype, device):
    # The norm is about 269: three of these clip, the last does not.
    params = parameters(dtype=dtype, device=device)
    before = copies(params)
    norm = clip_gradients(params, max_norm)
    assert_clipped(params, norm, before, max_norm)
    if max_norm == 1e6:
        for p, old in zip(params, before, strict=True):
            assert_bitwise_equal(p.grad, old.grad)


def test_cs336_values():
    # CS336's test: six 5 x 5 parameters, one of them frozen, against torch's function.
    tensors = [torch.randn(5, 5, generator=torch.Generator().manual_seed(i)) for i in range(6)]

    def gradients(clip):
        params = tuple(torch.nn.Parameter(t.clone()) for t in tensors)
        params[-1].requires_grad_(False)
        torch.cat(params).sum().backward()
        clip(params, 1e-2)
        assert params[-1].grad is None
        return [p.grad for p in params[:-1]]

    ours, torchs = gradients(clip_gradients), gradients(torch.nn.utils.clip_grad_norm_)
    for gradient, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_a_generator_clips():
    # The seeds walked over `params` twice: of a generator nothing is left to be scaled.
    params = parameters()
    before = copies(params)
    norm = clip_gradients((p for p in params), 1.0)
    assert_clipped(params, norm, before, 1.0)
    module = torch.nn.Linear(3, 3)
    module(torch.ones(3)).sum().mul(100).backward()
    clip_gradients(module.parameters(), 0.5)
    torch.testing.assert_close(clip_gradients(module.parameters(), math.inf), 0.5)


@pytest.mark.parametrize("container", [list, tuple, iter, dict.fromkeys], ids=lambda c: c.__name__)
def test_containers(container):
    params = parameters()
    before = copies(params)
    assert_clipped(params, clip_gradients(container(params), 1.0), before, 1.0)


def test_one_parameter():
    (param,) = parameters([(4, 5)])
    before = copies([param])
    assert_clipped([param], clip_gradients(param, 0.1), before, 0.1)


def test_parameters_without_a_gradient():
    params = parameters()
    params[2].grad = None
    params[4].requires_grad_(False)
    params[4].grad = None
    before = copies(params)
    assert_clipped(params, clip_gradients(params, 1.0), before, 1.0)
    for none in (
        [],
        iter([]),
        [torch.nn.Parameter(torch.ones(3))],
        torch.nn.Parameter(torch.ones(3)),
    ):
        assert clip_gradients(none, 1.0) == 0.0


def test_mixed_dtypes():
    params = parameters(dtype=torch.float32) + parameters(dtype=torch.bfloat16, seed=1)
    before = copies(params)
    assert_clipped(params, clip_gradients(params, 1.0), before, 1.0)
    params = parameters(dtype=torch.float64, scale=1e-3) + params
    before = copies(params)
    assert_clipped(params, clip_gradients(params, 0.1), before, 0.1)


def test_both_ways_to_read_the_gradients(monkeypatch):
    """Ordinary tensors are read column by column, anything else one by one."""
    shapes = [(7,), (), (5, 6)]
    params = parameters(shapes) + parameters(shapes, torch.bfloat16) + parameters(shapes, seed=1)
    params[1].grad, params[6].grad = None, params[0].grad
    with torch.device("meta"):  # a default for factories changes nothing
        found = collect.collect_gradients(params)
        with monkeypatch.context() as patch:
            patch.setattr(collect, "_plain_gradients", lambda *arguments: None)
            general = collect.collect_gradients(params)
    assert [(t.device, t.ranks) for t in found.tables] == [(torch.device("cpu"), None)]
    assert found.tables[0].rows.tolist() == general.tables[0].rows.tolist()
    assert len(found.tables[0].rows) == 7
    assert all(x is y for x, y in zip(found.updated, general.updated, strict=True))
    own = torch.ones(3).as_subclass(type("Own", (torch.Tensor,), {}))
    for gradient in (torch.ones(5, 6).t(), torch.ones(0), own):
        other = torch.nn.Parameter(torch.ones(gradient.shape))
        other.grad = gradient
        assert collect._plain_gradients([*params, other], {}) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_is_summed_in_fp64(dtype):
    # 2^16 ones: in bf16 the sum would stop at 256, in fp16 overflow at 65504.
    param = torch.nn.Parameter(torch.zeros(1 << 16, dtype=dtype))
    param.grad = torch.ones_like(param)
    assert clip_gradients(param, 1.0) == 256.0
    assert (param.grad == 1 / 256).all()
    param.grad = torch.full_like(param, 300.0)  # 300^2 is no fp16 number
    assert clip_gradients(param, 1e9) == 76800.0


def test_squares_beyond_fp32():
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.full((4,), 1e30)
    assert math.isclose(clip_gradients(param, 1.0), 2e30, rel_tol=1e-7)
    torch.testing.assert_close(param.grad, torch.full((4,), 0.5))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_norm_that_is_not_finite_leaves_the_gradients(value):
    # max_norm / inf would make zeros of every finite gradient, and NaN of the infinite one.
    params = parameters()
    params[2].grad[3] = value
    before = copies(params)
    norm = clip_gradients(params, 1.0)
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf
    for p, old in zip(params, before, strict=True):
        assert_bitwise_equal(p.grad, old.grad)
    reference = copies(before)
    clip_gradients_reference(reference, 1.0)
    for p, old in zip(reference, before, strict=True):
        assert_bitwise_equal(p.grad, old.grad)


def test_exactly_at_the_limit():
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(param, 5.0) == 5.0
    assert param.grad.tolist() == [3.0, 4.0]
    assert clip_gradients(param, float("inf")) == 5.0
    assert param.grad.tolist() == [3.0, 4.0]


def test_eps():
    param = torch.nn.Parameter(torch.zeros(2))
    param.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(param, 1.0, 5.0) == 5.0  # the seeds' third positional argument
    torch.testing.assert_close(param.grad, torch.tensor([0.3, 0.4]))


def test_zero_gradients():
    param = torch.nn.Parameter(torch.zeros(3))
    param.grad = torch.zeros(3)
    assert clip_gradients(param, 1.0) == 0.0
    assert param.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, float("nan"), -float("inf")])
def test_max_norm_must_be_positive(max_norm):
    params = parameters()
    before = copies(params)
    with pytest.raises(ValueError, match=f"max_norm={max_norm}: it must be positive"):
        clip_gradients(params, max_norm)
    for p, old in zip(params, before, strict=True):
        assert_bitwise_equal(p.grad, old.grad)


def test_what_is_no_parameter():
    module = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match=r"holds a tuple.*model.parameters"):
        clip_gradients(module.named_parameters(), 1.0)


def test_autograd_sees_scaled_gradients():
    (param,) = parameters([(5,)])
    version = param.grad._version
    clip_gradients(param, 1e-3)
    assert param.grad._version > version


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_own_kernels(dtype):
    # What other devices run: the factor is not rounded to the gradients' dtype.
    before = parameters(dtype=dtype)
    truth = torch.cat([p.grad.double().flatten() for p in before])
    truth *= 0.7 / (truth.norm() + 1e-6)
    errors = {}
    for impl in ("torch", "cpp"):
        params = copies(before)
        assert_clipped(params, clip_gradients(params, 0.7, impl=impl), before, 0.7)
        gradients = torch.cat([p.grad.double().flatten() for p in params])
        errors[impl] = (gradients - truth).square().mean().sqrt()
    assert errors["torch"] <= 1.1 * errors["cpp"]


def test_unknown_implementation():
    with pytest.raises(ValueError, match=r"impl='cuda'.*clip_grad_norm"):
        clip_gradients(parameters(), 1.0, impl="cuda")
    params = parameters()
    before = copies(params)
    assert_clipped(params, clip_gradients(params, 1.0, impl="torch"), before, 1.0)


def nothing_clipped(params, before, norm):
    for p, old in zip(params, before, strict=True):
        p.grad.copy_(old.grad)
    return norm


def one_gradient_missed(params, before, norm):
    params[2].grad.copy_(before[2].grad)
    return norm


def clipped_each_by_its_own_norm(params, before, norm):
    for p, old in zip(params, before, strict=True):
        p.grad.copy_(old.grad)
        torch.nn.utils.clip_grad_norm_(p, 1.0)
    return norm


def clipped_twice_as_hard(params, before, norm):
    for p in params:
        p.grad.mul_(0.5)
    return norm


def zeroed(params, before, norm):
    for p in params:
        p.grad.zero_()
    return norm


def norm_after_clipping(params, before, norm):
    return 1.0


def largest_of_the_norms(params, before, norm):
    return max(old.grad.norm().item() for old in before)


MUTATIONS = [
    nothing_clipped, one_gradient_missed, clipped_each_by_its_own_norm, clipped_twice_as_hard,
    zeroed, norm_after_clipping, largest_of_the_norms,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda f: f.__name__)
def test_a_wrong_clipping_is_rejected(mutation, dtype):
    params = parameters(dtype=dtype)
    before = copies(params)
    norm = clip_gradients(params, 1.0)
    assert_clipped(params, norm, before, 1.0)
    with pytest.raises(AssertionError):
        assert_clipped(params, mutation(params, before, norm), before, 1.0)


def test_the_norm_of_a_large_tensor_is_accurate():
    """torch's own, of 16 M elements at once, is 0.06 % low."""
    values = torch.rand(16 << 20, generator=torch.Generator().manual_seed(0))
    truth = float(values.double().square().sum()) ** 0.5
    for gradient in (values, values.view(4096, 4096).T):
        param = torch.nn.Parameter(torch.empty_like(gradient))
        param.grad = gradient
        assert clip_gradients(param, math.inf) == pytest.approx(truth, rel=1e-12)
