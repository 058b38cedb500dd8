"""--init-from: a checkpoint's or a directory of transformers' weights, with their architecture."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_server import commands
from in_process import checkpoint
from training_runs import VOCAB_SIZE, flags, losses, write_tokens

import fastlm
from fastlm import ConfigError
from fastlm.data.loader import TrainLoader
from fastlm.data.text import find_text_files
from fastlm.data.tokenizer import train_tokenizer
from fastlm.export import export
from fastlm.prepare import prepare
from fastlm.run.cli import parse
from fastlm.train import main

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")

TEXT = "def f(x):\n    return x + 1\n\n" * 300
ARCHITECTURE = dict(
    d_model=32, num_heads=4, num_layers=2, num_kv_heads=2, head_dim=16, qkv_bias=True,
    norm_eps=1e-6, rope_theta=5e5, tie_embeddings=True,
)  # fmt: skip
# Nothing of the architecture: the preset's is another.
RUN = dict(
    context_len=32, batch_size=4, total_steps=3, log_every=1, eval_every=0, ckpt_every=0,
    warmup_iters=0, device="cpu", dtype="float32", optimizer="adamw", target_dir="run",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """model/, data/ prepared with its tokenizer, and other/ with another; train.npy and val.npy."""
    directory = tmp_path_factory.mktemp("place")
    (directory / "text").mkdir()
    for n in range(8):
        (directory / "text" / f"{n}.txt").write_text(TEXT[: 4000 + 100 * n])
    tokenizer = train_tokenizer([TEXT], 270).to_str()
    torch.manual_seed(0)
    model = fastlm.TransformerLM(
        vocab_size=280, max_seq_len=64, **ARCHITECTURE
    )  # padded, as published models often are
    export(model, directory / "model", tokenizer=tokenizer, file_bytes=20_000)
    files, quiet = find_text_files((str(directory / "text"),)), lambda line: None
    own = directory / "model" / "tokenizer.json"
    prepare(files, directory / "data", tokenizer=own, val_fraction=0.3, log=quiet)
    prepare(files, directory / "other", vocab_size=265, val_fraction=0.3, log=quiet)
    write_tokens(directory)
    return directory


def train(place: Path, *, code: int = 0, **settings):
    result = commands().run(flags(**{**RUN, "data": "data", **settings}), place)
    assert result.returncode == code, result.output
    return result


def test_a_directory_of_transformers_is_trained_on(place):
    result = train(place, init_from="model", target_dir="on")
    assert "[init] weights of model" in result.stdout and "[init] changed" not in result.stdout
    assert "2 layers, d_model 32, 4 heads (2 of keys), vocabulary 280" in result.stdout
    model = fastlm.from_pretrained(place / "model")
    data = fastlm.load_token_dataset(place / "data" / "train_00000.bin")
    x, y = TrainLoader(data, 4, 32, seed=0).batch(0)
    with torch.no_grad():
        loss = fastlm.cross_entropy_loss(model(x), y)
    assert losses(place / "on")[0] == pytest.approx(loss.item(), rel=1e-5)

    # The checkpoints need the directory no more, and stand for the model again.
    result = train(place, resume="on", total_steps=5, data="data", target_dir=None)
    assert sorted(losses(place / "on")) == [0, 1, 2, 3, 4]
    final = fastlm.from_pretrained(place / "on")
    assert final.config == replace(model.config, max_seq_len=32)
    assert not torch.equal(final.lm_head.weight, model.lm_head.weight)
    result = train(place, init_from=checkpoint("on", "model"), target_dir="third", total_steps=1)
    with torch.no_grad():
        loss = fastlm.cross_entropy_loss(final(x), y)
    assert losses(place / "third")[0] == pytest.approx(loss.item(), rel=1e-5)


def test_flags_go_before_the_architecture_and_are_told(place):
    result = train(place, init_from="model", target_dir="theta", rope_theta=1e6, context_len=96)
    assert "[init] changed: rope_theta: 500000.0 -> 1000000.0" in result.stdout
    result = train(place, init_from="model", code=2, d_ff=64)
    assert "of another architecture" in result.stderr
    printed = train(place, init_from="model", print_config=True, num_heads=2).stdout
    assert re.search(r"^num_kv_heads = 2 +# checkpoint of --init-from$", printed, re.MULTILINE)
    assert re.search(r"^num_heads = 2 +# command line$", printed, re.MULTILINE)
    assert re.search(r"^context_len = 32 +# command line$", printed, re.MULTILINE)


def test_data_of_another_tokenizer_is_refused(place):
    for start in ("model", "on/checkpoints/checkpoint_model.pt"):
        if start.startswith("on") and not (place / "on").exists():
            train(place, init_from="model", target_dir="on")
        result = train(place, init_from=start, data="other", code=2)
        assert re.search(
            r"its tokenizer is not the data's: id \d+ is '.+' there and '.+' in the data; prepare "
            r"the data with it \(--tokenizer\)$",
            result.stderr,
        ), result.stderr
    # Without a tokenizer nobody knows.
    train(place, init_from="model", data="train.npy", val_data="val.npy", target_dir="tokens")
    assert VOCAB_SIZE < 280


def test_a_vocabulary_that_is_too_small_is_refused(place):
    torch.manual_seed(0)
    export(fastlm.TransformerLM(100, 32, 2, 1, 32), place / "small")
    result = train(place, init_from="small", code=2)
    assert result.stderr.rstrip().endswith(
        "vocab_size=100 is less than the 270 of the data's tokenizer; prepare the data with the "
        "tokenizer of small"
    )


def test_windows_of_attention_shorter_than_the_context_are_refused(place):
    torch.manual_seed(0)
    export(fastlm.TransformerLM(280, 32, 2, 1, 64), place / "mistral")
    path = place / "mistral" / "config.json"
    config = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": 31}
    path.write_text(json.dumps(config))
    result = train(place, init_from="mistral", code=2)
    assert "sliding_window=31" in result.stderr and "up to a context of 31, not 32" in result.stderr
    train(place, init_from="mistral", context_len=31, target_dir="short")
    config["model_type"] = "gemma3"
    path.write_text(json.dumps(config))
    result = train(place, init_from="mistral", code=2)
    assert "model_type='gemma3': no TransformerLM" in result.stderr


def test_it_is_evaluated_alone(place):
    result = train(place, init_from="model", eval_only=True, target_dir="none")
    loss = float(re.search(r"val_loss (\d+\.\d+)", result.stdout)[1])
    data = np.fromfile(place / "data" / "val_00000.bin", dtype=np.uint16).astype(np.int64)
    model = fastlm.from_pretrained(place / "model")
    with torch.no_grad():
        starts = range(0, len(data) - 1, 32)
        pieces = [torch.from_numpy(data[i : i + 33]) for i in starts]
        total = sum(
            torch.nn.functional.cross_entropy(model(p[None, :-1])[0], p[1:], reduction="sum")
            for p in pieces
        )
    assert loss == pytest.approx(total.item() / (len(data) - 1), abs=1e-3)


def test_trained_weights_get_no_rates_for_new_ones(place):
    weights = ["--init-from", str(place / "model"), "--device", "cpu"]
    rates = lambda cfg: (cfg.optimizer, cfg.lr_max, cfg.lr_min, cfg.embedding_lr_scale)  # noqa: E731
    assert rates(parse(weights).config) == ("adamw", 3e-4, 3e-5, 1.0)
    assert rates(parse([*weights, "--preset", "demo"]).config) == rates(parse(weights[2:]).config)
    assert rates(parse(weights[2:]).config)[0] == "muon"
    assert rates(parse([*weights, "--optimizer", "muon"]).config)[0] == "muon"


@pytest.mark.parametrize("by", ["flag", "file"])
def test_a_command_that_is_given_again_goes_on(place, monkeypatch, by):
    """As torchrun's restarts and a cluster's queue do; weights are taken at the first time."""
    (place / "start.toml").write_text('init_from = "model"\n')
    start = {"flag": dict(init_from="model"), "file": dict(config="start.toml")}[by]
    argv = flags(**{**RUN, "data": "data", "target_dir": f"again-{by}", **start})
    monkeypatch.chdir(place)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main([*argv, "--max-minutes", "1e-9"]) == 0
    assert set(losses(place / f"again-{by}")) == {0}
    assert main(argv) == 0
    assert set(losses(place / f"again-{by}")) == {0, 1, 2}
    # Of two flags one is a mistake.
    with pytest.raises(ConfigError, match="give one of them"):
        parse(["--resume", f"again-{by}", "--init-from", "model"])
    assert parse(["--resume", f"again-{by}", *flags(config="start.toml")]).config.init_from is None
