"""Which implementation of an op runs.

Implementations: "triton" (kernels/, CUDA and ROCm tensors), "cpp" (csrc/, CPU tensors) and "torch"
(the fastest plain PyTorch). `impl="auto"` takes the kernel if this version has one for the device,
else "torch". A name that cannot run raises.
"""

import importlib
import os
from types import ModuleType

import torch

from fastlm.kernels.cross_entropy_op import is_transformed

_ROWS = {"triton": "fastlm.kernels.cross_entropy", "cpp": "fastlm.ops.cross_entropy_cpp"}
_OPTIMIZER = {
    "triton": "fastlm.kernels.adamw",
    "cpp": "fastlm.ops.optimizer_cpp",
    "torch": "fastlm.ops.optimizer_torch",
}
# The module that holds each implementation of each op.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "cross_entropy": {**_ROWS, "torch": "fastlm.ops.cross_entropy"},
    "linear_cross_entropy": {**_ROWS, "torch": "fastlm.ops.linear_cross_entropy"},
    "adamw": _OPTIMIZER,
    "clip_grad_norm": _OPTIMIZER,
    "gather_batch": {"cpp": "fastlm.ops.gather_batch"},
    "causal_attention": {
        "cpp": "fastlm.ops.causal_attention_cpp",
        "torch": "fastlm.ops.causal_attention",
    },
}
_DEVICE_TYPES = {"triton": "cuda", "cpp": "cpu", "torch": "*"}  # "*": every device
# C++ reads batches from host memory; then they are copied to the device.
_READS_HOST_MEMORY = ("gather_batch",)
# Their kernels take no float64: for it "auto" means "torch".
_NO_FLOAT64 = ("cross_entropy", "linear_cross_entropy", "causal_attention")
# Their Triton kernels also run on CPU tensors under Triton's interpreter, if asked for by name.
_INTERPRETED = ("adamw", "clip_grad_norm")


def resolve_implementation(
    op: str, impl: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> str:
    """The implementation that runs for `op` on `device`; ValueError if `impl` cannot."""
    device_type = "cpu" if op in _READS_HOST_MEMORY else torch.device(device).type
    usable = [name for name in IMPLEMENTATIONS[op] if _DEVICE_TYPES[name] in ("*", device_type)]
    if impl == "auto":
        return "torch" if dtype == torch.float64 and op in _NO_FLOAT64 else usable[0]
    if os.environ.get("TRITON_INTERPRET") == "1" and op in _INTERPRETED:
        usable.insert(0, "triton")
    if impl in usable:
        return impl
    raise ValueError(
        f"impl={impl!r}: {op} on {device_type} has {', '.join(usable)}; "
        f"impl is 'auto' or one of these"
    )


def implementation(op: str, impl: str, device: torch.device | str) -> ModuleType:
    """Loads the module that `impl` names for `op` on `device`.

    Raises ValueError like resolve_implementation, ImportError if Triton is needed and missing.
    """
    return importlib.import_module(IMPLEMENTATIONS[op][resolve_implementation(op, impl, device)])


def active_implementation(
    op: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> str:
    """The name of the implementation that `impl="auto"` runs for `op` on `device`.

    dtype: of the logits, for the linear loss and attention of the products (compute_dtype).
    gather_batch runs "cpp" for every device: C++ reads host memory, and the batch is copied.
    """
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op={op!r} is unknown; ops: {', '.join(IMPLEMENTATIONS)}")
    return resolve_implementation(op, "auto", device, dtype)


def on_gpu(*tensors: torch.Tensor) -> bool:
    """Do the model's own kernels (rope, swiglu) take these? Not in torch.func's transforms, which
    they do not know."""
    known = all(
        x.is_cuda and x.dtype in (torch.float32, torch.bfloat16, torch.float16) for x in tensors
    )
    return known and (torch.compiler.is_compiling() or not is_transformed(*tensors))


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of products with x: autocast's where that is on, else x's own."""
    if x.dtype == torch.float64 or not autocasts(x.device):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocasts(device: torch.device) -> bool:
    """Is autocast on? A plan can be asked for on "meta", which has none."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)
