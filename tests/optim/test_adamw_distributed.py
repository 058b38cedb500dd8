"""AdamW and clip_gradients on two ranks: FSDP2, DTensors, torch.distributed.checkpoint.

The cases are in distributed_adamw.py, run once for all of them.
"""

import pytest
import torch
from ranks import run_ranks

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
    """How the two ranks end, and what they print."""
    directory = tmp_path_factory.mktemp("distributed")
    call = "distributed_adamw:main"
    ranks = run_ranks(2, [str(directory)], directory, call=call, timeout=180)
    return f"exit statuses {[r.returncode for r in ranks]}\n" + "".join(r.output for r in ranks)


@pytest.mark.parametrize("case", CASES)
def test_on_two_ranks(output, case):
    for rank in (0, 1):
        assert f"passed {case} on rank {rank}" in output, output[-8000:]


def test_every_case_was_run_and_none_failed(output):
    assert output.startswith("exit statuses [0, 0]\n"), output[-8000:]
    assert output.count("passed ") == 2 * len(CASES), output
