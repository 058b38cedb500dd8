"""causal_attention, forward and backward, and forward alone with a cache.

B batch, H heads, T positions, d head width.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import TINY, Candidate, Work, compare
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastlm import causal_attention
from fastlm.ops.causal_attention import causal_attention_reference

SHAPES = {
    "cpu": [(16, 8, 256, 64), (8, 12, 1024, 64)],
    "cuda": [(16, 12, 1024, 64), (4, 32, 4096, 128)],
}
if TINY:
    SHAPES = {key: [(1, 2, 128, 16), (1, 2, 128, 32)] for key in SHAPES}
KEYS = 128 if TINY else 1024
QUERIES = {"one query": 1, "prompt": KEYS}  # behind the cached keys, or all of them


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[-2] == k.shape[-2])


def flex(T: int, device: torch.device):
    """Compiled, with the causal mask's blocks."""

    def causal(b, h, query, key):
        return query >= key

    mask = create_block_mask(causal, None, None, T, T, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def tensors(B, H, Tq, T, d, dtype, device) -> list[torch.Tensor]:
    """q, k, v and out's gradient in the layout of a model's projections, (B, T, H, d)."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(B, t, H, d, device=device, generator=generator).to(dtype).transpose(1, 2)
        for t in (Tq, T, T, Tq)
    ]


def check(got, expected, dtype) -> None:
    rounding = 3e-2 if dtype == torch.bfloat16 else 1e-4
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("shape", range(2))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_causal_attention(benchmark, device, dtype, shape):
    B, H, T, d = SHAPES[device.type][shape]
    q, k, v, grad_out = tensors(B, H, T, T, d, dtype, device)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def forward_backward(attention, inputs, grad):
        out = attention(*inputs)
        return out, *torch.autograd.grad(out, inputs, grad)

    wide = [x[:1].detach().float().requires_grad_() for x in leaves]
    expected = forward_backward(causal_attention_reference, wide, grad_out[:1].float())
    first = [x[:1] for x in forward_backward(causal_attention, leaves, grad_out)]
    check(first, expected, dtype)
    del expected, first, wide

    def candidate(attention) -> Candidate:
        return Candidate(lambda: forward_backward(attention, leaves, grad_out))

    torch.compiler.reset()
    peers = {"F.scaled_dot_product_attention": candidate(sdpa)}
    if device.type == "cuda":  # on a CPU flex_attention has no backward
        peers["flex_attention, compiled"] = candidate(flex(T, device))
    compare(
        benchmark,
        "causal_attention",
        f"{B} x {H} x {T} x {d} {str(dtype).removeprefix('torch.')}",
        device,
        candidate(causal_attention),
        peers,
        # Forward q k^T and p v; backward q k^T again, dp, dv, dq and dk.
        Work("7 matmuls of B * H * T^2 * d / 2", flops=7 * B * H * T * T * d, dtype=dtype),
        seconds=3,
    )


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def bench_causal_attention_with_a_cache(benchmark, device, dtype, queries):
    B, H, T, d = 1, 12, KEYS, 64
    Tq = QUERIES[queries]
    q, k, v, _ = tensors(B, H, Tq, T, d, dtype, device)
    expected = causal_attention_reference(q.float(), k.float(), v.float())
    torch.compiler.reset()
    peers = {"F.scaled_dot_product_attention": sdpa}
    if Tq == T:
        peers["flex_attention, compiled"] = flex(T, device)
    with torch.no_grad():
        check([causal_attention(q, k, v)], [expected], dtype)
        candidates = {
            name: Candidate(lambda attention=attention: attention(q, k, v))
            for name, attention in peers.items()
        }
        seen = Tq * T / (2 if Tq == T else 1)
        compare(
            benchmark,
            "causal_attention",
            f"forward, {queries}, {B} x {H} x {T} x {d} {str(dtype).removeprefix('torch.')}",
            device,
            Candidate(lambda: causal_attention(q, k, v)),
            candidates,
            Work(
                "2 matmuls of B * H * (keys seen) * d", flops=int(4 * B * H * seen * d), dtype=dtype
            ),
            seconds=2,
        )
