"""AdamW with the clipping of gradients in the step, and clip_gradients for loops of one's own."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.optimizer import FusedAdamW, ParameterPosition
from fastlm.kernels.table_watch import TableWatch
from fastlm.ops.clip_grad_norm import clip_gradients
from fastlm.ops.dispatch import implementation

__all__ = ["AdamW", "ParameterPosition", "clip_gradients"]


class AdamW(FusedAdamW):
    """torch.optim.AdamW with the defaults of GPT training, clipping, and skipping of bad steps.

    The mathematics and the state dict are torch.optim.AdamW's (formula: fastlm/ops/adamw.py); state
    dicts load both ways. One kernel updates all tensors; on a CPU it computes in fp64, on a GPU
    with some 45 bits, so that a step's result is the formula's, rounded once (within 1 ULP).
    Moments are float32, also of bfloat16 and float16 parameters (float64 of float64 ones).
    Defaults that differ from torch's: betas (0.9, 0.95), weight_decay 0.

    max_grad_norm: the gradients enter the step clipped to this global L2 norm: over all groups and,
        of DTensors, over all ranks. Other tensors count as whole: where each rank has a part of
        them (ZeroRedundancyOptimizer, FSDP1), clip outside. The gradients themselves stay as they
        are; no host sync. All parameters must be on one device.
    skip_nonfinite: a step whose norm is NaN or infinite leaves parameters, moments and step counter
        as they were. Default: on where max_grad_norm is set.
    param_precision: "split" keeps, beside each bfloat16 parameter, the lower 16 bits of its float32
        value (int16, `state[p]["remainder"]`): a run has the bits of a float32 run with the same
        gradients, in 2 + 2 bytes. `master_weights()` are those float32 values.
    impl: "auto", "cpp" (CPU), "triton" (CUDA, ROCm) or "torch". Arguments that choose among torch's
        implementations (fused, foreach, capturable) are accepted and do nothing.

    After a step with a norm, `last_grad_norm` is the norm before clipping: a 0-d tensor on the
    device, so that reading it, and nothing else, waits for the device; `first_nonfinite()` tells
    whose gradient made it NaN or infinite.

    lr may be a tensor, which is read on its device: a CUDA graph's replay sees it change. Take one
    step before the capture, or it raises; other hyperparameters keep the values of the capture.
    DTensors and parameters of more than four dimensions cannot be captured.
    """

    @staticmethod
    def kernels_for(device: torch.device, impl: str) -> Any:
        return implementation("adamw", impl, device)

    @staticmethod
    def new_watch(groups: list[dict], state: Any, rows: list[int], pointers: Tensor) -> Any:
        if not hasattr(Tensor, "__dlpack_c_exchange_api__"):  # torch < 2.10
            return TableWatch(groups, state, rows, pointers)
        return extension().TableWatch(Tensor, groups, state, np.array(rows), pointers.numpy())
