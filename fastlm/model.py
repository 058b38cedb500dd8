"""TransformerLM: a pre-norm decoder with RMSNorm, RoPE and SwiGLU, no biases.

Parameter names and mathematics are those of the CS336 assignment-1 model, so its state dicts load.
Shapes: B batch, T positions, D model width, H heads, d = D / H, F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm.kernels.collect import is_dtensor
from fastlm.ops.causal_attention import apply_rope, causal_attention


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (arXiv:1910.07467)."""

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


def rope_tables(max_seq_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin) of position * theta^(-2i/d), fp32, (max_seq_len, d/2) each (arXiv:2104.09864)."""
    wide = dict(dtype=torch.float64, device="cpu")  # not every device has float64
    frequencies = theta ** (-torch.arange(0, head_dim, 2, **wide) / head_dim)
    angles = torch.outer(torch.arange(max_seq_len, **wide), frequencies)
    return angles.cos().float(), angles.sin().float()


def _unit_rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension, in fp32; x: (..., d)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far, in generation: (B, H, max_seq_len, d) each."""

    def __init__(self):
        self.length = 0  # positions filled in every layer
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """Appends k, v: (B, H, T, d) and returns those of all positions: (B, H, length + T, d)."""
        if layer not in self._layers:
            shape = (*k.shape[:-2], max_seq_len, k.shape[-1])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        end = self.length + k.shape[-2]
        filled = []
        for stored, new in zip(self._layers[layer], (k, v), strict=True):
            stored[..., self.length : end, :] = new
            filled.append(stored[..., :end, :])
        return filled[0], filled[1]


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions.

    By causal_attention; with dropout of the attention weights, in training, by PyTorch's SDPA.

    qk_norm: each head's query and key are divided by their root mean square (arXiv:2010.04245).
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float, qk_norm: bool = False):
        super().__init__()
        self.num_heads, self.dropout, self.qk_norm = num_heads, dropout, qk_norm
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.output_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        cos: Tensor,  # (T, d/2) fp32, or one for each sequence: (B, 1, T, d/2)
        sin: Tensor,  # as cos
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,  # (B, 1, T, T) bool, of document_mask
    ) -> Tensor:  # (B, T, D)
        dropout_p = self.dropout if self.training else 0.0

        def heads(y: Tensor) -> Tensor:  # (B, T, D) -> (B, H, T, d)
            return y.unflatten(-1, (self.num_heads, -1)).transpose(-2, -3)

        q, k, v = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        if self.qk_norm:  # before the rotation, which changes no length
            q, k = _unit_rms(q), _unit_rms(k)
        rope = (cos, sin)
        if cache is not None or cos.dim() > 2 or mask is not None:
            q, k, rope = apply_rope(q, cos, sin), apply_rope(k, cos, sin), None
        if cache is not None:
            k, v = cache(k, v)
        if mask is None:
            y = causal_attention(q, k, v, rope=rope, dropout_p=dropout_p)
        else:
            groups = {"enable_gqa": True} if q.shape[-3] != k.shape[-3] else {}
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **groups)
        return self.output_proj(y.transpose(-3, -2).flatten(-2))


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv:2002.05202)."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)
        self.w3 = nn.Linear(d_model, d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout: float, qk_norm: bool = False
    ):
        super().__init__()
        self.ln1 = RMSNorm(d_model)
        self.attn = Attention(d_model, num_heads, dropout, qk_norm)
        self.ln2 = RMSNorm(d_model)
        self.ffn = SwiGLU(d_model, d_ff)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache=None, mask=None) -> Tensor:
        x = x + self.drop(self.attn(self.ln1(x), cos, sin, cache, mask))
        return x + self.drop(self.ffn(self.ln2(x)))


