"""Named starting points: the settings in which each differs from TrainingConfig's defaults."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # 1.9 M parameters, four minutes of training; the default. What two cores can compute in that
    # time is better spent on more tokens than on a wider model (bench/LOG.md, 2026-11-26).
    "demo": dict(
        batch_size=8,
        context_len=256,
        num_layers=4,
        num_heads=2,
        d_model=128,
        train_minutes=4.0,
        log_every=20,
        eval_every=200,
        ckpt_every=500,
        # bench/LOG.md, 2026-11-26: what these gain.
        qk_norm=True,
        optimizer="muon",
        lr_max=1.25e-2,
        lr_min=6e-4,
        embedding_lr_scale=4.0,
        warmup_iters=50,
    ),
    # The default on a CUDA device: the same data, Muon and QK norm, a model that a GPU can be seen
    # to work on. After about eight passes over the 2.3 M tokens the loss turned (bench/LOG.md).
    "demo-gpu": dict(
        batch_size=64,
        context_len=512,
        num_layers=8,
        num_heads=8,
        d_model=512,
        train_minutes=4.0,
        max_epochs=8.0,
        log_every=20,
        eval_every=100,
        ckpt_every=1000,
        qk_norm=True,
        optimizer="muon",
        lr_max=3e-3,
        lr_min=1.5e-4,
        warmup_iters=50,
        dropout=0.2,
    ),
    # The worked example of the training-loop notebook that TrainingConfig comes from.
    "notebook": dict(
        batch_size=16,
        context_len=256,
        num_layers=6,
        num_heads=8,
        d_model=512,
        total_steps=1000,
        log_every=20,
        eval_every=100,
        ckpt_every=250,
        lr_max=6e-4,
        lr_min=6e-5,
        warmup_iters=300,
        weight_decay=0.05,
    ),
    # GPT-2 124M's size and schedule (about 0.5 M tokens a step), with this model's architecture.
    "gpt2-124m": dict(
        batch_size=16,  # see _BY_MEMORY
        context_len=1024,
        tokens_per_step=524_288,
        vocab_size=50304,
        num_layers=12,
        num_heads=12,
        d_model=768,
        total_steps=19_073,
        log_every=10,
        eval_every=250,
        ckpt_every=1000,
        lr_max=6e-4,
        lr_min=6e-5,
        warmup_iters=700,
        tie_embeddings=True,
    ),
}

# By a GPU's memory, in GiB: windows of a micro-batch, the more the longer its kernels and the fewer
# its sums of gradients; and joint projections. By the memory that it has, not by what is free: a
# command means the same on the same machine every time. Each fits also where nothing is compiled:
# of gpt2-124m 4, 8, 16, 32 and 64 windows take 4.5, 6.5, 10, 18 and 31 GiB in bf16 by the doctor's
# estimate, of demo-gpu 64 take 9; compiled, 16 and 64 took 7.2 and 23 (bench/LOG.md, 2026-11-27).
_BY_MEMORY = {
    "gpt2-124m": (
        (36, {"batch_size": 64, "joint_projections": True}),
        (21, {"batch_size": 32}),
        (11, {"batch_size": 16}),
        (7, {"batch_size": 8}),
        (0, {"batch_size": 4}),
    ),
    "demo-gpu": ((11, {}), (0, {"batch_size": 32, "tokens_per_step": 32_768})),
}


def preset_settings(name: str, memory_bytes: int = 0, processes: int = 1) -> dict[str, Any]:
    """The settings of preset `name` on GPUs with so much memory; 0: elsewhere. KeyError: there is
    no such preset.

    A step has the same windows everywhere. If it has a number of tokens, the micro-batch is halved
    until the processes' divide it.
    """
    settings = PRESETS[name]
    if not memory_bytes or name not in _BY_MEMORY:
        return settings
    chosen = next(more for gib, more in _BY_MEMORY[name] if memory_bytes >= gib << 30)
    settings = {**settings, **chosen}
    if "tokens_per_step" in settings:
        windows = settings["tokens_per_step"] // settings["context_len"]
        sizes = [settings["batch_size"] >> halvings for halvings in range(7)]
        sizes = [size for size in sizes if size and windows % (size * processes) == 0]
        settings["batch_size"] = sizes[0] if sizes else settings["batch_size"]
    return settings
