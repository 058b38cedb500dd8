"""causal_attention: arguments that do not fit are errors that name them."""

import pytest
import torch

from fastlm import causal_attention


def tensors(q=(2, 4, 5, 8), k=(2, 2, 5, 8), v=None, dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in (q, k, k if v is None else v)]


def tables(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (dict(q=(5, 8), k=(5, 8)), r"q has shape \(5, 8\), k \(5, 8\), .* must be \(B, H, Tq, d\)"),
        (dict(k=(2, 5, 8)), r"k \(2, 5, 8\)"),
        (dict(v=(2, 2, 5, 9)), r"v \(2, 2, 5, 9\): they must be"),
        (dict(k=(3, 2, 5, 8)), r"k \(3, 2, 5, 8\).* agree in the batch"),
        (dict(k=(2, 2, 5, 6)), r"k \(2, 2, 5, 6\).* the heads' width"),
        (dict(q=(2, 4, 5, 0), k=(2, 2, 5, 0)), "width d > 0"),
        (dict(k=(2, 3, 5, 8)), "q's heads must be a multiple of k's"),
        (dict(k=(2, 0, 5, 8)), "q's heads must be a multiple of k's"),
        (dict(q=(2, 4, 6, 8)), "Tq=6 must not be above Tk=5"),
    ],
)
def test_shapes(shapes, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(*tensors(**shapes))


def test_dtypes():
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"q has dtype torch.float32, k torch.bfloat16, .* one dt"):
        causal_attention(q, k.bfloat16(), v)
    with pytest.raises(TypeError, match=r"torch.int64.*must be floating-point"):
        causal_attention(*tensors(dtype=torch.int64))
    with pytest.raises(TypeError, match=r"impl='cpp' takes no torch.float64: use impl='torch'"):
        causal_attention(*tensors(dtype=torch.float64), impl="cpp")
    assert causal_attention(*tensors(dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    "rope, kind, message",
    [
        (tables(5, 8), ValueError, r"\(5, 8\) and \(5, 8\), q \(2, 4, 5, 8\): .* \(T, d/2\)"),
        (tables(6, 4), ValueError, r"rope has shapes \(6, 4\)"),
        (tables(5, 4, dtype=torch.float64), TypeError, "must be float32"),
        ((tables(5, 4)[0], tables(4, 4)[0]), ValueError, r"\(5, 4\) and \(4, 4\)"),
        ((torch.zeros(5, 4, device="meta"),) * 2, ValueError, "rope is on meta"),
        ((torch.zeros(5, 4, requires_grad=True),) * 2, ValueError, "detach them"),
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", ["cpp", "torch"])
def test_rope(impl, rope, kind, message):
    with pytest.raises(kind, match=message):
        causal_attention(*tensors(), rope=rope, impl=impl)


def test_rope_needs_all_queries_and_pairs():
    with pytest.raises(ValueError, match=r"not Tq=3 and Tk=5: rotate q and k before"):
        causal_attention(*tensors(q=(2, 4, 3, 8)), rope=tables(3, 4))
    with pytest.raises(ValueError, match="d even"):
        causal_attention(*tensors(q=(2, 4, 5, 7), k=(2, 2, 5, 7)), rope=tables(5, 3))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_scale(scale):
    # By SDPA on a CPU they give NaN, as the mask comes first.
    with pytest.raises(ValueError, match=f"scale={scale}: it must be positive"):
        causal_attention(*tensors(), scale=scale)


def test_devices():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="k on meta"):
        causal_attention(q, k.to("meta"), v)
    assert causal_attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == q.shape


def test_implementations():
    q, k, v = tensors()
    with pytest.raises(ValueError, match="impl='triton': causal_attention on cpu has cpp, torch"):
        causal_attention(q, k, v, impl="triton")
    wide = tensors(q=(1, 2, 3, 257), k=(1, 2, 3, 257))
    with pytest.raises(ValueError, match=r"at most 256, not d=257: use impl='torch'"):
        causal_attention(*wide, impl="cpp")
    assert causal_attention(*wide).shape == (1, 2, 3, 257)
    with pytest.raises(ValueError, match=r"no dropout, so dropout_p=0.5: use impl='torch'"):
        causal_attention(q, k, v, dropout_p=0.5, impl="cpp")
