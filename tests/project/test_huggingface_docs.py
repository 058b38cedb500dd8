"""docs/huggingface.md: its code runs, and the loops of others train as a loop without them does."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastlm
from fastlm.export import export

PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SIZES = dict(d_model=32, num_heads=4, num_layers=2, max_seq_len=64, num_kv_heads=2)


def block(words: str) -> str:
    (found,) = [b for b in BLOCKS if words in b]
    return found


def run(*blocks: str) -> dict:
    names: dict = {}
    for text in blocks:
        exec(compile(text, "docs/huggingface.md", "exec"), names)
    return names


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with what the page names: a model, small as it is, and tokens."""
    torch.manual_seed(0)
    export(fastlm.TransformerLM(vocab_size=61, **SIZES), tmp_path / "SmolLM2-135M")
    tokens = np.random.default_rng(0).integers(0, 61, 2000).astype(np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    monkeypatch.chdir(tmp_path)


def expected_losses(seed_first) -> torch.Tensor:
    """The accelerate and Fabric examples without them."""
    seed_first()
    model = fastlm.from_pretrained("SmolLM2-135M").train()
    optimizer = fastlm.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    data, losses = fastlm.load_token_dataset("train.bin"), []
    for micro_batch in range(8):
        x, y = fastlm.get_batch(data, batch_size=4, context_len=32, device="cpu")
        loss = fastlm.cross_entropy_loss(model(x), y)
        (loss / 4).backward()
        if micro_batch % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def test_models(here):
    names = run(block("print(model.config)"), block("from_config"))
    assert names["model"].config == names["config"]


def test_the_trainer(here):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from fastlm.integrations.transformers import restore

    try:
        names = run(block("Trainer("))
    finally:
        restore()
    history = names["trainer"].state.log_history
    assert [row["loss"] > 3 for row in history if "loss" in row] == [True, True]
    assert names["trainer"].optimizer.optimizer.last_grad_norm > 0


def test_accelerate(here):
    pytest.importorskip("accelerate")
    from accelerate.utils import set_seed

    losses = torch.stack(run(block("Accelerator("))["losses"]).cpu()
    expected = expected_losses(lambda: set_seed(0, device_specific=True))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_fabric(here):
    pytest.importorskip("lightning.fabric")
    losses = torch.stack(run(block("Fabric("))["losses"])
    expected = expected_losses(lambda: torch.manual_seed(0))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_the_commands_and_files_it_names_exist():
    root = Path(__file__).parents[2]
    assert set(re.findall(r"python -m fastlm\.(\w+)", PAGE)) == {
        "prepare",
        "train",
        "export",
        "generate",
    }
    assert all((root / path).exists() for path in re.findall(r"`(tests/[\w/.]+)`", PAGE))
