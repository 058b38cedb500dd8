"""TransformerLM: a pre-norm decoder with RMSNorm, RoPE and SwiGLU.

Parameter names and mathematics are those of the CS336 assignment-1 model, so its state dicts load;
ModelConfig's further fields make it a model of the Llama family (model_config.py).
Shapes: B batch, T positions, D model width, H heads, H_kv heads of keys and values, d head width,
F feed-forward width, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlm.kernels.collect import is_dtensor
from fastlm.model_config import ModelConfig
from fastlm.ops.causal_attention import causal_attention, of_query_heads
from fastlm.ops.dispatch import compute_dtype, on_gpu
from fastlm.ops.rope import Rope, rope_tables, rotate_heads, rotate_joint
from fastlm.ops.swiglu import swiglu


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


def _unit_rms(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-6) over the last dimension, in fp32; x: (..., d)."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)


def _mix(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """weights[0] * x + weights[1] * y, in fp32; x, y: of one shape and dtype."""
    return (weights[0] * x.float() + weights[1] * y.float()).to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far: (B, H_kv, capacity, d) each.

    capacity: the most positions it will hold, for which its memory is taken at once. Default: the
    model's max_seq_len. The model raises ValueError for tokens beyond it.
    """

    def __init__(self, capacity: int | None = None):
        self.capacity = capacity
        self.length = 0  # positions filled in every layer
        self.tokens: Tensor | None = None  # (B, length) ids, of a model with document_end
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor]:
        """Appends k, v: (B, H_kv, T, d); returns all positions': (B, H_kv, length + T, d)."""
        if layer not in self._layers:
            capacity = max_seq_len if self.capacity is None else min(self.capacity, max_seq_len)
            shape = (*k.shape[:-2], capacity, k.shape[-1])
            self._layers[layer] = (k.new_empty(shape), v.new_empty(shape))
        end = self.length + k.shape[-2]
        filled = []
        for stored, new in zip(self._layers[layer], (k, v), strict=True):
            stored[..., self.length : end, :] = new
            filled.append(stored[..., :end, :])
        return filled[0], filled[1]


