"""What the trainer asks of a model: TransformerLM, or any nn.Module of the caller's own.

forward: (B, T) token ids to (B, T, V) logits, V at least the vocabulary. All else is optional:

    hidden(x), lm_head   (B, T) ids to (B, T, D), and an nn.Linear (D to V): head and loss are then
                         computed in one, without the memory for the logits
    max_seq_len          the longest window it takes
    an nn.ModuleList     its layers: compiled one by one by compile_scope "block", and sharded so
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlm.checkpoint import unwrap
from fastlm.config import TrainingConfig
from fastlm.errors import CheckpointError, ConfigError, shown
from fastlm.evaluate import evaluating
from fastlm.foreign_state import first_line
from fastlm.hardware import autocast, is_out_of_memory, select_device, select_dtype
from fastlm.model import TransformerLM
from fastlm.model_config import ModelConfig

# Settings of TransformerLM that a caller would miss in a model of his own.
_OF_OUR_MODEL = (
    "num_kv_heads", "head_dim", "rope_scaling", "norm_eps", "qkv_bias", "qk_norm", "qk_norm_weight",
    "value_residual", "embedding_residual", "tie_embeddings", "dropout", "activation_checkpointing",
    "joint_projections", "residual_dtype",
)  # fmt: skip


def prepare_model(model: nn.Module, cfg: TrainingConfig) -> nn.Module:
    """Checks a caller's model against `cfg`; returns it on cfg.device and in training mode.

    Two windows of cfg.context_len tokens run through it, without gradients; it draws no random
    number and changes no weight. A model handed over in eval mode is put into training mode; parts
    of a model in training mode that are in eval mode stay so. The settings of the model's size do
    not count, except for a TransformerLM, which they must describe: its checkpoints are loaded by
    them. Raises ConfigError, in one line, for a model that cannot be trained under `cfg`.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model={shown(model)}: it must be a torch.nn.Module")
    if unwrap(model) is not model:
        raise ConfigError(
            f"model is wrapped ({type(model).__name__}): hand over the module inside; the run "
            f"compiles it (compile=True) and distributes it itself"
        )
    if model_class(model) is None:
        _check_settings(model, cfg)
    else:
        for name in _OF_OUR_MODEL:
            if getattr(cfg, name) != getattr(TrainingConfig, name):
                raise ConfigError(
                    f"{name}={getattr(cfg, name)}: it is a setting of TransformerLM and does "
                    f"nothing for a model of your own; set it there, and leave it out here"
                )
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "model has no parameter that requires a gradient: nothing would be trained"
        )
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ConfigError(
            "model is on the meta device and has no weights: call to_empty() and initialise them"
        )
    device = select_device(cfg.device)
    model.to(device)
    _check_forward(model, cfg, device)
    if not model.training:
        print("[run] the model came in eval mode and trains in training mode, dropout and all")
        model.train()
    return model


def has_fused_head(model: nn.Module) -> bool:
    """Has it a method hidden() and an nn.Linear lm_head? (A layer called hidden is none.)"""
    method = getattr(type(model), "hidden", None)
    return callable(method) and isinstance(getattr(model, "lm_head", None), nn.Linear)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Its layers: what its outermost nn.ModuleLists hold; [] without one."""
    in_list = isinstance(model, nn.ModuleList)
    blocks = []
    for child in model.children():
        is_block = in_list and not isinstance(child, nn.ModuleList)
        blocks += [child] if is_block else blocks_of(child)
    return blocks


def embedding_tables(model: nn.Module) -> list[nn.Parameter]:
    """The weights of its nn.Embedding that are trained, each once."""
    weights = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return [p for p in weights.values() if p.requires_grad]


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices inside its layers (blocks_of) that are trained, embeddings left out."""
    tables = {id(p) for p in embedding_tables(model)}
    inside = {id(p): p for block in blocks_of(model) for p in block.parameters()}
    return [p for p in inside.values() if p.ndim == 2 and p.requires_grad and id(p) not in tables]


def compile_blocks(model: nn.Module, mode: str | None = None) -> None:
    """Compiles each of the model's blocks in place, in torch.compile's `mode`: names in its state
    dict do not change.

    Blocks of one kind share their graphs, so compiling takes as long for 48 as for 2. Call it
    before the blocks are sharded. Raises ConfigError for a model without an nn.ModuleList.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError(
            f"compile_scope='block': {type(model).__name__} has no nn.ModuleList whose entries "
            f"could be compiled one by one; use compile_scope='model'"
        )
    compiled = torch.compile(_call, dynamic=False, mode=mode)
    for block in blocks:
        if type(block).__module__.startswith("torch."):  # whose code is compiled from outside alone
            block._compiled_call_impl = partial(compiled, block)
        else:
            block.compile(dynamic=False, mode=mode)


def _call(block: nn.Module, *args: Any, **options: Any) -> Any:
    return block._call_impl(*args, **options)


def describe_model(model: nn.Module) -> str:
    """Its kind and sizes, for the run's first lines."""
    if model_class(model) is not None:
        head = "head and loss in one" if has_fused_head(model) else "loss over its logits"
        return f"{model_class(model)}, {head}"
    c = model.config
    shared = f" ({c.num_kv_heads} of keys)" if c.num_kv_heads != c.num_heads else ""
    return (
        f"{c.num_layers} layers, d_model {c.d_model}, {c.num_heads} heads{shared}, "
        f"vocabulary {c.vocab_size}"
    )


