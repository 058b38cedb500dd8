"""train_loop with a model of the caller's own: losses, checkpoints, and what the commands say."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from command_server import commands
from in_process import TRAIN, VAL, checkpoint
from own_models import Counting, Fused, Plain
from training_runs import VOCAB_SIZE, flags, losses, metrics, same, state, tiny_config

from fastlm import (
    CheckpointError,
    TransformerLM,
    evaluate_model_loss,
    load_checkpoint,
    train_loop,
)
from fastlm.data.loader import TrainLoader
from fastlm.generate import load_model
from fastlm.schedule import learning_rate

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def made(kind=Plain, seed=0, **settings):
    torch.manual_seed(seed)
    return kind(**settings)


def plain_losses(model, cfg) -> list[float]:
    """The run's losses by torch alone: its AdamW, its clipping, its cross-entropy."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=cfg.betas, eps=cfg.eps)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=cfg.seed)
    result = []
    for step in range(cfg.total_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        total = 0.0
        for micro in range(cfg.grad_accum):
            x, y = loader.batch((step * cfg.grad_accum + micro) * cfg.batch_size)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / cfg.grad_accum
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, cfg.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        result.append(total)
    return result


def no_tokens_trained():
    model = made(Fused)
    model.tokens.weight.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: made(Plain),
        lambda: made(Fused),
        lambda: made(Plain, tied=True, bias=False),
        lambda: made(Fused, tied=True),
        no_tokens_trained,
    ],
    ids=["logits", "fused", "tied-logits", "tied-fused", "partly-frozen"],
)
@pytest.mark.parametrize("grad_accum", [1, 3])
def test_losses_are_those_of_a_loop_of_torch_alone(tmp_path, make, grad_accum):
    cfg = tiny_config(tmp_path, grad_accum=grad_accum, lr_max=3e-3, lr_min=1e-3)
    model = make()
    assert train_loop(TRAIN, VAL, cfg, model=model) is model
    expected, got = plain_losses(make(), cfg), list(losses(tmp_path).values())
    assert got == pytest.approx(expected, rel=1e-5)
    assert got[-1] < got[0] - 0.1
    if not model.tokens.weight.requires_grad:
        assert torch.equal(model.tokens.weight, make().tokens.weight)


@pytest.mark.parametrize("kind", [Plain, Fused, Counting])
def test_resumed_it_ends_bit_for_bit_as_undisturbed(tmp_path, kind):
    settings = dict(total_steps=6, ckpt_every=3, cosine_iters=6)
    whole = tiny_config(tmp_path / "whole", **settings)
    train_loop(TRAIN, VAL, whole, model=made(kind, dropout=0.3, tied=True))
    again = tiny_config(
        tmp_path / "again",
        ckpt_path_to_resume=str(checkpoint(tmp_path / "whole", "3")),
        **settings,
    )
    other = made(kind, seed=5, dropout=0.3, tied=True)
    train_loop(TRAIN, VAL, again, model=other)
    assert same(state(checkpoint(tmp_path / "whole")), state(checkpoint(tmp_path / "again")))
    assert other.out.weight is other.tokens.weight
    if kind is Counting:  # the warm-ups, which run the same steps, are not counted
        assert other.norm.num_batches_tracked == 6 and other.seen == 6 * 4 * 32


def test_what_the_run_says_writes_and_evaluates(tmp_path, capsys):
    cfg = tiny_config(tmp_path, eval_every=4)
    model = train_loop(TRAIN, VAL, cfg, model=made(Fused))
    said = capsys.readouterr().out
    assert re.search(r"model: 0\.00 M parameters \(own_models\.Fused, head and loss in one\)", said)
    assert "attention not counted" in said
    assert "try it" not in said  # python -m fastlm.generate cannot make this model
    assert model.training
    (summary,) = metrics(tmp_path, "summary")
    assert math.isfinite(summary["val_loss"]) and summary["mfu"] > 0
    val = metrics(tmp_path, "val")
    assert val[-1]["val_loss"] == pytest.approx(
        evaluate_model_loss(model, VAL, cfg, cfg.eval_batches), rel=1e-5
    )
    payload = torch.load(checkpoint(tmp_path, "model"), weights_only=True)
    assert payload["model_class"] == "own_models.Fused"
    fresh = made(Fused, seed=7)
    assert load_checkpoint(fresh, None, checkpoint(tmp_path, "model")) == cfg.total_steps
    assert same(dict(fresh.state_dict()), dict(model.state_dict()))

    only = tiny_config(
        tmp_path, eval_only=True, final_eval_tokens=0,
        init_from=str(checkpoint(tmp_path, "model")),
    )  # fmt: skip
    evaluated = train_loop(TRAIN, VAL, only, model=made(Fused, seed=9))
    assert same(dict(evaluated.state_dict()), dict(model.state_dict()))
    assert f"val_loss {summary['val_loss']:.4f}" in capsys.readouterr().out


