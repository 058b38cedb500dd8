"""Tiny runs for the tests: settings, token files, and what a run wrote."""

import json
from pathlib import Path

import numpy as np

VOCAB_SIZE = 64
# A step of this model takes a millisecond or two.
TINY = dict(
    vocab_size=VOCAB_SIZE,
    d_model=32,
    num_heads=2,
    num_layers=2,
    context_len=32,
    batch_size=4,
    total_steps=12,
    warmup_iters=2,
    log_every=1,
    eval_every=0,
    eval_batches=2,
    ckpt_every=0,
    keep_last=0,
    dtype="float32",
    device="cpu",
    # Not the preset's, which the command takes where nothing is said.
    optimizer="adamw",
    qk_norm=False,
    embedding_lr_scale=1.0,
)


def tiny_config(target_dir, **settings):
    """TrainingConfig of a tiny run."""
    from fastlm.config import TrainingConfig

    return TrainingConfig(target_dir=str(target_dir), **{**TINY, **settings})


def flags(**settings) -> list[str]:
    """Command-line flags: a_b=1 is --a-b 1, True --a-b, False --no-a-b, None leaves one out."""
    result = []
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True or value is False:
            result.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(value, list | tuple):
            result += [flag, *map(str, value)]
        elif value is not None:
            result += [flag, str(value)]
    return result


def tiny_flags(**settings) -> list[str]:
    """The flags of a tiny run on the files of write_tokens, into run/."""
    files = {"data": "train.npy", "val_data": "val.npy", "target_dir": "run"}
    return flags(**{**TINY, **files, **settings})


def tokens(count: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> np.ndarray:
    """(count,) uint16 ids that a model can learn: mostly, a token follows from the one before."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, vocab_size, count)
    ids = np.empty(count, dtype=np.uint16)
    ids[0] = 0
    for i in range(1, count):
        ids[i] = (5 * int(ids[i - 1]) + 3) % vocab_size if i % 4 else noise[i]
    return ids


def write_tokens(directory: Path, train: int = 4000, val: int = 500) -> None:
    """train.npy and val.npy."""
    np.save(directory / "train.npy", tokens(train))
    np.save(directory / "val.npy", tokens(val, seed=1))


def write_prepared(directory: Path) -> Path:
    """A prepared directory: a tokenizer, token files and their manifest."""
    from prepared_data import seal

    from fastlm.data.manifest import Manifest, Shard, Split
    from fastlm.data.tokenizer import train_tokenizer

    directory.mkdir(parents=True)
    texts = {
        "train": "def f(x):\n    return x + 1\n\n" * 100,
        "val": "def g(y):\n    return y + 2\n\n" * 8,
    }
    tokenizer = train_tokenizer([texts["train"]], 270)
    tokenizer.save(str(directory / "tokenizer.json"))
    splits = {}
    for name, text in texts.items():
        ids = np.array([*tokenizer.encode(text).ids, 0], dtype="<u2")
        ids.tofile(directory / f"{name}_00000.bin")
        shard = Shard(f"{name}_00000.bin", len(ids), "")
        splits[name] = Split(len(ids), len(text.encode()), 1, [shard])
    manifest = Manifest(
        vocab_size=tokenizer.get_vocab_size(),
        dtype="uint16",
        splits=splits,
        tokenizer="tokenizer.json",
        end_of_text=0,
    )
    seal(directory, manifest)
    return directory


def listing(directory: Path) -> dict[str, bytes | None]:
    """Every path below `directory`, and what the files hold."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in sorted(directory.rglob("*"))
    }


def metrics(target_dir: Path, event: str) -> list[dict]:
    """The lines of one kind in a run's metrics.jsonl."""
    lines = (Path(target_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def losses(target_dir: Path) -> dict[int, float]:
    """step -> training loss; of a step that ran twice, the last one."""
    return {row["step"]: row["loss"] for row in metrics(target_dir, "train")}


def same(a, b) -> bool:
    """Are two nested structures of tensors and plain values equal, bit for bit?"""
    import torch

    if isinstance(a, torch.Tensor):
        return (
            isinstance(b, torch.Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and a.numpy().tobytes() == b.numpy().tobytes()
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def state(checkpoint: Path) -> dict:
    """What training goes on from: all of a checkpoint that does not tell how the run was asked."""
    import torch

    payload = torch.load(checkpoint, weights_only=True)
    return {
        name: payload[name] for name in ("model_state", "optimizer_state", "iteration", "scaler")
    }