def model_class(model: nn.Module) -> str | None:
    """The class of a caller's own model, as module.Class: the checkpoint's key of this name. None
    for TransformerLM itself, whose checkpoints have no such key."""
    # FSDP2 puts a class of its own above the model's. Where it is not loaded, it has not.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    cls = next(c for c in type(model).__mro__ if not issubclass(c, fsdp))
    return None if cls is TransformerLM else f"{cls.__module__}.{cls.__qualname__}"


def check_model_class(payload: dict[str, Any], path: Any, model: nn.Module | None = None) -> None:
    """Raises CheckpointError if a checkpoint of a caller's own model is to be loaded into a
    TransformerLM (model None: that its settings describe)."""
    stored = payload.get("model_class")
    if stored is not None and (model is None or model_class(model) is None):
        raise CheckpointError(
            f"{path}: holds the weights of {shown(stored)}, no TransformerLM; give that model: "
            f"train_loop(…, model=…), or fastlm.load_checkpoint(model, None, path)"
        )


def _check_settings(model: TransformerLM, cfg: TrainingConfig) -> None:
    is_tied = model.lm_head.weight is model.token_embeddings.weight  # its owner may have changed it
    described = replace(model.config, tie_embeddings=is_tied).settings()
    asked = ModelConfig.of_settings(vars(cfg)).settings()
    for name, value in described.items():
        if asked[name] != value:
            raise ConfigError(f"{name}={asked[name]}: the model handed over has {value}")


def _check_forward(model: nn.Module, cfg: TrainingConfig, device: torch.device) -> None:
    B, T, V = 2, cfg.context_len, cfg.vocab_size
    longest = getattr(model, "max_seq_len", None)
    if isinstance(longest, int) and longest < T:
        raise ConfigError(
            f"model takes {longest} positions (max_seq_len) and context_len={T}: lower context_len"
        )
    x = torch.full((B, T), V - 1, device=device)
    dtype = select_dtype(cfg.dtype, device)
    with _embeddings_checked(model, V, T), evaluating(model), autocast(device, dtype):
        logits = _called("forward", model, x)
        _check_output("forward", logits, (B, T), V, "V")
        if logits.shape[-1] < V:
            raise ConfigError(
                f"model has logits of {logits.shape[-1]} token ids and vocab_size={V}: ids beyond "
                f"could not be labels; enlarge its head, or lower vocab_size"
            )
        later = x.clone()
        later[:, T // 2 :] = 0
        changed = _called("forward", model, later)[:, : T // 2] - logits[:, : T // 2]
        if changed.numel() and changed.abs().max() > 0.05 * logits.abs().max():
            print(
                "[run] note: the model's outputs change with later tokens, which it would be "
                "trained to predict: is its attention causal?"
            )
        if not has_fused_head(model):
            if cfg.fp8_head:
                raise ConfigError(
                    "fp8_head: the model has no hidden() and nn.Linear lm_head, by which head and "
                    "loss are one op; add them, or leave it out"
                )
            return
        hidden = _called("hidden", model.hidden, x)
        _check_output("hidden", hidden, (B, T), model.lm_head.in_features, "D")
        # A cap, a scale or a mask behind the head would be lost in training.
        difference = (model.lm_head(hidden) - logits).abs().max()
        if not difference <= 0.05 * logits.abs().max():
            raise ConfigError(
                f"model's forward() is not lm_head(hidden()), it differs by {float(difference):.3g}"
                f": make them agree, or rename hidden() to train on what forward() returns"
            )


def _called(name: str, function: Any, x: Tensor) -> Any:
    try:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            return function(x)
    except ConfigError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ConfigError(
            f"model fails in {name}() on token ids of shape {tuple(x.shape)}, vocab_size="
            f"{int(x.max()) + 1} ({type(error).__name__}: {first_line(error)})"
        ) from error


def _check_output(name: str, output: Any, leading: tuple[int, int], last: int, letter: str) -> None:
    is_tensor = isinstance(output, Tensor)
    found = (
        f"a tensor of shape {tuple(output.shape)}" if is_tensor else f"a {type(output).__name__}"
    )
    right = is_tensor and output.is_floating_point() and tuple(output.shape[:-1]) == leading
    if not right or (letter == "D" and output.shape[-1] != last):
        B, T = leading
        raise ConfigError(
            f"model's {name}() returns {found} for token ids of shape {leading}: it must return "
            f"a (B, T, {letter}) tensor of floats, here ({B}, {T}, {last})"
        )


@contextmanager
def _embeddings_checked(model: nn.Module, vocab_size: int, context_len: int) -> Iterator[None]:
    """Says which table is too small, before a GPU does, which then is lost to the process."""

    def check(name: str, module: nn.Embedding, ids: Tensor) -> None:
        if int(ids.max()) >= module.num_embeddings:
            raise ConfigError(
                f"model's embedding {name} has {module.num_embeddings} rows and is asked for row "
                f"{int(ids.max())}: it must hold what reaches it of the ids below vocab_size="
                f"{vocab_size} and the positions below context_len={context_len}"
            )

    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name: check(name, m, args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
