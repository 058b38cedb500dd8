"""What the multi-tensor kernels work on: raw pointers to many tensors, as a table.

Imports torch only. n tensors; every kernel goes over all of them in one launch, or one parallel
region, whatever n is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# The codes of element types in a table. SPLIT: a bfloat16 parameter whose fp32 master's lower 16
# bits lie in an int16 tensor beside it (the column REMAINDER).
FLOAT32, BFLOAT16, FLOAT16, FLOAT64, SPLIT = range(5)
CODE = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float64: FLOAT64,
}

# The columns of `pointers`.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, REMAINDER, STEP = range(6)


@dataclass(eq=False)
class TensorTable:
    """n parameters on one device with their gradients and optimizer state, all dense in memory.

    Element i of a gradient, of the moments and of the remainder belongs to element i of the
    parameter's memory. Moments are float32, of float64 parameters float64; the step counter is one
    float32. `pointers` may be written into between steps (gradients move); everything else stays
    as it is. What a caller needs besides (copies on a device, cumulative lengths) goes into
    `cache`.
    """

    device: torch.device
    pointers: Tensor  # (n, 6) int64 on the CPU; 0 for what a row lacks
    numel: Tensor  # (n,) int64 on the CPU
    kinds: Tensor  # (n, 2) int64 on the CPU: codes of parameter and gradient
    groups: Tensor  # (n,) int64 on the CPU: index of the parameter's param_group
    classes: Tensor  # (n,) int64 on the CPU: which sum of squares the gradient goes into
    num_classes: int = 1
    # The tensors themselves, row by row in the order of the columns: the pointers stay valid. What
    # outlives a step lets go of the gradients (None), which loops free by zero_grad.
    keep: Sequence[tuple[Tensor | None, ...]] = ()
    cache: dict = field(default_factory=dict)

    @property
    def norm_dtype(self) -> torch.dtype:
        """Of the gradients' norm: float64 if one of the gradients is, else float32."""
        return torch.float64 if (self.kinds[:, 1] == FLOAT64).any() else torch.float32


@dataclass(eq=False)
class GradientSums:
    """Sums of squares of the gradients of a table, on its device.

    bad: the first row of the table with a gradient that is not finite, -1 if there is none; valid
    once the step that got these sums is done.
    """

    values: Tensor  # (k,) float64: together they are the square of the global norm
    bad: Tensor  # 0-d int64


@dataclass(frozen=True, eq=False)
class StepOptions:
    """What one step of AdamW does besides reading the table. All numbers are used in float64."""

    # One row a param_group: lr (a float, or a 0-d or one-element tensor on the table's device,
    # which is read on the device), beta1, beta2, eps, weight_decay.
    hyper: Sequence[tuple[float | Tensor, float, float, float, float]]
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    # What a torch.amp.GradScaler hands over: gradients are to be divided by grad_scale; nothing is
    # to change where found_inf is not 0. One-element float32 tensors on the table's device.
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
