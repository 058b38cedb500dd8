"""The names of the CS336 assignment-1 test adapters (`tests/adapters.py`), but for the tokenizer.

In the course's adapters.py: `from fastlm.cs336 import *`. Weights are given as tensors, in the
assignment's layout: (d_out, d_in) for every linear map.
"""

import os
from collections.abc import Iterable, Mapping
from typing import IO, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fastlm.checkpoint import load_checkpoint, save_checkpoint
from fastlm.model import Attention, Block, RMSNorm, SwiGLU, TransformerLM
from fastlm.model_config import ModelConfig
from fastlm.ops.causal_attention import causal_attention
from fastlm.ops.cross_entropy import cross_entropy_loss
from fastlm.ops.gather_batch import get_batch
from fastlm.ops.rope import apply_rope, rope_tables
from fastlm.optim import AdamW, clip_gradients
from fastlm.schedule import cosine_lr_schedule

__all__ = [
    "get_adamw_cls",
    "run_cross_entropy",
    "run_embedding",
    "run_get_batch",
    "run_get_lr_cosine_schedule",
    "run_gradient_clipping",
    "run_linear",
    "run_load_checkpoint",
    "run_multihead_self_attention",
    "run_multihead_self_attention_with_rope",
    "run_rmsnorm",
    "run_rope",
    "run_save_checkpoint",
    "run_scaled_dot_product_attention",
    "run_silu",
    "run_softmax",
    "run_swiglu",
    "run_transformer_block",
    "run_transformer_lm",
]


def get_adamw_cls() -> type[torch.optim.Optimizer]:
    return AdamW


def run_linear(d_in: int, d_out: int, weights: Tensor, in_features: Tensor) -> Tensor:
    return F.linear(in_features, weights)


def run_embedding(vocab_size: int, d_model: int, weights: Tensor, token_ids: Tensor) -> Tensor:
    return F.embedding(token_ids, weights)


def run_silu(in_features: Tensor) -> Tensor:
    return F.silu(in_features)


def run_softmax(in_features: Tensor, dim: int) -> Tensor:
    return torch.softmax(in_features, dim=dim)


def run_rmsnorm(d_model: int, eps: float, weights: Tensor, in_features: Tensor) -> Tensor:
    return functional_call(RMSNorm(d_model, eps), {"weight": weights}, in_features)


def run_swiglu(
    d_model: int,
    d_ff: int,
    w1_weight: Tensor,
    w2_weight: Tensor,
    w3_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    weights = {"w1.weight": w1_weight, "w2.weight": w2_weight, "w3.weight": w3_weight}
    return functional_call(SwiGLU(d_model, d_ff), weights, in_features)


def run_scaled_dot_product_attention(
    Q: Tensor, K: Tensor, V: Tensor, mask: Tensor | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(Q, K, V, attn_mask=mask)


def run_rope(
    d_k: int, theta: float, max_seq_len: int, in_query_or_key: Tensor, token_positions: Tensor
) -> Tensor:
    cos, sin = rope_tables(max_seq_len, d_k, theta)
    return apply_rope(in_query_or_key, cos[token_positions], sin[token_positions])


def run_multihead_self_attention(
    d_model: int,
    num_heads: int,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
) -> Tensor:
    q, k, v = (
        F.linear(in_features, weight).unflatten(-1, (num_heads, -1)).transpose(-3, -2)
        for weight in (q_proj_weight, k_proj_weight, v_proj_weight)
    )
    return F.linear(causal_attention(q, k, v).transpose(-3, -2).flatten(-2), o_proj_weight)


def run_multihead_self_attention_with_rope(
    d_model: int,
    num_heads: int,
    max_seq_len: int,
    theta: float,
    q_proj_weight: Tensor,
    k_proj_weight: Tensor,
    v_proj_weight: Tensor,
    o_proj_weight: Tensor,
    in_features: Tensor,
    token_positions: Tensor | None = None,
) -> Tensor:
    cos, sin = rope_tables(max_seq_len, d_model // num_heads, theta)
    if token_positions is None:
        token_positions = torch.arange(in_features.shape[-2])
    while token_positions.dim() >= in_features.dim() and len(token_positions) == 1:
        token_positions = token_positions[0]
    # A dimension for the heads, between the batch's and the positions'.
    cos, sin = cos[token_positions].unsqueeze(-3), sin[token_positions].unsqueeze(-3)
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "output_proj.weight")
    weights = (q_proj_weight, k_proj_weight, v_proj_weight, o_proj_weight)
    attention = Attention(ModelConfig(1, d_model, num_heads, 1, in_features.shape[-2]))
    return _call(attention, dict(zip(names, weights, strict=True)), in_features, cos, sin)


def _call(module: nn.Module, weights: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
    """`module` with `weights`, which hold all of its parameters. ValueError: they do not."""
    if missing := [name for name, _ in module.named_parameters() if name not in weights]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ValueError(f"weights has no {missing[0]}{more}")
    return functional_call(module, dict(weights), inputs)


def run_transformer_block(
    d_model: int,
    num_heads: int,
    d_ff: int,
    max_seq_len: int,
    theta: float,
    weights: Mapping[str, Tensor],
    in_features: Tensor,
) -> Tensor:
    cos, sin = rope_tables(max_seq_len, d_model // num_heads, theta)
    T = in_features.shape[-2]
    block = Block(ModelConfig(1, d_model, num_heads, 1, max_seq_len, d_ff))
    return _call(block, weights, in_features, cos[:T], sin[:T])


def run_transformer_lm(
    vocab_size: int,
    context_length: int,
    d_model: int,
    num_layers: int,
    num_heads: int,
    d_ff: int,
    rope_theta: float,
    weights: Mapping[str, Tensor] | nn.Module,
    in_indices: Tensor,
) -> Tensor:
    """Logits of the model with `weights`: a state dict, or the model itself.

    Gradients flow to the tensors that are given. `model.state_dict()` detaches them: pass
    `dict(model.named_parameters())` or the model to train through this function.
    """
    if isinstance(weights, nn.Module):
        return weights(in_indices)
    with torch.device("meta"):  # only the structure: every parameter comes from `weights`
        model = TransformerLM(
            vocab_size, d_model, num_heads, num_layers, context_length, d_ff, rope_theta
        )
    cos, sin = rope_tables(context_length, d_model // num_heads, rope_theta)
    state = {
        **weights,
        "rope_cos": cos.to(in_indices.device),
        "rope_sin": sin.to(in_indices.device),
    }
    return _call(model, state, in_indices)


def run_cross_entropy(inputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy_loss(inputs, targets)


def run_gradient_clipping(parameters: Iterable[nn.Parameter], max_l2_norm: float) -> None:
    clip_gradients(parameters, max_l2_norm)


def run_get_lr_cosine_schedule(
    it: int,
    max_learning_rate: float,
    min_learning_rate: float,
    warmup_iters: int,
    cosine_cycle_iters: int,
) -> float:
    return cosine_lr_schedule(
        it, max_learning_rate, min_learning_rate, warmup_iters, cosine_cycle_iters
    )


def run_get_batch(
    dataset: np.ndarray, batch_size: int, context_length: int, device: str
) -> tuple[Tensor, Tensor]:
    return get_batch(dataset, batch_size, context_length, device)


def run_save_checkpoint(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    iteration: int,
    out: str | os.PathLike | IO[bytes],
) -> None:
    save_checkpoint(model, optimizer, iteration, out)


def run_load_checkpoint(
    src: str | os.PathLike | IO[bytes], model: nn.Module, optimizer: Any
) -> int:
    return load_checkpoint(src, model, optimizer)
