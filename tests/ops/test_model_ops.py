"""Rotary positions and SwiGLU as ops: values, gradients, torch.compile, opcheck; kernels on a GPU.

B batch, T positions, H heads, H_kv heads of keys, d head width.
"""

import pytest
import torch
from gpu import COMPILED_DEVICES, DEVICES
from interpreter import run_kernel_cases
from torch._subclasses.fake_tensor import FakeTensorMode

import fastlm.model
from fastlm.model import Attention, SwiGLU, document_mask
from fastlm.model_config import ModelConfig
from fastlm.ops import causal_attention as attention
from fastlm.ops.dispatch import on_gpu
from fastlm.ops.rope import rope_tables, rotate, rotate_joint
from fastlm.ops.swiglu import swiglu

pytestmark = pytest.mark.usefixtures("one_thread")

B, T, H, d = 2, 16, 4, 8


def tables(device="cpu"):
    return tuple(table.to(device) for table in rope_tables(T, d, 1e4))


def test_the_kernels():
    passed, summary = run_kernel_cases("triton_model_cases.py")
    assert passed >= 40, summary


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_joint_and_separate_turns_are_apply_ropes(heads, device):
    cos, sin = tables(device)
    generator = torch.Generator().manual_seed(0)
    width = (heads[0] + 2 * heads[1]) * d
    qkv = torch.randn(B, T, width, generator=generator).to(device).requires_grad_()
    parts = qkv.unflatten(-1, (-1, d)).split((heads[0], heads[1], heads[1]), dim=-2)
    expected = [attention.apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2) for x in parts]
    expected[2] = parts[2]
    separate = [rotate(x, cos, sin) for x in parts[:2]] + [parts[2]]
    joint = rotate_joint(qkv, cos, sin, heads)
    weights = [torch.randn(x.shape, generator=generator).to(device) for x in expected]
    gradients = []
    for found in (expected, separate, joint):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        loss = sum((w * x).sum() for w, x in zip(weights, found, strict=True))
        gradients += torch.autograd.grad(loss, qkv)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])
    assert joint[2].data_ptr() == qkv.data_ptr() + (heads[0] + heads[1]) * d * qkv.element_size()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_swiglu(dtype, device):
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(3, 5, 2 * 24, generator=generator)).to(device, dtype).requires_grad_()
    dh = torch.randn(3, 5, 24, generator=generator).to(device, dtype)
    h = swiglu(x)
    wide = x.detach().double().requires_grad_()
    gate, value = wide.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * value
    close = dict(rtol=2 ** -(7 if dtype == torch.bfloat16 else 20), atol=1e-5)
    torch.testing.assert_close(h.double(), expected, **close)
    (got,), (gradient,) = (
        torch.autograd.grad(y, leaf, dh.to(y.dtype)) for y, leaf in ((h, x), (expected, wide))
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), gradient, **close)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(swiglu(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("device", COMPILED_DEVICES)
def test_in_the_models_feed_forward(device, monkeypatch):
    torch.manual_seed(0)
    module = SwiGLU(16, 40).to(device)
    x = torch.randn(B, T, 16, generator=torch.Generator().manual_seed(1)).to(device)
    found = []
    monkeypatch.setattr(fastlm.model, "on_gpu", lambda *_: True)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True)
    for joint, function in ((False, module), (True, module), (True, compiled)):
        module.joint = joint
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = function(leaf)
        y.square().sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in module.parameters())])
    for results in found[1:]:
        for a, b in zip(results, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", COMPILED_DEVICES)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_in_the_models_attention(masked, joint, kv_heads, device, monkeypatch):
    """Compiled and not, with the ops and without them: the same results and gradients."""
    torch.manual_seed(0)
    module = Attention(ModelConfig(100, H * d, H, 1, T, num_kv_heads=kv_heads)).to(device)
    cos, sin = tables(device)
    x = torch.randn(B, T, H * d, generator=torch.Generator().manual_seed(1)).to(device)
    tokens = torch.arange(T, device=device).expand(B, T)
    mask = document_mask(tokens, 5, x.dtype) if masked else None

    def results(function):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        y = function(leaf, cos, sin, mask=mask)
        y.square().sum().backward()
        return [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]

    for place in (fastlm.model, fastlm.ops.rope):
        monkeypatch.setattr(place, "on_gpu", lambda *_: False)
    expected = results(module)
    for place in (fastlm.model, fastlm.ops.rope):
        monkeypatch.setattr(place, "on_gpu", lambda *_: True)
    monkeypatch.setattr(attention, "_runs_cpp", lambda *_: False)
    module.joint = joint
    torch.compiler.reset()
    for function in (module, torch.compile(module, fullgraph=True)):
        for a, b in zip(results(function), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "capability, dtype, masked, repeated",
    [
        ((8, 9), torch.bfloat16, False, False),
        ((9, 0), torch.float16, True, True),
        ((7, 5), torch.float16, False, True),
        ((9, 0), torch.float32, False, True),
    ],
    ids=str,
)
def test_shared_keys_are_repeated_where_no_fused_kernel_takes_them(
    capability, dtype, masked, repeated, monkeypatch
):
    """On GPUs that are not there: tensors without content."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(2, 6, T, d, dtype=dtype, device="cuda")
        k = torch.empty(2, 2, T, d, dtype=dtype, device="cuda")
        *keys, grouped = attention.of_query_heads(q, k, k, masked=masked)
    assert [x.shape[1] for x in keys] == ([6, 6] if repeated else [2, 2])
    assert bool(grouped) is not repeated
    groups = torch.compile(attention._groups_heads, fullgraph=True)
    assert groups(dtype, torch.device("cuda"), masked) is not repeated


@pytest.mark.parametrize("Tq", [T, T - 3])  # the second with a mask
def test_repeated_keys_give_the_same(Tq, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, Tq, d, generator=generator)
    k, v = torch.randn(2, 2, 2, T, d, generator=generator)
    masks = []
    for grouped in (True, False):
        monkeypatch.setattr(
            attention, "_groups_heads", lambda *of, grouped=grouped: masks.append(of[2]) or grouped
        )
        found = attention.causal_attention(q, k, v, impl="torch")
        torch.testing.assert_close(found, attention.causal_attention_reference(q, k, v))
    module = Attention(ModelConfig(100, H * d, H, 1, T, num_kv_heads=2))
    mask = document_mask(torch.zeros(B, T).long(), 5, torch.float32)
    module(torch.randn(B, T, H * d), *tables(), mask=mask)
    assert masks == [Tq < T] * 2 + [True]


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    cos, sin = tables(device)
    x = torch.randn(B, T, H, d, device=device)
    torch.library.opcheck(
        torch.ops.fastlm.rotate.default, (x.clone().requires_grad_(), cos, sin, False)
    )
    views = (x.transpose(1, 2).contiguous().transpose(1, 2), x, x)
    torch.library.opcheck(torch.ops.fastlm.rotate_joint_gradient.default, (*views, cos, sin))
    wide = torch.randn(B, T, 2 * d, device=device)
    torch.library.opcheck(torch.ops.fastlm.swiglu.default, (wide.clone().requires_grad_(),))
    torch.library.opcheck(torch.ops.fastlm.swiglu_gradient.default, (wide, x[..., 0, :]))


def test_who_on_gpu():
    """Tensors of other devices and types, and those in torch.func's transforms, go another way."""
    assert not on_gpu(torch.ones(1)) and not on_gpu(torch.ones(1, device="meta"))
    if torch.cuda.is_available():
        x = torch.ones(1, device="cuda")
        assert on_gpu(x, x.half()) and not on_gpu(x, x.double())
        found = []
        torch.func.vmap(lambda y: found.append(on_gpu(y)) or y)(x)
        assert found == [False]
