"""TrainingConfig: the seeds' fields and defaults, what follows from what, and refusals."""

import os
from dataclasses import fields, replace

import numpy as np
import pytest

from fastlm import ConfigError, TrainingConfig
from fastlm.presets import PRESETS, preset_settings
from fastlm.run.cli import parse
from fastlm.schedule import learning_rate

# TrainingConfig of the functions notebook; its device="cuda" is "auto" here.
NOTEBOOK_DEFAULTS = dict(
    batch_size=32,
    context_len=256,
    vocab_size=10000,
    num_layers=12,
    num_heads=16,
    d_model=1024,
    d_ff=2752,  # None there, derived in __post_init__
    rope_theta=10000.0,
    total_steps=10_000,
    log_every=50,
    eval_every=500,
    ckpt_every=1000,
    lr_max=3e-4,
    lr_min=3e-5,
    betas=(0.9, 0.95),
    eps=1e-8,
    weight_decay=0.1,
    grad_clip_norm=1.0,
    warmup_iters=200,
    cosine_iters=10000,
    device="auto",
    target_dir="./TrainLoopFiles",
    ckpt_dir="./TrainLoopFiles/checkpoints",
    ckpt_save_prefix="checkpoint",
    log_dir="./TrainLoopFiles/logs",
    log_save_prefix="train",
    ckpt_path_to_resume=None,
)


def notebook_d_ff(d_model: int) -> int:
    """As it stands in the notebook."""
    multiple = 64
    raw_dff = int((8 / 3) * d_model)
    return multiple * ((raw_dff + multiple - 1) // multiple)


def test_the_defaults_are_the_notebooks():
    cfg = TrainingConfig()
    assert {name: getattr(cfg, name) for name in NOTEBOOK_DEFAULTS} == NOTEBOOK_DEFAULTS


def test_the_cosine_ends_with_the_run_unless_it_is_told_to_end_elsewhere():
    cfg = TrainingConfig(total_steps=1000)
    assert cfg.cosine_iters == 1000 and learning_rate(999, cfg) < 1.01 * cfg.lr_min
    assert TrainingConfig(total_steps=1000, cosine_iters=10_000).cosine_iters == 10_000
    assert replace(cfg, total_steps=2000, cosine_iters=None).cosine_iters == 2000
    assert replace(cfg, seed=1).cosine_iters == 1000
    # Where the calibration chooses the steps, it follows them.
    assert TrainingConfig(train_minutes=1.0).cosine_iters is None


def test_what_is_new_changes_nothing_of_the_notebooks_run():
    """But for keep_last: of its numbered checkpoints the last three stay, and the best."""
    cfg = TrainingConfig()
    new = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in NOTEBOOK_DEFAULTS}
    assert new == dict(
        data=(), val_data=(), data_dtype=None, grad_accum=1, tie_embeddings=False, dropout=0.0,
        train_minutes=None, max_epochs=None, max_minutes=None, eval_batches=20,
        weight_decay_all=False, schedule="cosine", dtype="auto", compile=False,
        activation_checkpointing=False, seed=0,
        init_from=None, eval_only=False, overwrite=False,
        final_eval_tokens=10_000_000,
        ckpt_minutes=None, keep_last=3, sync_save=False,
        allow_data_change=False, deterministic=False, guard="skip",
        compile_scope=None, profile=None,
        tokens_per_step=None, parallel="ddp", fsdp_reshard=True,
        optimizer="adamw", muon_lr=0.02, embedding_lr_scale=1.0, qk_norm=False,
        qk_norm_weight=False, value_residual=False, embedding_residual=False,
        num_kv_heads=None, head_dim=None, rope_scaling=None, norm_eps=1e-5, qkv_bias=False,
        tf32=True, residual_dtype="auto", attention="auto", compile_mode="default",
        prefetch=True, fp8_head=False, joint_projections=False,
        doc_mask=False, track=(), sample_every=0,
    )  # fmt: skip


def test_d_ff_follows_d_model():
    for d_model in (*range(2, 2000, 6), 4096, 5120, 8192):
        assert TrainingConfig.cal_d_ff(d_model) == notebook_d_ff(d_model)
    assert TrainingConfig(d_model=512).d_ff == 1408
    assert TrainingConfig(d_model=512, d_ff=100).d_ff == 100
    assert TrainingConfig().cal_d_ff(96) == 256  # from an instance too, as the notebook allows


