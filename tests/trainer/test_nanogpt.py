"""README's and docs/nanogpt.md's patches, applied to nanoGPT's own files: the same training, eager,
compiled and resumed.

nanogpt.py in tests/helpers says where nanoGPT is looked for; without it everything here is skipped.
"""

import importlib.util
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from command_server import commands
from nanogpt import FILES, ROOT, nanogpt_folder, patched, shown_patches
from training_runs import VOCAB_SIZE, tokens

from fastlm import TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS, LINEAR_LOSS, OPTIMIZER, *PAGE = range(5)  # of shown_patches()
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=32)
RUN = dict(
    **SIZES, device="cpu", compile=False, dataset="tiny", batch_size=4, warmup_iters=2,
    gradient_accumulation_steps=2, learning_rate=1e-2, min_lr=1e-3, lr_decay_iters=20,
    grad_clip=0.5, eval_iters=2, eval_interval=10, max_iters=20, dtype="float32",
)  # fmt: skip


def write_nanogpt(directory: Path, *patches: int) -> Path:
    """nanoGPT with these patches, and data for it."""
    directory.mkdir(parents=True)
    for name in FILES:
        shutil.copy(nanogpt_folder() / name, directory)
    for index in patches:
        name, edits = shown_patches()[index]
        (directory / name).write_text(patched((directory / name).read_text(), edits))
    data = directory / "data" / "tiny"
    data.mkdir(parents=True)
    tokens(4000).tofile(data / "train.bin")
    tokens(500, seed=1).tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": VOCAB_SIZE}))
    return directory


def train(directory: Path, **settings) -> dict:
    """Runs its train.py; returns the checkpoint of step 20, the only one of the better losses."""
    argv = [f"--{name}={value}" for name, value in {**RUN, **settings}.items()]
    result = commands().run(argv, directory, call="nanogpt:train")
    assert result.returncode == 0, result.output
    return torch.load(directory / "out" / "ckpt.pt", weights_only=True)


def weights(checkpoint: dict) -> torch.Tensor:
    return torch.cat([tensor.flatten().double() for tensor in checkpoint["model"].values()])


def moments(checkpoint: dict) -> torch.Tensor:
    states = checkpoint["optimizer"]["state"].values()
    return torch.cat([state["exp_avg_sq"].flatten().double() for state in states])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_every_patch_is_shown_and_fits():
    names = [name for name, _ in shown_patches()]
    assert names == ["model.py", "model.py", "train.py", "model.py", "train.py"]
    for name, edits in shown_patches():
        source = (nanogpt_folder() / name).read_text()
        compile(patched(source, edits), name, "exec")


def test_the_pages_settings_are_those_of_both():
    page = (ROOT / "docs" / "nanogpt.md").read_text().split("\n## litgpt")[0]
    rows = re.findall(r"^\| (`.+?) \| (.*) \|$", page, re.M)
    rows = [row for row in rows if "--" in row[1]]
    flags = {
        flag.replace("-", "_") for _, right in rows for flag in re.findall(r"--([a-z-]+)", right)
    }
    assert len(flags) > 20 and flags <= {*TrainingConfig.__dataclass_fields__, "resume"}
    names = {name for left, _ in rows for name in re.findall(r"`(\w+)`", left)}
    source = (nanogpt_folder() / "train.py").read_text()
    assert names - set(re.findall(r"^(\w+) = ", source, re.MULTILINE)) == set()


def test_an_edit_that_fits_nowhere_is_an_error():
    source = "a = 1\nif a:\n    b = 2\n    c = 3\nd = 4\n"
    edits = "# at the top\nx = 1\n\n# delete: if a\n"
    assert patched(source, edits) == "x = 1\na = 1\nd = 4\n"
    edits = "# in place of: b =\nb = 5\n# after: c\ny = 0\nz = 0\n"
    expected = "a = 1\nif a:\n    b = 5\n    c = 3\n    y = 0\n    z = 0\nd = 4\n"
    assert patched(source, edits) == expected
    for wrong in ("# after: e\ne = 1", "# after: \nz = 1", "# instead of: a\na = 2"):
        with pytest.raises(ValueError, match="fits"):
            patched(source, wrong)