class TransformerLM(nn.Module):
    """Token ids (B, T) to logits (B, T, V).

    d_ff: default 8/3 * d_model rounded up to a multiple of 64. dropout: on the embedding, the
    attention weights and both residual branches, in training mode only. qk_norm: queries and keys
    of unit root mean square, which high learning rates want. activation_checkpointing: recompute
    each block in backward instead of keeping its activations.
    Raises ValueError if d_model is not divisible by num_heads or the head is of odd width.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int,
        d_ff: int | None = None,
        rope_theta: float = 10000.0,
        *,
        tie_embeddings: bool = False,
        dropout: float = 0.0,
        qk_norm: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        check_heads(d_model, num_heads)
        d_ff = default_d_ff(d_model) if d_ff is None else d_ff
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.activation_checkpointing = activation_checkpointing
        # The token that ends a document: set, no query sees the documents before its own.
        self.document_end: int | None = None
        device = torch.get_default_device()
        with torch.device("meta"):  # layers draw weights of their own, which would be in vain
            self.token_embeddings = nn.Embedding(vocab_size, d_model)
            self.drop = nn.Dropout(dropout)
            self.layers = nn.ModuleList(
                Block(d_model, num_heads, d_ff, dropout, qk_norm) for _ in range(num_layers)
            )
            self.ln_final = RMSNorm(d_model)
            self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
            table = torch.empty(max_seq_len, d_model // num_heads // 2, dtype=torch.float32)
            self.register_buffer("rope_cos", table, persistent=False)
            self.register_buffer("rope_sin", torch.empty_like(table), persistent=False)
        if tie_embeddings:
            self.lm_head.weight = self.token_embeddings.weight
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights from torch's CPU generator, and computes the rotary tables.

        Called by the constructor, except on the meta device. There it follows once there is memory,
        and gives the same weights, bit for bit, as construction with the same seed:

            with torch.device("meta"):
                model = TransformerLM(...)
            # here FSDP2's fully_shard, if the model is to be sharded
            model.to_empty(device="cuda")
            model.init_weights()

        Of sharded weights every rank draws the whole, one parameter at a time, and keeps its shard:
        for equal seeds the model is the same for any number of ranks. No rank waits for another.

        Normal weights: Glorot's variance 2 / (d_in + d_out), embeddings of variance 1. As in CS336,
        but the projections into the residual stream are divided by sqrt(2 * layers) (GPT-2), and a
        tied embedding has variance 1 / D, so that the first logits are of order 1. On the demo this
        reached a loss 0.24 nats lower after 500 steps than GPT-2's N(0, 0.02^2).
        """
        embedding, head = self.token_embeddings.weight, self.lm_head.weight
        for name, module in self.named_modules():
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
            elif isinstance(module, nn.Linear) and module.weight is not embedding:
                std = math.sqrt(2 / sum(module.weight.shape))
                if name.endswith(("output_proj", "w2")):
                    std /= math.sqrt(2 * len(self.layers))
                _draw_normal(module.weight, std)
        _draw_normal(embedding, 1 / math.sqrt(embedding.shape[1]) if head is embedding else 1.0)
        self.init_rope()

    def init_rope(self) -> None:
        """Computes the rotary tables, which no checkpoint holds.

        Between to_empty and load_state_dict this is enough; no weight need be drawn.
        """
        head_dim = 2 * self.rope_cos.shape[1]
        tables = rope_tables(self.max_seq_len, head_dim, self.rope_theta)
        for buffer, table in zip((self.rope_cos, self.rope_sin), tables, strict=True):
            buffer.copy_(table)

    def _apply(self, fn, recurse=True):
        """Behind to(), to_empty() and their like: what was tied stays so. Leaving the meta device,
        torch makes a new parameter in place of each name."""
        tied = self.lm_head.weight is self.token_embeddings.weight
        super()._apply(fn, recurse)
        if tied:
            self.lm_head.weight = self.token_embeddings.weight
        return self

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """tokens: (B, T) ids, after the positions in `cache`; returns logits: (B, T, V)."""
        return self.lm_head(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the output head takes, for linear_cross_entropy_loss: (B, T) ids to (B, T, D)."""
        begin = 0 if cache is None else cache.length
        end = begin + tokens.shape[-1]
        if end > self.max_seq_len:
            raise ValueError(f"{end} positions: this model was built for {self.max_seq_len}")
        # In fp32 also in a model of another dtype.
        cos, sin = self.rope_cos[begin:end].float(), self.rope_sin[begin:end].float()
        ends = self.document_end
        mask = document_mask(tokens, ends) if ends is not None and cache is None else None
        x = self.drop(self.token_embeddings(tokens))
        for index, layer in enumerate(self.layers):
            if cache is not None:
                x = layer(x, cos, sin, partial(cache.extend, index, max_seq_len=self.max_seq_len))
            elif self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, None, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, None, mask)
        if cache is not None:
            cache.length = end
        return self.ln_final(x)


def document_mask(tokens: Tensor, document_end: int) -> Tensor:  # (B, T) ids
    """Which keys a query sees: (B, 1, T, T) bool, those of its own document up to itself.

    The token that ends a document belongs to it.
    """
    ends = (tokens == document_end).long()
    document = ends.cumsum(-1) - ends
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    return same.tril().unsqueeze(-3)


@torch.no_grad()
def _draw_normal(parameter: Tensor, std: float) -> None:
    """Normal numbers of torch's CPU generator, the same on every device and however sharded."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu").normal_(std=std)
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        # None: every rank cuts its shard out of its own draw; nothing is sent.
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


def check_heads(d_model: int, num_heads: int) -> None:
    """Raises ValueError if the heads' width is not whole and even (RoPE rotates pairs)."""
    if num_heads < 1 or d_model % num_heads:
        raise ValueError(f"d_model={d_model} is not divisible by num_heads={num_heads}")
    if d_model // num_heads % 2:
        raise ValueError(
            f"d_model={d_model} over num_heads={num_heads} gives heads of {d_model // num_heads}; "
            f"RoPE rotates pairs and needs an even width"
        )


def default_d_ff(d_model: int) -> int:
    """8/3 * d_model, rounded up to a multiple of 64."""
    return -(-int(8 / 3 * d_model) // 64) * 64


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_flops_per_token(model: nn.Module, context_len: int) -> int:
    """FLOPs of forward and backward per token: 6 * matmul weights + 6 * layers * T * D.

    Two per weight and token forward, twice that backward; the second term is causal attention,
    4 * T * D a layer and token forward, halved by the mask. The embedding lookup is no matmul; the
    output head is, tied or not. (Kaplan et al., arXiv:2001.08361, Table 1, with the causal half.)

    Of another model than TransformerLM: 6 * the parameters that are not only looked up in an
    nn.Embedding. Its attention is not known and left out, so the model FLOPs and the MFU are low.
    """
    if isinstance(model, TransformerLM):
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 6 * len(model.layers) * context_len * model.lm_head.in_features
    modules = list(model.modules())
    looked_up = {m.weight for m in modules if isinstance(m, nn.Embedding)}
    looked_up -= {m.weight for m in modules if isinstance(m, nn.Linear)}  # tied
    return 6 * sum(p.numel() for p in model.parameters() if p not in looked_up)


def flop_formula(model: nn.Module) -> str:
    """What training_flops_per_token has counted, in words."""
    if isinstance(model, TransformerLM):
        return "6 * matmul weights + 6 * layers * context_len * d_model"
    return "6 * parameters outside embeddings; attention not counted"
