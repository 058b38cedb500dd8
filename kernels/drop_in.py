"""The loss and the optimizer by the Triton kernels alone, for any project with torch and triton.

The loss is registered as an op of torch's dispatcher under this package's own name, so that a copy
of this folder in another project and fastlm itself do not meet.
"""

import os
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import adamw as _adamw
from . import cross_entropy as _row_kernels
from .cross_entropy_op import check_rows, check_tensors, define_cross_entropy
from .loss_options import LossOptions, shows_options
from .optimizer import FusedAdamW

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .loss_options import LossKeywords

_device_types = ["cuda"]  # ROCm's, too
if os.environ.get("TRITON_INTERPRET") == "1":
    _device_types.append("cpu")

_loss_of, _ = define_cross_entropy(
    (__package__ or "kernels").replace(".", "_"), tuple(_device_types), lambda device: _row_kernels
)


@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    return_lse: Literal[False] = ...,
    **options: "Unpack[LossKeywords]",
) -> Tensor: ...
@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    return_lse: Literal[True],
    **options: "Unpack[LossKeywords]",
) -> tuple[Tensor, Tensor]: ...
@overload
def cross_entropy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    inplace: bool = ...,
    return_lse: bool,
    **options: "Unpack[LossKeywords]",
) -> Tensor | tuple[Tensor, Tensor]: ...
@shows_options
def cross_entropy_loss(
    logits: Tensor, targets: Tensor, *, inplace: bool = False, **options
) -> Tensor | tuple[Tensor, Tensor]:
    """Mean (or sum, or per-row) cross-entropy, in nats, fp32.

    logits: (..., V) fp32, bf16 or fp16; targets: (...) integers in [0, V), or ignore_index.
    Ignored rows count for nothing; of none left, loss and gradients are 0. num_items replaces the
    mean's denominator. return_lse: (loss, lse), lse (...) after softcap, differentiable.
    inplace allows backward to overwrite the logits; a second backward then raises.
    Raises ValueError and TypeError for arguments that do not fit. On a GPU a label out of range
    makes the loss NaN, and check_labels() raises.
    """
    checked = LossOptions.of(cross_entropy_loss, options)
    check_tensors(logits=logits, targets=targets)
    check_rows("logits", logits, logits.shape[-1] if logits.dim() else 0, targets)
    if logits.device.type not in _device_types:
        raise ValueError(
            f"logits is on {logits.device}: there are kernels for {', '.join(_device_types)}"
        )
    return _loss_of(logits, targets, checked, inplace)


class AdamW(FusedAdamW):
    """FusedAdamW, which says what the arguments do, for parameters on CUDA and ROCm GPUs.

    A launch updates all tensors of one combination of dtypes, one prepares the step, and one or two
    take the norm.
    """

    @staticmethod
    def kernels_for(device: torch.device, impl: str) -> Any:
        if impl not in ("auto", "triton"):
            raise ValueError(f"impl={impl!r}: there are Triton kernels only")
        if device.type not in _device_types:
            raise ValueError(
                f"a parameter is on {device}: these kernels run on CUDA and ROCm GPUs "
                f"(fastlm.AdamW also on CPUs)"
            )
        return _adamw