# --- the model's forward and backward ---


def models(directory: Path, *patches: int):
    """nanoGPT's GPT of the same weights, as it is and patched."""
    for name, chosen in (("stock", ()), ("patched", patches)):
        path = write_nanogpt(directory / name, *chosen) / "model.py"
        spec = importlib.util.spec_from_file_location(f"nanogpt_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        torch.manual_seed(0)
        yield module.GPT(module.GPTConfig(vocab_size=VOCAB_SIZE, dropout=0.0, **SIZES))


def training_losses(model, dtype: torch.dtype, forward=None) -> list[float]:
    """Losses of ten steps, a sixth of the targets -1."""
    forward = model if forward is None else forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.from_numpy(tokens(2000).astype(np.int64))
    losses = []
    for step in range(10):
        x = ids[step * 128 :][:128].view(4, 32)
        y = ids[step * 128 + 1 :][:128].view(4, 32).clone()
        y[:, ::6] = -1
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            _, loss = forward(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("patch", [LOSS, LINEAR_LOSS], ids=["loss", "linear loss"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_the_patched_losses_train_the_same(tmp_path, patch, dtype, tolerance, compiled):
    """Tied weights, targets of -1, and generation without targets."""
    stock, model = models(tmp_path, patch)
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = training_losses(stock, dtype)
    forward = torch.compile(model, fullgraph=True) if compiled else None
    assert training_losses(model, dtype, forward) == pytest.approx(expected, rel=tolerance)
    assert expected[-1] < expected[0] - 0.1
    logits, loss = model(torch.zeros(1, 5, dtype=torch.int64))
    assert logits.shape == (1, 1, VOCAB_SIZE) and loss is None


# --- the command ---


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """nanoGPT as it is, its run of 20 steps behind it."""
    directory = write_nanogpt(tmp_path_factory.mktemp("nanogpt") / "stock")
    train(directory)
    return directory


def saved(directory: Path) -> dict:
    return torch.load(directory / "out" / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize(
    "patches, settings",
    [
        ((LOSS,), {}),
        ((LOSS, OPTIMIZER), {}),
        (PAGE, {}),
        ((LINEAR_LOSS, OPTIMIZER), dict(dtype="float16")),  # the loss scaled, unscaled in the step
        pytest.param((LINEAR_LOSS, OPTIMIZER), dict(compile=True), marks=pytest.mark.exhaustive),
    ],
    ids=["loss", "loss and optimizer", "the page", "all, scaled", "all, compiled"],
)
def test_a_patched_run_is_the_stock_run(tmp_path, stock, patches, settings):
    own, expected = train(write_nanogpt(tmp_path / "own", *patches), **settings), saved(stock)
    assert own["iter_num"] == expected["iter_num"] == 20
    assert float(own["best_val_loss"]) == pytest.approx(float(expected["best_val_loss"]), rel=1e-4)
    assert distance(weights(own), weights(expected)) < 1e-4
    assert distance(moments(own), moments(expected)) < 1e-3


def test_clipping_clips(tmp_path, stock):
    """The run above must depend on it, or a patch that lost the clipping would pass."""
    free = train(write_nanogpt(tmp_path / "own", LOSS, OPTIMIZER), grad_clip=0.0)
    assert distance(moments(free), moments(saved(stock))) > 0.1


def test_either_resumes_the_others_checkpoint(tmp_path, stock):
    """20 steps of one, 10 of the other: nanoGPT draws the same batches again after a resume."""
    own = write_nanogpt(tmp_path / "own", LINEAR_LOSS, OPTIMIZER)
    train(own)
    for begun in (stock, own):
        resumed = []
        for directory in (stock, own):
            copy = shutil.copytree(directory, tmp_path / f"{begun.name}, {directory.name}")
            shutil.copy(begun / "out" / "ckpt.pt", copy / "out")
            resumed.append(train(copy, init_from="resume", max_iters=30))
        assert [checkpoint["iter_num"] for checkpoint in resumed] == [30, 30]
        assert distance(weights(resumed[1]), weights(resumed[0])) < 1e-4
        assert distance(moments(resumed[1]), moments(resumed[0])) < 1e-3
