"""Checkpoints: what they may hold, so that whatever is saved can be loaded."""

import numpy as np
import pytest
import torch
from checkpoints import make_model, make_pair
from in_process import TRAIN, VAL
from own_models import Plain
from training_runs import same, tiny_config

from fastlm import (
    CheckpointError,
    TrainingConfig,
    load_checkpoint,
    save_checkpoint,
    train_loop,
)
from fastlm.foreign_state import first_line


class OwnTensor(torch.Tensor):
    pass


pytestmark = pytest.mark.usefixtures("one_thread")


def test_numpys_numbers_are_stored_as_plain_ones(tmp_path):
    """Pickled as they are, torch.load(weights_only=True) would refuse the whole file."""
    path = tmp_path / "a.pt"
    model, optimizer = make_pair()
    optimizer.param_groups[0]["lr"] = 3e-4 * np.cos(0.3)
    extra = {"losses": [np.float32(1.5), np.bool_(True)], np.int64(3): (np.str_("x"),)}
    save_checkpoint(model, optimizer, np.int64(5), path, extra=extra)
    payload = torch.load(path, weights_only=True)
    assert payload["extra"] == {"losses": [1.5, True], 3: ("x",)}
    assert type(payload["optimizer_state"]["param_groups"][0]["lr"]) is float
    other, other_optimizer = make_pair(seed=1)
    assert load_checkpoint(other, other_optimizer, path) == 5
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert payload["model_state"]._metadata == model.state_dict()._metadata


@pytest.mark.parametrize(
    "extra, told",
    [
        ({"rng": {"state": np.zeros(2)}}, r"rng\['state'\] is a numpy\.ndarray"),
        ({"cfg": [TrainingConfig()]}, r"cfg\[0\] is a fastlm\.config\.TrainingConfig"),
        ({"x": np.longdouble(1)}, r"x is a numpy"),
        ({"x": torch.ones(2).as_subclass(OwnTensor)}, r"x is a \S*OwnTensor"),
        ({"x": {lambda: 1: 2}}, r"a key of x is a builtins\.function"),
    ],
)
def test_what_no_reader_takes_is_not_saved(tmp_path, extra, told):
    with pytest.raises(TypeError, match=told):
        save_checkpoint(make_model(), None, 1, tmp_path / "a.pt", **extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("iteration", ["7", -1, 1.5, None, 1 << 63, torch.ones(2, dtype=int)])
def test_an_iteration_that_is_no_number_of_steps(tmp_path, iteration):
    with pytest.raises(ValueError, match=r"iteration=.*completed steps"):
        save_checkpoint(make_model(), None, iteration, tmp_path / "a.pt")


def test_a_file_of_other_objects_is_told_by_their_name(tmp_path):
    torch.save({"model_state": {}, "lr": np.float64(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"holds a numpy\S*scalar, which torch") as error:
        load_checkpoint(make_model(), None, tmp_path / "a.pt")
    assert "\x1b" not in str(error.value)


def test_words_without_a_terminals_codes():
    assert first_line(ValueError("\x1b[1mthis\x1b[0m is wrong\nrest")) == "this is wrong"


def test_a_module_with_extra_state(tmp_path):
    class Counting(torch.nn.Linear):
        calls = 0

        def get_extra_state(self):
            return {"calls": self.calls}

        def set_extra_state(self, state):
            self.calls = state["calls"]

    model, other = Counting(3, 2), Counting(3, 2)
    model.calls = 7
    save_checkpoint(model, None, 1, tmp_path / "a.pt")
    assert load_checkpoint(other, None, tmp_path / "a.pt") == 1
    assert other.calls == 7 and torch.equal(other.weight, model.weight)


def test_a_run_of_a_model_that_no_checkpoint_can_hold_does_not_begin(tmp_path, capsys):
    class Holding(Plain):
        def get_extra_state(self):
            return np.zeros(2)

    with pytest.raises(TypeError, match=r"_extra_state'\] is a numpy\.ndarray"):
        train_loop(TRAIN, VAL, tiny_config(tmp_path), model=Holding())
    assert "step 0" not in capsys.readouterr().out
