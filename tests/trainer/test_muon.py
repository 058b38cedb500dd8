"""--optimizer muon in the trainer: groups, rates, resuming, skipped steps, what is refused."""

import pytest
import torch
from in_process import TRAIN, VAL, checkpoint, run_tiny
from own_models import Plain
from torch import nn
from training_runs import losses, metrics, same, state, tiny_config

from fastlm import CheckpointError, ConfigError, train_loop
from fastlm.data.loader import TrainLoader
from fastlm.model_loss import ModelLoss
from fastlm.muon import Muon
from fastlm.run.resume import Resumed
from fastlm.schedule import learning_rate
from fastlm.step import TrainStep, create_model, create_optimizer, set_seed

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

MUON = dict(optimizer="muon", lr_max=3e-3)


def made(**settings):
    """(runner, cfg) of a tiny model under Muon."""
    cfg = tiny_config("unused", **{**MUON, **settings})
    set_seed(cfg.seed)
    model = create_model(cfg)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=cfg.seed)
    loss = ModelLoss(model, torch.device("cpu"), cfg)
    return TrainStep(loss, create_optimizer(model, cfg), loader, cfg), cfg


@pytest.mark.parametrize("settings", [{}, {"weight_decay_all": True}, {"tie_embeddings": True}])
def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(settings):
    model = create_model(tiny_config("unused", **MUON, **settings))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer(model, tiny_config("unused", **MUON, **settings)).param_groups
    by_muon = [names[id(p)] for g in groups if "momentum" in g for p in g["params"]]
    expected = [n for n in names.values() if "proj" in n or ".w" in n.replace(".weight", "")]
    assert by_muon == expected and len(by_muon) == 2 * 7
    others = {names[id(p)]: g for g in groups if "momentum" not in g for p in g["params"]}
    assert others.keys() == set(names.values()) - set(by_muon)
    for name, group in others.items():
        decays = "ln" not in name or settings.get("weight_decay_all", False)
        assert group["weight_decay"] == (0.1 if decays else 0.0)
    assert [g["weight_decay"] for g in groups if "momentum" in g] == [0.1]


@pytest.mark.parametrize("settings", [{}, {"optimizer": "adamw"}])
def test_the_embedding_has_a_rate_of_its_own(settings):
    runner, cfg = made(embedding_lr_scale=7.0, **settings)
    table, lr = runner.model.token_embeddings.weight, learning_rate(3, cfg)
    runner.run(0, lr)
    groups = [g for g in runner.optimizer.param_groups if "momentum" not in g]
    (own,) = (g for g in groups if any(p is table for p in g["params"]))
    assert len(own["params"]) == 1 and own["weight_decay"] == cfg.weight_decay
    assert own["lr"] == pytest.approx(lr * 7)
    assert [g["lr"] for g in groups if g is not own] == [lr] * (len(groups) - 1)
    assert len(groups) == 3
    tied, _ = made(embedding_lr_scale=7.0, tie_embeddings=True, **settings)
    assert all(g.get("lr_scale", 1.0) == 1 or "momentum" in g for g in tied.optimizer.param_groups)


def test_an_embeddings_rate_on_resume(tmp_path):
    settings = dict(embedding_lr_scale=7.0, value_residual=True, embedding_residual=True)
    run_tiny(tmp_path / "own", ckpt_every=5, **settings)
    run_tiny(tmp_path / "none", ckpt_every=5)
    path = str(checkpoint(tmp_path / "own", 5))
    run_tiny(tmp_path / "rest", ckpt_path_to_resume=path, **settings)
    assert same(state(checkpoint(tmp_path / "own")), state(checkpoint(tmp_path / "rest")))
    with pytest.raises(CheckpointError, match=r"_lr_scale is 7\.0, not 1\.0: resume it with"):
        mixes = dict(value_residual=True, embedding_residual=True)
        run_tiny(tmp_path / "x", ckpt_path_to_resume=path, **mixes)
    with pytest.raises(CheckpointError, match=r"_lr_scale is 1\.0, not 7\.0: resume it with"):
        none = str(checkpoint(tmp_path / "none", 5))
        run_tiny(tmp_path / "x", ckpt_path_to_resume=none, embedding_lr_scale=7.0)


