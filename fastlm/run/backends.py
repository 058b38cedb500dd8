"""Which of torch's kernels a run computes with: TF32 matmuls, attention, repeatable algorithms."""

import contextlib
import importlib
from collections.abc import Iterator

import torch
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastlm.config import TrainingConfig
from fastlm.errors import ConfigError
from fastlm.hardware import device_name, matmul_precision, select_device, select_dtype
from fastlm.ops.causal_attention import of_query_heads
from fastlm.run.environment import deterministic_algorithms

_ALL = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.OVERRIDEABLE,
]
_WANTED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,  # in place of torch's own
}


@contextlib.contextmanager
def backends(cfg: TrainingConfig, *, own_model: bool = False) -> Iterator[None]:
    """Inside, torch computes as `cfg` says; behind it, as before.

    own_model: a caller's, whose attention is not known. Raises ConfigError for kernels that cannot
    run on cfg.device.
    """
    device = select_device(cfg.device)
    dtype = select_dtype(cfg.dtype, device)
    if cfg.residual_dtype == "bfloat16" != str(dtype).removeprefix("torch."):
        raise ConfigError(
            f"residual_dtype='bfloat16' with matmuls in {str(dtype).removeprefix('torch.')}: it "
            f"goes with --dtype bfloat16; use --residual-dtype auto"
        )
    if cfg.fp8_head and not cfg.eval_only and not _multiplies_fp8(device):
        raise ConfigError(
            f"fp8_head: {device_name(device)} has no matrix units for float8, which NVIDIA GPUs "
            f"have from Ada and Hopper on; use --no-fp8-head"
        )
    with contextlib.ExitStack() as stack:
        if device.type == "cuda" and device.index is not None:
            # Whose generator a seed goes to, where Triton compiles and launches: the current one's.
            stack.enter_context(torch.cuda.device(device))
        # torch.compile's gradient of an embedding adds from all threads in any order, unless told.
        adds_in_any_order = cfg.compile and cfg.compile_mode == "default" and device.type == "cpu"
        if cfg.deterministic or adds_in_any_order:
            stack.enter_context(deterministic_algorithms(warn_only=not cfg.deterministic))
        if device.type == "cuda" and dtype == torch.float32:
            stack.enter_context(_matmul_precision("high" if cfg.tf32 else "highest"))
        if cfg.attention != "auto" and not cfg.eval_only:
            stack.enter_context(_attention(cfg, device, dtype, own_model))
        yield


def _multiplies_fp8(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    places = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul_precision(), *(place.fp32_precision for place in places)
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        if before[0] in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(before[0])
        else:  # a caller's, for each backend
            for place, value in zip(places, before[1:], strict=True):
                place.fp32_precision = value


@contextlib.contextmanager
def _attention(
    cfg: TrainingConfig, device: torch.device, dtype: torch.dtype, own_model: bool
) -> Iterator[None]:
    """The kernel that is asked for goes before the others, which run what it cannot: generation.

    Set around the run, not around each call: torch.compile traces what is in force. "auto" sets
    nothing: where cuDNN's kernel is the faster and free of known errors, torch takes it by itself
    (pytorch/pytorch#138522, #169849).
    """
    name = cfg.attention
    if device.type != "cuda":
        raise ConfigError(
            f"attention={name!r}: it chooses among CUDA's kernels; use --attention auto"
        )
    # torch puts its own order in force when it is first asked, whatever was set before.
    attention_kernel(cfg, device, dtype)
    with contextlib.ExitStack() as stack:
        if name == "fa3":
            stack.enter_context(_flash_attention_3())
        order = [_WANTED[name], *(b for b in _ALL if b != _WANTED[name])]
        stack.enter_context(sdpa_kernel(order, set_priority=True))
        found = attention_kernel(cfg, device, dtype)
        wanted = _WANTED[name].name.split("_")[0].lower()
        if found != wanted and not own_model:
            raise ConfigError(
                f"attention={name!r}: it cannot run here ({device_name(device)}, "
                f"{str(dtype).removeprefix('torch.')}, heads of {_head_dim(cfg)}, "
                f"dropout {cfg.dropout:g}); use --attention auto, which takes {found!r}"
            )
        # torch.compile has no guard on the order: what was compiled before would keep its kernel,
        # and what is compiled now would be taken behind the run.
        torch.compiler.reset()
        stack.callback(torch.compiler.reset)
        yield


@contextlib.contextmanager
def _flash_attention_3() -> Iterator[None]:
    known = getattr(attention, "list_flash_attention_impls", list)()
    if "FA3" not in known or not hasattr(attention, "restore_flash_attention_impl"):
        raise ConfigError(
            f"attention='fa3': torch {torch.__version__} cannot activate it; use a newer torch, or "
            f"--attention cudnn"
        )
    try:
        importlib.import_module("flash_attn_interface")
    except ImportError as error:
        raise ConfigError(
            f"attention='fa3': flash_attn_interface cannot be imported ({error}); install "
            f"FlashAttention 3, or use --attention cudnn"
        ) from error
    attention.activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        attention.restore_flash_attention_impl()


def attention_kernel(cfg: TrainingConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Whose kernel torch chooses for the model of `cfg`: "cudnn", "flash", "efficient", "math"."""
    heads, kv_heads = cfg.num_heads, cfg.num_kv_heads or cfg.num_heads
    q, k, v = (
        torch.empty(1, cfg.context_len, number, _head_dim(cfg), device=device, dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for number in (heads, kv_heads, kv_heads)
    )
    k, v, grouped = of_query_heads(q, k, v, masked=cfg.doc_mask)
    mask = None
    if cfg.doc_mask:  # which says itself what is causal
        mask = torch.zeros(1, 1, *2 * (cfg.context_len,), dtype=dtype, device=device)
    chosen = torch._fused_sdp_choice(q, k, v, mask, cfg.dropout, mask is None, **grouped)
    return SDPBackend(chosen).name.split("_")[0].lower()


def _head_dim(cfg: TrainingConfig) -> int:
    return cfg.head_dim or cfg.d_model // cfg.num_heads
