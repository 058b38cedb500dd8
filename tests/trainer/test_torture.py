"""A sample of `make torture`: kills at any moment and inside a save, a damaged checkpoint."""

import random

import pytest
from damaged_checkpoints import damage_newest
from in_process import run_tiny
from killed_runs import OPERATIONS, Undisturbed, assert_equal_runs, killed_run

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def test_kill_9_again_and_again(tmp_path):
    """What comes out is the undisturbed run, bit for bit, and nothing else is left."""
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Undisturbed(tmp_path / "undisturbed", "accumulated")
    (tmp_path / "killed").mkdir()
    told = killed_run(undisturbed, tmp_path / "killed", random.Random(5), 5)
    assert sum(told.values()) == 5 and sum(told[kind] for kind in OPERATIONS) >= 2
    assert_equal_runs(tmp_path / "killed", undisturbed)


def test_damage_is_found_or_has_no_effect(tmp_path):
    run_tiny(tmp_path, total_steps=6, ckpt_every=3)
    found = damage_newest(tmp_path / "checkpoints", random.Random(1), flips=20, truncations=5)
    assert found > 15  # a bit of padding may be flipped