def test_the_weights_start_another_run(tmp_path):
    first = train_loop(TRAIN, VAL, tiny_config(tmp_path / "a", total_steps=3), model=made(Plain))
    weights = str(checkpoint(tmp_path / "a", "model"))
    cfg = tiny_config(tmp_path / "b", total_steps=1, init_from=weights, lr_max=1e-9, lr_min=0.0)
    second = train_loop(TRAIN, VAL, cfg, model=made(Plain, seed=3))
    torch.testing.assert_close(dict(second.state_dict()), dict(first.state_dict()))
    with pytest.raises(CheckpointError, match="of another architecture"):
        train_loop(TRAIN, VAL, cfg, model=made(Plain, width=8))


def test_commands_say_that_the_model_is_not_theirs(tmp_path):
    train_loop(TRAIN, VAL, tiny_config(tmp_path / "run"), model=made(Plain))
    path = checkpoint(tmp_path / "run")
    said = r"own_models\.Plain', no TransformerLM; give that model: train_loop\(…, model=…\)"
    with pytest.raises(CheckpointError, match=said):
        load_model(path, "cpu")
    import numpy as np

    for name, data in (("train", TRAIN), ("val", VAL)):
        np.save(tmp_path / f"{name}.npy", data)
    files = dict(data="train.npy", val_data="val.npy", device="cpu", dtype="float32")
    for given in (
        dict(resume=path),
        dict(resume=path, eval_only=True),
        dict(init_from=path, target_dir="new", vocab_size=VOCAB_SIZE, context_len=32),
    ):
        result = commands().run(flags(**files, **given), tmp_path)
        assert result.returncode == 2, result.output
        assert re.search(said, result.stderr) and result.stderr.count("\n") == 1, result.stderr


def test_a_transformer_handed_over_is_like_one_made_by_the_run(tmp_path):
    def run(name, **options):
        cfg = tiny_config(tmp_path / name, total_steps=3)
        return train_loop(TRAIN, VAL, cfg, **options)

    run("made")
    torch.manual_seed(0)
    run("given", model=TransformerLM(VOCAB_SIZE, 32, 2, 2, 32))
    assert same(*(state(checkpoint(tmp_path / name))["model_state"] for name in ("made", "given")))
    model, payload = load_model(checkpoint(tmp_path / "given"), "cpu")
    assert "model_class" not in payload and not model.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", [Plain, Fused])
def test_in_16_bits_it_learns_about_the_same(tmp_path, kind, dtype):
    got = {}
    for name in ("float32", dtype):
        cfg = tiny_config(tmp_path / name, dtype=name, lr_max=3e-3, lr_min=1e-3)
        train_loop(TRAIN, VAL, cfg, model=made(kind))
        got[name] = list(losses(tmp_path / name).values())
    assert got[dtype] == pytest.approx(got["float32"], rel=0.02)
    assert got[dtype] != got["float32"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("scope", ["model", "block"])
@pytest.mark.parametrize("kind", [Plain, Fused, None])
def test_compiled_by_model_or_by_block_losses_are_the_same(tmp_path, kind, scope):
    def run(name, **settings):
        cfg = tiny_config(tmp_path / name, eval_every=4, **settings)
        model = train_loop(TRAIN, VAL, cfg, model=None if kind is None else made(kind))
        return list(model.state_dict()), list(losses(tmp_path / name).values())

    torch._dynamo.reset()
    names, expected = run("eager")
    compiled_names, got = run("compiled", compile=True, compile_scope=scope)
    assert got == pytest.approx(expected, rel=1e-5) and compiled_names == names
    (summary,) = metrics(tmp_path / "compiled", "summary")
    assert summary["recompiles"] == 0 and summary["compile_seconds"] > 0


class Looking(Plain):
    """Its outputs are of all tokens, the later ones among them."""

    def forward(self, x):
        logits = super().forward(x)
        return logits + logits.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("kind, told", [(Plain, False), (Fused, False), (Looking, True)])
def test_a_model_that_sees_later_tokens_is_told(tmp_path, capsys, kind, told):
    cfg = tiny_config(tmp_path / "run", total_steps=2)
    train_loop(TRAIN, VAL, cfg, model=made(kind))
    assert ("note: the model's outputs change with later tokens" in capsys.readouterr().out) is told