def test_directories_follow_target_dir():
    cfg = TrainingConfig(target_dir="here")
    assert cfg.ckpt_dir == os.path.join("here", "checkpoints")
    assert cfg.log_dir == os.path.join("here", "logs")
    cfg = TrainingConfig(ckpt_dir="./TrainLoopFiles/test")
    assert cfg.ckpt_dir == "./TrainLoopFiles/test"
    assert cfg.log_dir == os.path.join("./TrainLoopFiles", "logs")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_are_valid(preset):
    known = {f.name for f in fields(TrainingConfig)}
    assert set(PRESETS[preset]) <= known
    TrainingConfig(**PRESETS[preset])


def test_the_notebook_preset_is_its_worked_example():
    cfg = TrainingConfig(**PRESETS["notebook"])
    expected = dict(
        batch_size=16, context_len=256, total_steps=1000, log_every=20, eval_every=100,
        ckpt_every=250, lr_max=6e-4, lr_min=6e-5, warmup_iters=300, weight_decay=0.05,
        grad_clip_norm=1.0, vocab_size=10000, num_layers=6, d_model=512, num_heads=8, d_ff=1408,
    )  # fmt: skip
    assert {name: getattr(cfg, name) for name in expected} == expected


@pytest.mark.parametrize(
    "gib, processes, batch_size, grad_accum",
    [
        (80, 1, 64, 8), (80, 2, 64, 4), (80, 8, 64, 1), (80, 16, 32, 1), (80, 64, 8, 1),
        (39.4, 1, 64, 8), (23.6, 1, 32, 16), (14.6, 1, 16, 32), (8, 1, 8, 64), (6, 1, 4, 128),
    ],
)  # fmt: skip
def test_the_memory_decides_the_pieces_of_gpt2s_step(gib, processes, batch_size, grad_accum):
    settings = preset_settings("gpt2-124m", int(gib * 2**30), processes)
    cfg = TrainingConfig(**settings).accumulated(processes)
    assert (cfg.batch_size, cfg.grad_accum) == (batch_size, grad_accum)
    assert cfg.joint_projections == (gib > 36)
    assert cfg.batch_size * cfg.grad_accum * processes * cfg.context_len == 524_288


def test_the_memory_decides_the_pieces_of_the_demos_step():
    for gib, pieces in ((80, (64, 1)), (11, (64, 1)), (10, (32, 2))):
        cfg = TrainingConfig(**preset_settings("demo-gpu", gib << 30)).accumulated(1)
        assert (cfg.batch_size, cfg.grad_accum) == pieces
    for name in PRESETS:
        assert preset_settings(name) == PRESETS[name]
    assert preset_settings("notebook", 80 << 30) == PRESETS["notebook"]


def test_the_devices_memory_decides_gpt2s_batch(monkeypatch):
    def batch(*more):
        cfg = parse(["--preset", "gpt2-124m", *more]).config
        return cfg.batch_size, cfg.accumulated(1).grad_accum

    assert batch() == (16, 32)
    monkeypatch.setattr("fastlm.run.cli.device_memory", lambda device: 40 << 30)
    monkeypatch.setattr("fastlm.run.cli.has_fast_bfloat16", lambda device: False)
    assert batch() == (16, 32)
    monkeypatch.setattr("fastlm.run.cli.has_fast_bfloat16", lambda device: True)
    assert batch() == (64, 8)
    assert batch("--dtype", "float32") == (16, 32)
    assert batch("--batch-size", "32") == (32, 16)  # the step keeps its tokens
    assert batch("--grad-accum", "2") == (64, 2)


def test_the_gpt2_preset_is_gpt2s_size():
    from fastlm.model import TransformerLM, count_parameters

    cfg = TrainingConfig(**PRESETS["gpt2-124m"]).accumulated(1)
    assert (cfg.num_layers, cfg.num_heads, cfg.d_model, cfg.context_len) == (12, 12, 768, 1024)
    assert (cfg.batch_size, cfg.grad_accum) == (16, 32)
    assert cfg.batch_size * cfg.grad_accum * cfg.context_len == 524_288
    import torch

    with torch.device("meta"):
        model = TransformerLM(
            cfg.vocab_size, cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.context_len,
            tie_embeddings=cfg.tie_embeddings,
        )  # fmt: skip
    assert 120e6 < count_parameters(model) < 128e6


