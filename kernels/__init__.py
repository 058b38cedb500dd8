"""Triton kernels, installed as `fastlm.kernels`; this folder works alone in other projects too.

Modules here import torch, triton and their siblings only. What is asked for is loaded when it is
asked for, so that the folder can be imported where Triton is not installed.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cross_entropy import check_labels
    from .drop_in import AdamW, cross_entropy_loss

__all__ = ["AdamW", "check_labels", "cross_entropy_loss"]


def __getattr__(name: str) -> Any:
    if name == "check_labels":
        from .cross_entropy import check_labels

        return check_labels
    if name in ("AdamW", "cross_entropy_loss"):
        from . import drop_in

        return getattr(drop_in, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
