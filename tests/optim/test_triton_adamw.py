"""The Triton kernels of AdamW and gradient clipping: on a GPU, without one in the interpreter."""

import pytest

pytest.importorskip("triton")

from interpreter import run_interpreted, run_kernel_cases

KERNELS = ("triton_adamw_cases.py", "triton_table_cases.py")


def test_kernels():
    passed, summary = run_kernel_cases(*KERNELS)
    assert passed >= 110 and "skipped" not in summary, summary


@pytest.mark.exhaustive
def test_more_of_the_kernels():
    """Both errors over 1,000 steps, split runs of 200, every pair of dtypes without clipping."""
    passed, summary = run_kernel_cases(*KERNELS, marks="exhaustive")
    assert passed >= 16 and "skipped" not in summary, summary


def test_the_optimizer_in_the_interpreter():
    # A few of the optimizer's own tests (adamw_runs.AdamW then takes the Triton kernels): a step is
    # a third of a second here.
    passed, summary = run_interpreted(
        "optim", "test_adamw.py", "test_adamw_clipping.py", "test_adamw_precision.py",
        "test_adamw_arguments.py", "test_clip_grad_norm.py", "test_muon.py",
        keyword="memory_layouts or lr_as_a_tensor or without_a_gradient or closure or first_step "
        "or scaler_knows or torchs_16_bit or resumes_bit or first_nonfinite or compiled "
        "or found_inf",
    )  # fmt: skip
    assert passed >= 27, summary
