"""linear_cross_entropy's chunks around the Triton launchers, as on a GPU, in Triton's interpreter.

test_triton_cross_entropy.py runs this file, with TRITON_INTERPRET=1 and in a process of its own.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from fastlm.kernels import cross_entropy as triton_kernels
from fastlm.kernels.arguments import Options

from fastlm.ops import cross_entropy_cpp
from fastlm.ops.head import Head, head_gradients, head_losses

OPTIONS = Options(label_smoothing=0.2, softcap=8.0, z_loss=0.02, ignore_index=0)


@pytest.mark.parametrize("rows_per_chunk", [12, 5])
@pytest.mark.parametrize("all_lse", [False, True])
def test_head_over_these_kernels(all_lse, rows_per_chunk):
    # linear_cross_entropy on a GPU: the same chunks around these launchers as around C++'s.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(12, 8, generator=generator)
    weight = torch.randn(50, 8, generator=generator)
    targets = torch.randint(50, (12,), generator=generator)
    targets[::3] = OPTIONS.ignore_index
    arguments = (hidden, Head(weight, None, torch.float32), targets)
    wanted = [True, True, False]
    results = []
    for kernels in (triton_kernels, cross_entropy_cpp):
        losses, lse, _, gradients = head_losses(
            kernels, *arguments, OPTIONS, all_lse=all_lse, gradient_scale=torch.tensor(0.5),
            wanted=wanted, rows_per_chunk=rows_per_chunk, num_valid=None,
        )  # fmt: skip
        _, _, stats, _ = head_losses(
            kernels, *arguments, OPTIONS, all_lse=all_lse, gradient_scale=None,
            wanted=wanted, rows_per_chunk=rows_per_chunk, num_valid=None,
        )  # fmt: skip
        after = head_gradients(
            kernels, *arguments, lse, stats, torch.full((12,), 0.5), lse if all_lse else None,
            OPTIONS, wanted=wanted, rows_per_chunk=rows_per_chunk,
        )  # fmt: skip
        kept = slice(None) if all_lse else targets != OPTIONS.ignore_index
        results.append((losses, lse[kept], *gradients[:2], *after[:2]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