def _joint_product(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """The layers' outputs for x: (..., D), end to end, by one matmul. Their weights are joined at
    each call, so that parameters and their state stay as they are."""
    dtype = compute_dtype(x)  # cast before they are joined: compiled, that is one pass
    weight = torch.cat([layer.weight.to(dtype) for layer in layers])
    bias = None
    if layers[0].bias is not None:
        bias = torch.cat([layer.bias.to(dtype) for layer in layers])
    return F.linear(x, weight, bias)


def _products(x: Tensor, layers: Sequence[nn.Linear], joint: bool) -> Sequence[Tensor]:
    """Each layer's output for x: (..., D)."""
    if not joint:
        return [layer(x) for layer in layers]
    return _joint_product(x, layers).split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions.

    By causal_attention; with dropout of the attention weights, in training, by PyTorch's SDPA.
    """

    joint = False  # in training, one matmul for queries, keys and values

    def __init__(self, config: ModelConfig, *, is_first: bool = True):
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.num_kv_heads = config.num_kv_heads
        self.dropout, self.qk_norm = config.dropout, config.qk_norm
        width, kv_width = (n * self.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = nn.Linear(config.d_model, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.qkv_bias)
        self.output_proj = nn.Linear(width, config.d_model, bias=False)
        if config.qk_norm_weight:
            self.q_norm = RMSNorm(self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.norm_eps)
        else:
            self.q_norm = self.k_norm = _unit_rms
        self.gives_values = config.value_residual and is_first
        mixes = config.value_residual and not is_first
        self.value_mix = nn.Parameter(torch.empty(2)) if mixes else None

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        cos: Tensor,  # (T, d/2) fp32, or one for each sequence: (B, 1, T, d/2)
        sin: Tensor,  # as cos
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        mask: Tensor | None = None,  # (B, 1, T, keys), added to the scores: of document_mask
        first_values: Tensor | None = None,  # (B, H_kv, T, d), of value_residual
    ) -> Tensor | tuple[Tensor, Tensor]:  # (B, T, D); with first_values if gives_values
        dropout_p = self.dropout if self.training else 0.0

        def heads(y: Tensor) -> Tensor:  # (B, T, H * d) -> (B, H, T, d), or H_kv in place of H
            return y.unflatten(-1, (-1, self.head_dim)).transpose(-2, -3)

        layers = (self.q_proj, self.k_proj, self.v_proj)
        joint = self.joint and self.training  # a token of generation would join all weights for it
        plain = cache is None and mask is None and cos.dim() == 2
        rope: Rope | None = (cos, sin)
        if joint and not self.qk_norm and cos.dim() == 2 and on_gpu(x):
            numbers = self.num_heads, self.num_kv_heads
            turned = rotate_joint(_joint_product(x, layers), cos, sin, numbers)
            (q, k, v), rope = (y.transpose(-2, -3) for y in turned), None
        else:
            q, k, v = map(heads, _products(x, layers, joint))
        own, v = v, self._mixed(v, first_values)
        if self.qk_norm:  # before the rotation, which changes no length
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None and not plain:
            (q, k), rope = rotate_heads(q, k, cos, sin), None
        if cache is not None:
            k, v = cache(k, v)
        if mask is None:
            y = causal_attention(q, k, v, rope=rope, dropout_p=dropout_p)
        else:
            k, v, grouped = of_query_heads(q, k, v, masked=True)
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, **grouped)
        y = self.output_proj(y.transpose(-3, -2).flatten(-2))
        return (y, own) if self.gives_values else y

    def _mixed(self, values: Tensor, first_values: Tensor | None) -> Tensor:
        return values if self.value_mix is None else _mix(self.value_mix, values, first_values)


class SwiGLU(nn.Module):
    """w2(silu(w1 x) * w3 x) (arXiv:2002.05202)."""

    joint = False  # in training, one matmul for w1 and w3

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.w1 = nn.Linear(d_model, d_ff, bias=False)
        self.w2 = nn.Linear(d_ff, d_model, bias=False)
        self.w3 = nn.Linear(d_model, d_ff, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.w1, self.w3)
        joint = self.joint and self.training
        if joint and on_gpu(x):
            return self.w2(swiglu(_joint_product(x, layers)))
        gate, value = _products(x, layers, joint)
        return self.w2(F.silu(gate) * value)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, is_first: bool = True):
        super().__init__()
        mixes = config.embedding_residual and not is_first
        self.embedding_mix = nn.Parameter(torch.empty(2)) if mixes else None
        self.ln1 = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, is_first=is_first)
        self.ln2 = RMSNorm(config.d_model, config.norm_eps)
        self.ffn = SwiGLU(config.d_model, config.d_ff)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cache=None, mask=None, values=None, embedded=None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """As Attention's; embedded: (B, T, D), what entered the first block."""
        if self.embedding_mix is not None:
            x = _mix(self.embedding_mix, x, embedded)
        y = self.attn(self.ln1(x), cos, sin, cache, mask, values)
        y, *given = y if isinstance(y, tuple) else (y,)
        x = x + self.drop(y)
        x = x + self.drop(self.ffn(self.ln2(x)))
        return (x, *given) if given else x


class TransformerLM(nn.Module):
    """Token ids (B, T) to logits (B, T, V).

    options: ModelConfig's further fields, as tie_embeddings, dropout, num_kv_heads or qk_norm;
    from_config takes all of them as an object, and `config` is that object.
    Raises ValueError if d_model is not divisible by num_heads or the head is of odd width.
    """

    if TYPE_CHECKING:  # to type checkers a module's own returns Any

        def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor: ...

    # Under autocast the residual stream has the matmuls' dtype, too. Else it is float32.
    residual_follows_autocast = False

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        num_heads: int,
        num_layers: int,
        max_seq_len: int,
        d_ff: int | None = None,
        rope_theta: float = 10000.0,
        **options: Any,
    ):
        super().__init__()
        config = self.config = ModelConfig(
            vocab_size, d_model, num_heads, num_layers, max_seq_len, d_ff, rope_theta, **options
        )
        self.max_seq_len = max_seq_len
        self.activation_checkpointing = config.activation_checkpointing
        # The token that ends a document: set, no query sees the documents before its own.
        self.document_end: int | None = None
        device = torch.get_default_device()
        with torch.device("meta"):  # layers draw weights of their own, which would be in vain
            self.token_embeddings = nn.Embedding(vocab_size, d_model)
            self.drop = nn.Dropout(config.dropout)
            self.layers = nn.ModuleList(Block(config, is_first=i == 0) for i in range(num_layers))
            self.ln_final = RMSNorm(d_model, config.norm_eps)
            self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
            table = torch.empty(max_seq_len, config.head_dim // 2, dtype=torch.float32)
            self.register_buffer("rope_cos", table, persistent=False)
            self.register_buffer("rope_sin", torch.empty_like(table), persistent=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embeddings.weight
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights()

    @classmethod
    def from_config(cls, config: ModelConfig) -> "TransformerLM":
        """A new model of this architecture, its weights drawn as the constructor draws them."""
        return cls(**vars(config))

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
            elif isinstance(module, Attention) and module.value_mix is not None:
                _assign(module.value_mix, torch.tensor([0.5, 0.5], device="cpu"))
            elif isinstance(module, Block) and module.embedding_mix is not None:
                _assign(module.embedding_mix, torch.tensor([1.0, 0.0], device="cpu"))
            elif isinstance(module, nn.Linear) and module.weight is not embedding:
                std = math.sqrt(2 / sum(module.weight.shape))
                if name.endswith(("output_proj", "w2")):
                    std /= math.sqrt(2 * len(self.layers))
                _draw_normal(module.weight, std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _draw_normal(embedding, 1 / math.sqrt(embedding.shape[1]) if head is embedding else 1.0)
        self.init_rope()

    def init_rope(self) -> None:
        """Computes the rotary tables, which no checkpoint holds.

        Between to_empty and load_state_dict this is enough; no weight need be drawn.
        """
        config = self.config
        tables = rope_tables(
            self.max_seq_len, config.head_dim, config.rope_theta, config.rope_scaling
        )
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
        if cache is not None and cache.capacity is not None and end > cache.capacity:
            raise ValueError(f"{end} positions: this cache was made for {cache.capacity}")
        # In fp32 also in a model of another dtype.
        cos, sin = self.rope_cos[begin:end].float(), self.rope_sin[begin:end].float()
        x = self.token_embeddings(tokens)
        mask = None
        if self.document_end is not None:
            keys = tokens
            if cache is not None:
                seen = tokens[:, :0] if cache.tokens is None else cache.tokens[:, :begin]
                cache.tokens = keys = torch.cat((seen, tokens), dim=-1)
            mask = document_mask(keys, self.document_end, compute_dtype(x), begin)
        x = self.drop(x.to(compute_dtype(x)) if self.residual_follows_autocast else x)
        embedded, values = x if self.config.embedding_residual else None, None
        for index, layer in enumerate(self.layers):
            extend = None
            if cache is not None:
                extend = partial(cache.extend, index, max_seq_len=self.max_seq_len)
            arguments = (x, cos, sin, extend, mask, values, embedded)
            if cache is None and self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
            x, values = x if isinstance(x, tuple) else (x, values)
        if cache is not None:
            cache.length = end
        return self.ln_final(x)


def document_mask(
    tokens: Tensor, document_end: int, dtype: torch.dtype, first_query: int = 0
) -> Tensor:
    """(B, T) ids -> (B, 1, T - first_query, T), to be added to the scores: 0 where a query sees a
    key, those of its own document up to itself, and -inf elsewhere.

    The token that ends a document belongs to it. Of a bool mask PyTorch would make such a one in
    each layer, and keep it for backward.
    """
    ends = (tokens == document_end).long()
    document = ends.cumsum(-1) - ends
    same = document[..., first_query:].unsqueeze(-1) == document.unsqueeze(-2)
    hidden = same.tril(first_query).logical_not_().unsqueeze(-3)
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def _draw_normal(parameter: Tensor, std: float) -> None:
    """Normal numbers of torch's CPU generator, the same on every device and however sharded."""
    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    _assign(parameter, empty.normal_(std=std))


@torch.no_grad()
def _assign(parameter: Tensor, values: Tensor) -> None:
    """values: all of the parameter's, on the CPU, however it is sharded."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        # None: every rank cuts its shard out of its own draw; nothing is sent.
        values = distribute_tensor(
            values, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(values)


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters; shared ones count once."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def training_flops_per_token(model: nn.Module, context_len: int) -> int:
    """FLOPs of forward and backward per token: 6 * matmul weights + 6 * layers * T * H * d.

    Two per weight and token forward, twice that backward; the second term is causal attention,
    4 * T * H * d a layer and token forward, halved by the mask. The embedding lookup is no matmul;
    the output head is, tied or not. (Kaplan et al., arXiv:2001.08361, Table 1, with the causal
    half.)

    Of another model than TransformerLM: 6 * the parameters that are not only looked up in an
    nn.Embedding. Its attention is not known and left out, so the model FLOPs and the MFU are low.
    """
    if isinstance(model, TransformerLM):
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        width = model.config.num_heads * model.config.head_dim
        return 6 * weights + 6 * len(model.layers) * context_len * width
    modules = list(model.modules())
    looked_up = {m.weight for m in modules if isinstance(m, nn.Embedding)}
    looked_up -= {m.weight for m in modules if isinstance(m, nn.Linear)}  # tied
    return 6 * sum(p.numel() for p in model.parameters() if p not in looked_up)


def flop_formula(model: nn.Module) -> str:
    """What training_flops_per_token has counted, in words."""
    if isinstance(model, TransformerLM):
        return "6 * matmul weights + 6 * layers * context_len * num_heads * head_dim"
    return "6 * parameters outside embeddings; attention not counted"