def test_a_model_of_embedding_and_head_alone_is_refused():
    class Flat(nn.Sequential):
        pass

    model = Flat(nn.Embedding(64, 8), nn.Linear(8, 64))
    with pytest.raises(ConfigError, match=r"'muon': Flat has no matrix inside an nn\.ModuleL"):
        create_optimizer(model, tiny_config("unused", **MUON))


def test_tables_and_frozen_matrices_inside_blocks_are_not_muons():
    block = nn.ModuleDict(
        {"table": nn.Embedding(64, 8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    )
    block["b"].weight.requires_grad_(False)
    model = nn.Module()
    model.blocks = nn.ModuleList([block])
    groups = create_optimizer(model, tiny_config("unused", **MUON)).param_groups
    (muon,) = (g for g in groups if "momentum" in g)
    assert [p is block["a"].weight for p in muon["params"]] == [True]
    assert any(p is block["table"].weight for p in groups[0]["params"])


def test_one_schedule_for_both_rates():
    runner, cfg = made(muon_lr=0.05)
    assert isinstance(runner.optimizer, Muon)
    for step in (1, 5, 11):
        lr = learning_rate(step, cfg)
        runner.run(0, lr)
        rates = {"momentum" in g: g["lr"] for g in runner.optimizer.param_groups}
        assert rates == {False: lr, True: pytest.approx(lr * 0.05 / 3e-3)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_in_the_dtype_of_the_run(dtype):
    runner, _ = made(dtype=dtype)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert runner.optimizer.matmul_dtype == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, dtype):
    settings = dict(dtype=dtype, grad_accum=2, dropout=0.1, **MUON)
    run_tiny(tmp_path / "straight", ckpt_every=5, **settings)
    path = str(checkpoint(tmp_path / "straight", 5))
    run_tiny(tmp_path / "rest", ckpt_path_to_resume=path, **settings)
    assert same(state(checkpoint(tmp_path / "rest")), state(checkpoint(tmp_path / "straight")))
    straight = losses(tmp_path / "straight")
    assert losses(tmp_path / "rest") == {step: straight[step] for step in range(5, 12)}
    assert straight[11] < straight[0]
    optimizer = torch.load(path, weights_only=True)["optimizer_state"]
    assert sum("momentum_buffer" in entry for entry in optimizer["state"].values()) == 14


def test_another_optimizer_cannot_go_on(tmp_path):
    run_tiny(tmp_path / "muon", total_steps=2, **MUON)
    run_tiny(tmp_path / "adamw", total_steps=2)
    for was, becomes in (("muon", "adamw"), ("adamw", "muon")):
        path = str(checkpoint(tmp_path / was))
        expected = f"optimizer is '{was}', not {becomes}: resume it with --optimizer {was}, or"
        with pytest.raises(CheckpointError, match=expected):
            run_tiny(tmp_path / "x", ckpt_path_to_resume=path, optimizer=becomes)
    path = str(checkpoint(tmp_path / "adamw"))
    run_tiny(tmp_path / "new", init_from=path, total_steps=2, **MUON)  # its weights can
    # Of another program's checkpoint, which names no optimizer, AdamW's state is taken to be.
    payload = torch.load(checkpoint(tmp_path / "muon"), weights_only=True)
    del payload["config"]
    torch.save(payload, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="optimizer"):
        run_tiny(tmp_path / "y", ckpt_path_to_resume=str(tmp_path / "foreign.pt"))
    assert not (tmp_path / "x").exists() and not (tmp_path / "y").exists()


def test_a_setting_that_came_after_a_run_had_its_default(tmp_path):
    run_tiny(tmp_path, total_steps=2)
    payload = torch.load(checkpoint(tmp_path), weights_only=True)
    del payload["config"]["optimizer"], payload["config"]["embedding_lr_scale"]
    settings = Resumed.of(tmp_path / "old.pt", payload, frozenset()).settings
    assert (settings["optimizer"], settings["embedding_lr_scale"]) == ("adamw", 1.0)
    del payload["fastlm_version"]  # another program's says nothing of them
    assert "optimizer" not in Resumed.of(tmp_path / "old.pt", payload, frozenset()).settings


def test_weights_that_name_no_settings_have_no_qk_norm(tmp_path):
    run_tiny(tmp_path, total_steps=2)
    payload = torch.load(checkpoint(tmp_path), weights_only=True)
    del payload["config"]
    torch.save(payload, tmp_path / "foreign.pt")
    options = {"init_from": str(tmp_path / "foreign.pt"), "total_steps": 1}
    with pytest.raises(CheckpointError, match="qk_norm=False, not True; give --no-qk-norm"):
        run_tiny(tmp_path / "x", qk_norm=True, **options)
    run_tiny(tmp_path / "y", **options)


def test_a_changed_rate_takes_effect_on_resume(tmp_path):
    run_tiny(tmp_path, ckpt_every=5, **MUON)
    path = str(checkpoint(tmp_path, 5))
    cfg = run_tiny(
        tmp_path / "on", ckpt_path_to_resume=path, optimizer="muon", lr_max=1e-3, muon_lr=0.5,
        weight_decay=0.3,
    )  # fmt: skip
    groups = state(checkpoint(tmp_path / "on"))["optimizer_state"]["param_groups"]
    (muon,) = (g for g in groups if "momentum" in g)
    assert muon["lr"] == pytest.approx(learning_rate(11, cfg) * 500) and muon["weight_decay"] == 0.3
    assert metrics(tmp_path / "on", "train")[0]["lr"] == learning_rate(5, cfg)


def everything(runner):
    entries = runner.optimizer.state_dict()["state"].values()
    weights = [p.detach().clone() for p in runner.model.parameters()]
    return weights, [{key: value.clone() for key, value in entry.items()} for entry in entries]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_step_that_the_guard_leaves_out_changes_nothing(dtype):
    runner, _ = made(dtype=dtype)
    runner.run(0, 1e-3)
    assert bool(runner.good)
    before = everything(runner)
    runner.guard._ring.fill_(0.5)  # every loss is beyond the bound
    runner.run(4, 1e-3)
    assert not bool(runner.good) and runner.optimizer.last_grad_norm > 0
    assert same(everything(runner), before)
    runner.guard._ring.fill_(1e9)
    runner.run(8, 1e-3)
    assert bool(runner.good) and not same(everything(runner), before)


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch):
    clean = TrainStep.run

    def poisoned(self, first_sample, lr, stop=lambda: False):
        weight = self.model.layers[1].ffn.w2.weight
        hook = weight.register_hook(lambda g: g * float("nan")) if first_sample == 12 else None
        try:
            return clean(self, first_sample, lr, stop)
        finally:
            if hook is not None:
                hook.remove()

    monkeypatch.setattr(TrainStep, "run", poisoned)
    run_tiny(tmp_path, **MUON)
    (event,) = metrics(tmp_path, "guard")
    assert (event["step"], event["parameter"]) == (3, "layers.1.ffn.w2.weight")
    weights = torch.load(checkpoint(tmp_path), weights_only=True)["model_state"].values()
    assert all(w.isfinite().all() for w in weights)


def test_float16_overflow_is_skipped_and_lowers_the_scale():
    runner, _ = made(dtype="float16")
    runner.scaler.load_state_dict({**runner.scaler.state_dict(), "scale": 2.0**60})
    before = everything(runner)[0]
    runner.run(0, 1e-3)
    assert not bool(runner.good) and same(everything(runner)[0], before)
    assert runner.scaler.get_scale() == 2.0**59


def test_a_model_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = Plain()
    before = [p.detach().clone() for p in model.parameters()]
    train_loop(TRAIN, VAL, tiny_config(tmp_path, **MUON), model=model)
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_settings_that_are_refused():
    with pytest.raises(ConfigError, match="optimizer='sgd': it must be adamw, muon"):
        tiny_config("unused", optimizer="sgd")
    with pytest.raises(ConfigError, match="Muon needs whole matrices; use --parallel ddp"):
        tiny_config("unused", parallel="fsdp", **MUON)
    with pytest.raises(ConfigError, match="muon_lr=0"):
        tiny_config("unused", muon_lr=0.0)
    with pytest.raises(ConfigError, match="embedding_lr_scale=0"):
        tiny_config("unused", embedding_lr_scale=0.0)
    table_free = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match=r"embedding_lr_scale=3\.0: Linear has no nn\.Embedding"):
        create_optimizer(table_free, tiny_config("unused", embedding_lr_scale=3.0))
