"""Which implementation of an op runs.

Implementations: "triton" (kernels/, CUDA and ROCm tensors), "cpp" (csrc/, CPU tensors) and "torch"
(the fastest plain PyTorch). `impl="auto"` takes the kernel where this version has one for the
device, else "torch". An implementation asked for by name that cannot run raises.
"""

import os

import torch

# What exists, and for which device types; "*" is every device.
IMPLEMENTATIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "cross_entropy": {"triton": ("cuda",), "cpp": ("cpu",), "torch": ("*",)},
    "linear_cross_entropy": {"triton": ("cuda",), "cpp": ("cpu",), "torch": ("*",)},
    "adamw": {"triton": ("cuda",), "cpp": ("cpu",), "torch": ("*",)},
    "clip_grad_norm": {"triton": ("cuda",), "cpp": ("cpu",), "torch": ("*",)},
    "gather_batch": {"cpp": ("cpu",)},
}
_PREFERRED = ("triton", "cpp", "torch")
# Their Triton kernels also run on CPU tensors under Triton's interpreter, where asked for by name.
_INTERPRETED = ("cross_entropy", "adamw", "clip_grad_norm")


def resolve_implementation(op: str, impl: str, device: torch.device | str) -> str:
    """The implementation that runs for `op` on `device`; ValueError where `impl` cannot."""
    device_type = torch.device(device).type
    usable = [
        name for name in _PREFERRED if set(IMPLEMENTATIONS[op].get(name, ())) & {"*", device_type}
    ]
    if impl == "auto" and usable:
        return usable[0]
    if os.environ.get("TRITON_INTERPRET") == "1" and op in _INTERPRETED:
        usable.insert(0, "triton")
    if impl in usable:
        return impl
    raise ValueError(
        f"impl={impl!r}: {op} on {device_type} has {', '.join(usable) or 'no implementation'}; "
        f"impl is 'auto' or one of these"
    )


def active_implementation(op: str, device: torch.device | str = "cpu") -> str:
    """The name of the implementation that `impl="auto"` runs for `op` on `device`."""
    if op not in IMPLEMENTATIONS:
        raise ValueError(f"op={op!r} is unknown; ops: {', '.join(IMPLEMENTATIONS)}")
    return resolve_implementation(op, "auto", device)
