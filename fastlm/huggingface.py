"""Model directories of Hugging Face's transformers: what of them is a TransformerLM, both ways.

    config.json                      the architecture
    model.safetensors                the weights; or several files and model.safetensors.index.json
    tokenizer.json                   the tokenizer, if any

model_type llama (with SmolLM2), mistral, qwen2 (with 2.5) and qwen3. transformers rotates the
halves (i, i + d/2) of a head and TransformerLM its pairs (2i, 2i + 1): rows change places.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlm.data.manifest import is_base_name
from fastlm.errors import CheckpointError, shown
from fastlm.foreign_state import first_line, shape_of, shortened
from fastlm.model import TransformerLM
from fastlm.model_config import ModelConfig

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_SIZES = {  # theirs -> (ModelConfig's, what it lies below)
    "vocab_size": ("vocab_size", 1 << 31),
    "hidden_size": ("d_model", 1 << 24),
    "num_attention_heads": ("num_heads", 1 << 24),
    "num_hidden_layers": ("num_layers", 1 << 14),
    "max_position_embeddings": ("max_seq_len", 1 << 31),
    "intermediate_size": ("d_ff", 1 << 24),
    "num_key_value_heads": ("num_kv_heads", 1 << 24),
    "head_dim": ("head_dim", 1 << 24),
}
_WHERE_MISSING = {  # transformers' defaults where they are no function of other sizes
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_PARTS = {  # TransformerLM's names of layers -> theirs
    "token_embeddings": "model.embed_tokens",
    "ln_final": "model.norm",
    "lm_head": "lm_head",
    "ln1": "input_layernorm",
    "ln2": "post_attention_layernorm",
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    "ffn.w1": "mlp.gate_proj",
    "ffn.w2": "mlp.down_proj",
    "ffn.w3": "mlp.up_proj",
}
_ROTATED = re.compile(r"attn\.([qk])_(proj|norm)\.")
_UNIT_EPS = 1e-6  # of qk_norm without weights
_MAX_BYTES = 64 << 20  # of a JSON file


def is_model_directory(path: str | os.PathLike) -> bool:
    """Is it a directory with a config.json?"""
    return os.path.isdir(path) and os.path.isfile(os.path.join(path, CONFIG))


def read_settings(directory: str | os.PathLike) -> tuple[ModelConfig, dict[str, Any]]:
    """The architecture, and config.json's own content.

    Raises CheckpointError, naming it, for what a TransformerLM does not have.
    """
    path = Path(directory) / CONFIG
    config = read_json(path)

    def refuse(name: str, reason: str) -> None:
        raise CheckpointError(f"{path}: {name}={shown(config.get(name))}: {reason}")

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _ARCHITECTURES:
        refuse("model_type", f"no TransformerLM; supported are {', '.join(_ARCHITECTURES)}")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        refuse("hidden_act", "the feed-forward layer is SwiGLU, with silu")
    for name in ("attention_bias", "mlp_bias"):
        # Of qwen2 the biases are those that it always has, and are no setting.
        if kind != "qwen2" and config.get(name):
            refuse(name, "of the biases only qwen2's, of queries, keys and values, are supported")
    if config.get("quantization_config") is not None:
        refuse("quantization_config", "quantized weights are not supported; dequantize them first")
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(
        kind in ("full_attention", "sliding_attention") for kind in layer_types
    ):
        refuse("layer_types", "supported are full_attention and sliding_attention")
    for name in ("sliding_window", "max_window_layers"):
        if type(config.get(name, 1)) not in (int, type(None)):
            refuse(name, "it must be an integer")
    theta, scaling = _rope(path, config)
    values: dict[str, Any] = {}
    for name, (own, limit) in _SIZES.items():
        value = config.get(name, _WHERE_MISSING[kind].get(name))
        if value is None and own in ("num_kv_heads", "head_dim"):
            continue  # ModelConfig fills it in, as transformers does
        if type(value) is not int or not 0 < value < limit:
            refuse(name, f"it must be an integer from 1 to {limit - 1}")
        values[own] = value
    try:
        architecture = ModelConfig(
            **values,
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=_number(path, config, "rms_norm_eps", 1e-6),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            qk_norm_weight=kind == "qwen3",
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path}: {error}") from error
    return architecture, config


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """How many keys a query of config.json's model sees, if not all."""
    kind = config.get("model_type")
    if kind == "mistral":
        return config.get("sliding_window", 4096)
    if kind not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return None
    layers, first = config["num_hidden_layers"], config.get("max_window_layers", 28)
    types = config.get("layer_types") or ["sliding_attention"] * (layers > first)
    return config.get("sliding_window", 4096) if "sliding_attention" in types else None


