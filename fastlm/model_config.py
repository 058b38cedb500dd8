"""ModelConfig: the architecture of a TransformerLM, as an object."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a TransformerLM: by default CS336's, with other values the Llama family.

    The order is that of TransformerLM's arguments. What is None is filled in.
    Raises ValueError, naming the field, for what cannot be built.
    """

    vocab_size: int
    d_model: int
    num_heads: int
    num_layers: int
    max_seq_len: int
    d_ff: int | None = None
    """Width of the feed-forward layer. Default: 8/3 of d_model, rounded up to a multiple of 64."""
    rope_theta: float = 10000.0
    num_kv_heads: int | None = None
    """Heads of keys and values, each for num_heads / num_kv_heads heads of queries
    (arXiv:2305.13245). Default: num_heads."""
    head_dim: int | None = None
    """Width of a head, even. Default: d_model / num_heads."""
    rope_scaling: tuple[float, float, float, int] | None = None
    """Llama 3's stretching of slow rotations: factor, low_freq_factor, high_freq_factor, and the
    max_seq_len before it."""
    norm_eps: float = 1e-5
    """Epsilon of RMSNorm."""
    qkv_bias: bool = False
    """Biases of the projections to queries, keys and values, as in Qwen 2."""
    qk_norm: bool = False
    """Queries and keys of unit root mean square (arXiv:2010.04245), which high learning rates
    want."""
    qk_norm_weight: bool = False
    """With qk_norm: RMSNorms with a weight for each place in a head, as in Qwen 3."""
    tie_embeddings: bool = False
    dropout: float = 0.0
    """Of the embedding, the attention weights and both residual branches, in training mode only."""
    activation_checkpointing: bool = False
    """Recompute each block in backward instead of keeping its activations."""
    value_residual: bool = False
    """Behind the first block, values are mixed with the first block's, by two trained weights in
    each block (arXiv:2410.17897)."""
    embedding_residual: bool = False
    """Behind the first block, what enters a block is mixed with the token's embedding, by two
    trained weights in each block."""

    def __post_init__(self):
        if self.head_dim is None:
            check_heads(self.d_model, self.num_heads)
        self._fill("d_ff", default_d_ff(self.d_model))
        self._fill("head_dim", self.d_model // max(self.num_heads, 1))
        self._fill("num_kv_heads", self.num_heads)
        if self.rope_scaling is not None:
            object.__setattr__(self, "rope_scaling", tuple(self.rope_scaling))
        self._check()

    def _fill(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: RoPE rotates pairs and needs an even width"
            )
        if self.num_kv_heads < 1 or self.num_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}"
            )
        if self.qk_norm_weight and not self.qk_norm:
            raise ValueError("qk_norm_weight=True: it needs qk_norm=True, whose weights these are")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps}: it must be positive")
        if self.rope_scaling is not None:
            factor, low, high, before = self.rope_scaling
            if not (1 <= factor < 1e9 and 0 < low < high < 1e9 and 0 < before < 1 << 31):
                raise ValueError(
                    f"rope_scaling={self.rope_scaling}: it must be (factor >= 1, low_freq_factor, "
                    f"a larger high_freq_factor, a length)"
                )

    @classmethod
    def of_settings(cls, settings: Mapping[str, Any]) -> "ModelConfig":
        """Of a TrainingConfig's settings by name; those that are missing have their defaults."""
        names = {f.name: _SETTING.get(f.name, f.name) for f in fields(cls)}
        return cls(**{own: settings[name] for own, name in names.items() if name in settings})

    def settings(self) -> dict[str, Any]:
        """TrainingConfig's settings that describe it: TrainingConfig(**config.settings(), ...)."""
        return {_SETTING.get(name, name): value for name, value in vars(self).items()}


_SETTING = {"max_seq_len": "context_len"}  # TrainingConfig's names, where they are others


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