POSITIVE = [
    "batch_size",
    "context_len",
    "grad_accum",
    "vocab_size",
    "num_layers",
    "num_heads",
    "d_model",
    "d_ff",
    "total_steps",
    "log_every",
    "eval_batches",
    "lr_max",
    "eps",
    "rope_theta",
    "train_minutes",
    "max_minutes",
    "ckpt_minutes",
]
NOT_NEGATIVE = [
    "eval_every",
    "ckpt_every",
    "keep_last",
    "lr_min",
    "weight_decay",
    "grad_clip_norm",
    "warmup_iters",
    "seed",
]


@pytest.mark.parametrize("name", POSITIVE)
def test_settings_that_must_be_positive(name):
    not_a_number = () if name == "d_model" else (float("nan"),)  # no width follows from that one
    for value in (0, -1, *not_a_number):
        with pytest.raises(ConfigError, match=rf"^{name}={value}: it must be positive"):
            TrainingConfig(**{name: value})


@pytest.mark.parametrize("name", NOT_NEGATIVE)
def test_settings_that_must_not_be_negative(name):
    for value in (-1, float("nan")):
        with pytest.raises(ConfigError, match=rf"^{name}={value}: it must not be negative"):
            TrainingConfig(**{name: value})
    TrainingConfig(**{name: 0})


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(betas=(0.9, 1.0)), r"betas=\(0\.9, 1\.0\): both must lie in \[0, 1\)"),
        (dict(betas=(-0.1, 0.9)), r"betas=\(-0\.1, 0\.9\)"),
        (dict(dropout=1.0), r"dropout=1\.0: it must lie in \[0, 1\)"),
        (dict(dropout=-0.1), r"dropout=-0\.1"),
        (dict(lr_min=1e-3), r"lr_min=0\.001: it must not be above lr_max=0\.0003"),
        (dict(schedule="linear"), r"schedule='linear': it must be cosine, wsd"),
        (dict(dtype="fp8"), r"dtype='fp8': it must be auto, float32, bfloat16, float16"),
        (dict(num_heads=3), r"d_model=1024 is not divisible by num_heads=3"),
        (dict(d_model=48, num_heads=16), r"num_heads=16 gives heads of 3; .* even"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=f"^{message}" if "heads of" not in message else message):
        TrainingConfig(**settings)


def test_a_config_error_is_a_value_error_in_one_line():
    with pytest.raises(ValueError) as caught:
        TrainingConfig(num_heads=7)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(seed=2**64), r"seed=18446744073709551616: it must be below 2\^64"),
        (dict(batch_size=2**63), r"batch_size=\d+: it must be below 2\^63"),
        (
            dict(d_model=16**5000),
            r"d_model=a number of thousands of digits: it must be below 2\^24",
        ),
        (dict(batch_size=2**40, context_len=2**20), r"must have less than 2\^56 tokens"),
        (dict(lr_max=float("inf")), "lr_max=inf: it must be finite"),
        (dict(target_dir="a\0b"), r"target_dir='a\\x00b': holds a character that no path can have"),
        (dict(data=("a", "\ud800")), "data=.*: holds a character that no path can have"),
        (dict(target_dir=""), "target_dir='': it must name a path"),
        (dict(ckpt_save_prefix="a/b"), "ckpt_save_prefix='a/b': it must be the beginning"),
        (dict(log_save_prefix="a\\b"), "log_save_prefix=.*: it must be the beginning"),
        (dict(log_save_prefix=""), "log_save_prefix='': it must be the beginning"),
        (dict(ckpt_save_prefix="x" * 201), "ckpt_save_prefix='x+…: it must be the beginning"),
    ],
)
def test_values_beyond_what_can_be_meant(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        TrainingConfig(**settings)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_values_at_the_edge():
    TrainingConfig(seed=2**64 - 1, ckpt_save_prefix="é" * 100, total_steps=2**63 - 1)


def test_numpys_numbers_become_plain():
    """No log and no checkpoint takes them."""
    cfg = TrainingConfig(
        lr_max=np.logspace(-3, -2, 2)[0], total_steps=np.int64(4), seed=np.int64(3),
        betas=[np.float32(0.5), 0.75], compile=np.bool_(True), eps=np.array(1e-6),
    )  # fmt: skip
    assert (cfg.lr_max, cfg.total_steps, cfg.cosine_iters, cfg.seed) == (1e-3, 4, 4, 3)
    kinds = [type(v) for v in (cfg.lr_max, cfg.total_steps, cfg.seed, *cfg.betas, cfg.compile)]
    assert kinds == [float, int, int, float, float, bool] and cfg.betas == (0.5, 0.75)
    assert type(cfg.eps) is float and cfg.eps == 1e-6
