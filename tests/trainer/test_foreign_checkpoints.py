"""Checkpoints of unknown origin: whatever they hold, they load whole or are refused by name."""

import copy
import re
import zipfile

import pytest
import torch
from checkpoints import everything, make_model, make_pair
from fuzz_checkpoints import fuzz
from torch import nn
from training_runs import same

from fastlm import AdamW, CheckpointError, load_checkpoint, save_checkpoint
from fastlm.checkpoint import (
    checkpoint_payload,
    iteration_of,
    read_checkpoint,
    restore_optimizer,
    restore_scaler,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def payload(**changed) -> dict:
    return {**copy.deepcopy(checkpoint_payload(*make_pair(), 2)), **changed}


def optimizer_state(**changed) -> dict:
    return {**payload()["optimizer_state"], **changed}


def group_with(**changed) -> dict:
    state = optimizer_state()
    state["param_groups"][0].update(changed)
    return {"optimizer_state": state}


def entry_with(**changed) -> dict:
    state = optimizer_state()
    state["state"][3].update(changed)
    return {"optimizer_state": state}


HOSTILE = {  # what is changed, and what is said of it
    "negative step": (dict(iteration=-1), "step number is none: -1"),
    "two steps": (dict(iteration=torch.tensor([0, 0])), r"none: a tensor of shape \(2,\)"),
    "text for a step": (dict(iteration="x\ny"), r"none: 'x\\ny'$"),
    "huge step": (dict(iteration=10**500), "none: a int"),
    "true step": (dict(iteration=True), "none: True"),
    "nan step": (dict(iteration=float("nan")), "none: nan"),
    "no optimizer": (dict(optimizer_state=-1), "it is no state dict of an optimizer"),
    "no groups": (dict(optimizer_state=optimizer_state(param_groups=5)), "no state dict"),
    "odd groups": (dict(optimizer_state=optimizer_state(param_groups=[5])), "no state dict"),
    "odd params": (group_with(params="abc"), "no state dict"),
    "one parameter": (group_with(params=[0]), r"groups of \[1\] parameters, not of \[12\]"),
    "twice the same": (group_with(params=[0] * 12), "not numbered"),
    "lr": (group_with(lr="x"), "lr of its group 0 is 'x'"),
    "negative lr": (group_with(lr=-1e-3), r"lr of its group 0 is -0\.001"),
    "no eps": (group_with(eps=None), "eps of its group 0 is a NoneType"),
    "two names": (
        dict(model_state={**payload()["model_state"], "module.ln_final.weight": torch.ones(16)}),
        "holds weights twice, with a prefix and without",
    ),
    "nan lr": (group_with(lr=float("nan")), "lr of its group 0 is nan"),
    "betas": (group_with(betas=(0.9,)), "betas of its group 0 is a tuple"),
    "large betas": (group_with(betas=(0.9, 7)), "betas of its group 0 is a tuple"),
    "entry": (
        dict(optimizer_state=optimizer_state(state={3: 7})),
        r"the state of layers\.0\.attn\.k_proj\.weight is a int",
    ),
    "shape": (
        entry_with(exp_avg=torch.zeros(5)),
        r"exp_avg of layers\.0\.attn\.k_proj\.weight is \(5,\), not \(8, 8\)",
    ),
    "expanded": (entry_with(exp_avg=torch.zeros(1).expand(1 << 40)), "exp_avg of layers"),
    "moment": (entry_with(exp_avg_sq="x"), r"exp_avg_sq of layers.* is a str, not \(8, 8\)"),
    "count": (entry_with(step=-3), "the step of layers.* is -3"),
    "integer weights": (
        dict(model_state={n: t.long() for n, t in make_model().state_dict().items()}),
        "token_embeddings.weight is of torch.int64 on cpu, not of torch.float32 and",
    ),
    "weights without names": (dict(model_state={5: torch.zeros(3)}), "without a name: 5"),
    "weights without memory": (
        dict(model_state=make_model().to("meta").state_dict()),
        "token_embeddings.weight is of torch.float32 on meta",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_are_refused_by_name_and_change_nothing(tmp_path, case):
    changed, said = HOSTILE[case]
    torch.save(payload(**changed), tmp_path / "x.pt")
    model, optimizer = make_pair(seed=1)
    before = copy.deepcopy(everything(model, optimizer))
    with pytest.raises(CheckpointError, match=said) as caught:
        load_checkpoint(model, optimizer, tmp_path / "x.pt")
    assert "\n" not in str(caught.value)
    assert same(everything(model, optimizer), before)


def test_a_hundred_cases_of_the_fuzz(tmp_path):
    refused = fuzz(100, 0, tmp_path)
    assert 20 < refused < 90  # both ways are gone


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(1, 5))
def test_thousands_of_cases_of_the_fuzz(tmp_path, seed):
    fuzz(1000, seed, tmp_path)


@pytest.mark.parametrize("value", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_step_numbers_of_other_programs(value):
    assert iteration_of({"step": value}) == 7
    assert iteration_of({}) == 0


def test_scales_that_are_none():
    scaler = torch.amp.GradScaler("cpu")
    stored = scaler.state_dict()
    for key in stored:
        for value in (None, "x", -1, float("nan"), torch.zeros(2)):
            with pytest.raises(CheckpointError, match="loss scale cannot be restored"):
                restore_scaler(scaler, {"scaler": {**stored, key: value}})
    for value in (5, [1], {"x": 1}):
        with pytest.raises(CheckpointError, match="loss scale cannot be restored"):
            restore_scaler(scaler, {"scaler": value})
    assert scaler.state_dict() == stored
    restore_scaler(scaler, {"scaler": {**stored, "scale": 8.0}})
    assert scaler.state_dict()["scale"] == 8.0
    for value in ({}, None):
        restore_scaler(scaler, {"scaler": value})


def test_state_in_another_order_is_told_by_its_names(tmp_path):
    """Many have the same shape: only names tell that they have changed places."""
    model = make_model()
    optimizer = torch.optim.AdamW(reversed(list(model.named_parameters())), lr=1e-2)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    stored = checkpoint_payload(model, optimizer, 1)
    first, *_, last = (name for name, _ in model.named_parameters())
    other = make_model(1)
    theirs = AdamW(other.parameters())
    with pytest.raises(CheckpointError, match=f"its '{last}' stands where {first} is here"):
        restore_optimizer(theirs, stored, other)
    assert not theirs.state
    for group in stored["optimizer_state"]["param_groups"]:  # without names, the shapes tell
        del group["param_names"]
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \(16, 8\), not \(8, 8\)"):
        restore_optimizer(theirs, stored, other)
    # In the right order, and with a wrapper's prefix, they load.
    named = torch.optim.AdamW(((f"module.{n}", p) for n, p in model.named_parameters()), lr=1e-2)
    named.step()
    restore_optimizer(theirs, checkpoint_payload(model, named, 1), other)
    assert len(theirs.state) == 12


def test_a_compressed_file_cannot_fill_the_memory(saved):
    """A megabyte of it may hold a gigabyte of zeros."""
    small = saved.with_name("small.pt")
    with zipfile.ZipFile(saved) as whole, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as file:
        for entry in whole.infolist():
            file.writestr(entry.filename, whole.read(entry))
    with pytest.raises(CheckpointError, match=r"small\.pt: is compressed, which no checkpoint is"):
        read_checkpoint(small)


def test_paths_that_cannot_be(tmp_path):
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(CheckpointError, match=r"no readable checkpoint|no such checkpoint"):
            load_checkpoint(make_model(), None, tmp_path / name)


def test_a_bare_number_of_parameters_is_named_by_its_place():
    stored = payload(**entry_with(exp_avg=torch.zeros(5)))
    with pytest.raises(
        CheckpointError, match=re.escape("exp_avg of parameter 3 of group 0 is (5,)")
    ):
        restore_optimizer(make_pair()[1], stored)


class Wrap(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "make",
    [
        Wrap,
        torch.optim.swa_utils.AveragedModel,
        nn.DataParallel,
        lambda m: Wrap(nn.DataParallel(m)),
    ],
    ids=["module", "averaged", "parallel", "both"],
)
def test_a_models_own_name_may_be_a_wrappers(make, tmp_path):
    """Its parameters begin with "module.", as those in DistributedDataParallel's state dicts."""
    saved, loaded = make(nn.Linear(3, 3)), make(nn.Linear(3, 3))
    optimizers = [torch.optim.AdamW(model.named_parameters()) for model in (saved, loaded)]
    for p in saved.parameters():
        p.grad = torch.ones_like(p)
    optimizers[0].step()
    save_checkpoint(saved, optimizers[0], 5, tmp_path / "c.pt")
    assert load_checkpoint(loaded, optimizers[1], tmp_path / "c.pt") == 5
    assert same(loaded.state_dict(), saved.state_dict())
    # As torch saves it inside of DistributedDataParallel, whose prefix comes before.
    outer = {f"module.{name}": tensor for name, tensor in saved.state_dict().items()}
    torch.save({"model_state": outer, "iteration": 6}, tmp_path / "outer.pt")
    assert load_checkpoint(loaded, None, tmp_path / "outer.pt") == 6


def test_a_parallel_model_takes_the_weights_of_the_one_inside(tmp_path):
    model = nn.DataParallel(nn.Linear(3, 3))
    save_checkpoint(nn.Linear(3, 3), None, 1, tmp_path / "c.pt")
    assert load_checkpoint(model, None, tmp_path / "c.pt") == 1
    save_checkpoint(model, None, 2, tmp_path / "d.pt")
    assert load_checkpoint(nn.Linear(3, 3), None, tmp_path / "d.pt") == 2


@pytest.mark.parametrize("kind", ["Muon", "Adafactor", "SGD"])
def test_settings_of_torchs_optimizers_may_be_negative_or_none(kind, tmp_path):
    model = nn.Linear(3, 3, bias=False)
    more = {"dampening": -0.1, "momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **more)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "c.pt")
    assert load_checkpoint(model, optimizer, tmp_path / "c.pt") == 1


def test_an_optimizer_may_know_parameters_by_other_names(tmp_path):
    model = Wrap(nn.Linear(3, 3))
    optimizer = AdamW(model.module.named_parameters())
    model.module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "c.pt")
    assert load_checkpoint(model, optimizer, tmp_path / "c.pt") == 1
    with pytest.raises(TypeError, match="no source"):
        load_checkpoint(model, optimizer)


def test_another_optimizers_state_is_refused(tmp_path):
    model = nn.Linear(3, 3)
    model(torch.ones(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    save_checkpoint(model, optimizer, 1, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="its group 0 has no momentum"):
        load_checkpoint(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "c.pt")