def _rope(path: Path, config: Mapping[str, Any]) -> tuple[float, tuple | None]:
    """(theta, Llama 3's scaling or None), as transformers 4 or 5 has written them."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise CheckpointError(f"{path}: rope_parameters={shown(rope)}: it must be an object")
    outer = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    merged = {name: value for name, value in outer.items() if value is not None} | dict(rope)
    theta = _number(path, merged, "rope_theta", 10000.0)
    if (part := merged.get("partial_rotary_factor", 1.0)) != 1.0:
        raise CheckpointError(
            f"{path}: partial_rotary_factor={shown(part)}: RoPE rotates whole heads here"
        )
    kind = merged.get("rope_type", merged.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise CheckpointError(
            f"{path}: rope_type={shown(kind)}: no such scaling here; supported are default, llama3"
        )
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    factor, low, high, before = (_number(path, merged, name) for name in names)
    return theta, (factor, low, high, int(before))


def _number(
    path: Path, config: Mapping[str, Any], name: str, default: float | None = None
) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value < 1e12:
        raise CheckpointError(f"{path}: {name}={shown(value)}: it must be a positive number")
    return float(value)


def read_model_directory(directory: str | os.PathLike) -> dict[str, Any]:
    """The directory as a checkpoint's content: model_state, config, tokenizer, and config.json.

    The tensors are mapped from the files, but for those whose rows change places.
    Raises CheckpointError for what cannot be read, and for weights that are missing or have no
    place in the architecture.
    """
    directory = Path(directory)
    config, content = read_settings(directory)
    with torch.device("meta"):
        expected = TransformerLM.from_config(config).state_dict()
    found = _read_weights(directory)
    tied = config.tie_embeddings and "lm_head.weight" not in found
    state = {}
    for name, tensor in expected.items():
        source = name_of("token_embeddings.weight" if tied and name.startswith("lm_") else name)
        if shape_of(found.get(source)) != shape_of(tensor):
            raise CheckpointError(
                f"{directory}: {source} is {shape_of(found.get(source))}, and {CONFIG} wants "
                f"{shape_of(tensor)}"
            )
        state[name] = from_theirs(name, found[source], config)
    left = found.keys() - {name_of(name) for name in expected}
    left = {name for name in left if not name.endswith("rotary_emb.inv_freq")}  # a constant
    if left:
        raise CheckpointError(
            f"{directory}: {shortened(min(left), quoted=False)} has no place in a TransformerLM of "
            f"model_type {content['model_type']}"
        )
    return {
        "model_state": state,
        "config": config.settings(),
        "tokenizer": _read_tokenizer(directory / TOKENIZER),
        "huggingface_config": content,
    }


def name_of(name: str) -> str:
    """Their name of a TransformerLM's weight."""
    part, kind = name.rsplit(".", 1)
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", part):
        return f"model.layers.{match[1]}.{_PARTS[match[2]]}.{kind}"
    return f"{_PARTS[part]}.{kind}"


def from_theirs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Their weight as the TransformerLM's of this name: of rotated heads, halves become pairs."""
    heads = _rotated_heads(name, config)
    return tensor if not heads else _swapped(tensor, (heads, 2, config.head_dim // 2))


def to_theirs(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The way back."""
    heads = _rotated_heads(name, config)
    return tensor if not heads else _swapped(tensor, (heads, config.head_dim // 2, 2))


def _rotated_heads(name: str, config: ModelConfig) -> int:
    """How many heads the rows of a weight belong to that meets the rotation; 0 for others."""
    match = _ROTATED.search(name)
    if match is None:
        return 0
    if match[2] == "norm":
        return 1
    return config.num_heads if match[1] == "q" else config.num_kv_heads


def _swapped(tensor: Tensor, sizes: tuple[int, int, int]) -> Tensor:
    return tensor.unflatten(0, sizes).transpose(1, 2).flatten(0, 2)


def config_json(
    config: ModelConfig, *, dtype: torch.dtype, ends: Mapping[str, Any]
) -> dict[str, Any]:
    """config.json for a TransformerLM of this architecture; ends: its bos_token_id and
    eos_token_id. Raises CheckpointError, naming what no model of transformers has."""
    for name in ("value_residual", "embedding_residual"):
        if getattr(config, name):
            raise CheckpointError(
                f"{name}=True: no model of transformers has it; train with "
                f"--no-{name.replace('_', '-')} what is to be exported"
            )
    if config.qkv_bias and config.qk_norm:
        raise CheckpointError("qkv_bias with qk_norm: no model of transformers has both")
    kind = "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama"
    if kind == "llama" and config.d_model % config.num_heads:
        kind = "mistral"  # the same function; it does not derive the heads' width from d_model
    content: dict[str, Any] = {"architectures": [_ARCHITECTURES[kind]], "model_type": kind}
    content |= {name: getattr(config, own) for name, (own, _) in _SIZES.items()}
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling is not None:
        factor, low, high, before = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": before,
        }
    dtype_name = str(dtype).removeprefix("torch.")
    content |= {
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **ends,
        # As transformers 5 reads it, and as 4 and other programs do.
        "rope_parameters": {**rope, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else rope,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }
    if kind == "llama":
        content["mlp_bias"] = False
    else:
        content["sliding_window"] = None
    if kind.startswith("qwen"):
        content["use_sliding_window"] = False
    return content


def exported_state(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A TransformerLM's state dict under their names; a tied head is left out."""
    result = {}
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        tensor = to_theirs(name, tensor, config)
        if config.qk_norm and not config.qk_norm_weight and _ROTATED.search(name):
            # Their norm has weights, which become 1, and norm_eps in place of the smaller epsilon:
            # q / sqrt(mean(q^2) + eps) is theirs for a longer q.
            tensor = tensor * (config.norm_eps / _UNIT_EPS) ** 0.5
            norm = name_of(name.replace("_proj", "_norm"))
            result[norm] = torch.ones(config.head_dim, dtype=tensor.dtype)
        result[name_of(name)] = tensor
    return result


def _read_weights(directory: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    if (directory / INDEX).is_file():
        files = read_json(directory / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(map(is_base_name, files.values())):
            raise CheckpointError(f"{directory / INDEX}: its weight_map names no files beside it")
        names = sorted(set(files.values()))
    elif (directory / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        pickled = " (*.bin files are pickled and not read)" * bool([*directory.glob("*.bin")])
        raise CheckpointError(f"{directory}: has neither {WEIGHTS} nor {INDEX}{pickled}")
    tensors = {}
    for name in names:
        try:
            with safe_open(directory / name, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        except Exception as error:  # the library's own, OSError, …
            reason = getattr(error, "strerror", None) or first_line(error)
            raise CheckpointError(f"{directory / name}: cannot be read ({reason})") from error
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def _read_tokenizer(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
