"""AdamW and clip_gradients on two ranks: FSDP2, DTensors, torch.distributed.checkpoint.

The cases are in distributed_adamw.py, which torchrun runs once for all of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
CASES = [
    "fsdp_is_the_unsharded_run",
    "fsdp_is_the_unsharded_run_but_for_the_order_of_sums",
    "split_precision_is_the_fp32_run",
    "a_nan_on_one_rank_skips_the_step_on_all",
    "clip_gradients_counts_every_element_once",
    "clip_gradients_of_a_model",
    "a_nonfinite_norm_leaves_gradients_as_they_are",
    "partial_gradients",
    "a_rank_without_gradients_joins_the_norm",
    "plain_and_distributed_parameters_in_one_step",
    "distributed_checkpoint",
    "distributed_checkpoint_in_flat_form",
    "distributed_checkpoint_of_split_precision",
    "distributed_checkpoint_without_init_state",
    "full_state_dict",
]

if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch.distributed with gloo is not available", allow_module_level=True)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the two ranks print."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(HELPERS / "distributed_adamw.py"), str(tmp_path_factory.mktemp("distributed"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            command, cwd=HELPERS, env=environment, capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired as expired:
        return f"timed out\n{expired.stdout}\n{expired.stderr}"
    return f"exit status {run.returncode}\n{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(output, case):
    for rank in (0, 1):
        assert f"passed {case} on rank {rank}" in output, output[-8000:]


def test_every_case_was_run_and_none_failed(output):
    assert output.startswith("exit status 0\n"), output[-8000:]
    assert output.count("passed ") == 2 * len(CASES), output
