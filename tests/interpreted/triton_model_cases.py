"""Rotation and SwiGLU, in Triton's interpreter or on a GPU, against fp64."""

import pytest
import torch
from fastlm.kernels import configs
from fastlm.kernels.rope import rotate
from fastlm.kernels.swiglu import swiglu, swiglu_gradient
from interpreter import DEVICE, INTERPRETED
from tolerance import assert_as_accurate, assert_bitwise_equal

from fastlm.model import rope_tables
from fastlm.ops.rope import apply_rope

# (B, T, H, d): one program and several, heads of every kind of width, a part of the last program.
SHAPES = [
    (2, 7, 3, 64),
    (1, 33, 2, 80),
    (3, 5, 1, 2),
    (2, 3, 2, 6),
    (1, 17, 4, 128),
    (1, 2, 1, 256),
]
SHAPES += [(1, 0, 2, 8), (0, 4, 2, 8)]


def by_torch(x, cos, sin):
    return apply_rope(x.transpose(1, 2), cos, sin).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_turns_the_heads_of_a_joint_projection(shape, dtype):
    """Read from the middle of a wider tensor, written into another; turned back it is as before."""
    B, T, H, d = shape
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(B, T, H + 3, d, generator=generator, device="cpu").to(DEVICE, dtype)
    wide[..., 0] *= 1e3
    x, before = wide[:, :, 1 : 1 + H], wide.clone()
    cos, sin = (table.to(DEVICE) for table in rope_tables(max(T, 1), d, 1e4))
    cos, sin = cos[:T], sin[:T]
    target = torch.full_like(wide, 7.0)
    rotate(x, (cos, sin), out=target[:, :, 2 : 2 + H])
    truth = by_torch(x.double(), cos.double(), sin.double())
    pairs = x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True)
    size = pairs.expand(*pairs.shape[:-1], 2).flatten(-2)  # of what may cancel in a sum of two
    got = target[:, :, 2 : 2 + H]
    slack = 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.0  # it truncates
    assert_as_accurate(got, by_torch(x, cos, sin), truth, magnitude=size, slack=slack)
    assert (target[:, :, :2] == 7.0).all() and (target[:, :, 2 + H :] == 7.0).all()
    assert_bitwise_equal(wide, before)
    copied = torch.full_like(wide, 7.0)
    rotate(x, None, out=copied[:, :, :H])
    assert_bitwise_equal(copied[:, :, :H], x)
    returned = torch.empty_like(got)
    rotate(got, (cos, sin), out=returned, back=True)
    truth = by_torch(got.double(), cos.double(), -sin.double())
    assert_as_accurate(returned, by_torch(got, cos, -sin), truth, magnitude=size, slack=slack)


def test_positions_beyond_32_bits_of_elements():
    """Offsets are 64 bits wide: strides whose multiples pass 2^31."""
    if INTERPRETED:
        pytest.skip("needs a GPU: 8 GiB of memory")
    wide = torch.zeros(2, 2, 1, 2**30, dtype=torch.bfloat16)
    x = wide[..., :4]
    x.copy_(torch.arange(16.0).view(2, 2, 1, 4))
    cos, sin = (table.to(DEVICE) for table in rope_tables(2, 4, 1e4))
    out = torch.empty_like(x)
    rotate(x, (cos, sin), out=out)
    torch.testing.assert_close(out, by_torch(x, cos, sin), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, F", [(3, 64), (2, 2048), (2, 2051), (1, 5000), (4, 1), (0, 8)])
def test_swiglu(rows, F, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2 * F, generator=generator, device="cpu").to(DEVICE, dtype)
    dh = torch.randn(rows, F, generator=generator, device="cpu").to(DEVICE, dtype)
    if rows:
        x[0, : F // 2] *= 30.0  # sigmoids of 0 and of 1
    h, dx = torch.empty(rows, F, dtype=dtype), torch.empty_like(x)
    swiglu(x, h)
    swiglu_gradient(x, dh, dx)

    def by_torch(x):
        leaf = x.clone().requires_grad_()
        gate, value = leaf.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * value
        return y.detach(), torch.autograd.grad(y, leaf, dh.to(y.dtype))[0]

    torchs, truth = by_torch(x), by_torch(x.double())
    # 1 + g (1 - s) cancels near g = -1.28.
    s = x[:, :F].double().sigmoid()
    size = (dh.double() * x[:, F:].double() * s).abs() * (1 + (x[:, :F].double() * (1 - s)).abs())
    sizes = [truth[0].abs(), torch.cat((size, truth[1][:, F:].abs()), dim=-1)]
    slack = 1.0 if INTERPRETED and dtype == torch.bfloat16 else 0.0  # it truncates
    if dtype == torch.float32:  # a GPU's exponential errs by (2 + |g|) ULP, NumPy's by 3
        g = x[:, :F].double().abs()
        sizes = [size * (2 + g.repeat(1, size.shape[1] // F)) for size in sizes]
    for got, theirs, true, size in zip((h, dx), torchs, truth, sizes, strict=True):
        assert_as_accurate(got, theirs, true, magnitude=size, slack=slack)


def test_blocks_are_powers_of_two():
    for d in range(2, 600, 2):
        block = configs.rope_config(d, False)["BLOCK"]
        assert block >= 1 and block & (block - 1) == 0
