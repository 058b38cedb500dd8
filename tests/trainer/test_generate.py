"""The sliding window, texts, and the generate command on a tiny checkpoint."""

import inspect
import itertools
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from command_server import commands
from training_runs import flags, listing, metrics, tiny_config, write_prepared

from fastlm import ConfigError, TransformerLM, create_model_and_optimizer, save_checkpoint
from fastlm.data.manifest import Manifest
from fastlm.generate import (
    GenerateArguments,
    encode_prompt,
    generate,
    load_model,
    sample_texts,
)
from fastlm.model import KVCache

pytestmark = pytest.mark.usefixtures("one_thread")


# --- generate ---


def make_model(vocab_size=29, context=8) -> TransformerLM:
    torch.manual_seed(0)
    model = TransformerLM(vocab_size, 16, 2, 2, context)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def test_the_window_slides_past_the_context():
    """The whole context, then half of it, growing to the whole again, as the docstring says."""
    model = make_model()
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    got = generate(model, prompt, 20, temperature=0)
    assert got.shape == (2, 25) and torch.equal(got[:, :5], prompt)
    window, expected = prompt, prompt
    with torch.no_grad():
        for _ in range(20):
            if window.shape[1] > 8:
                window = window[:, -4:]
            following = model(window)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
            window = torch.cat((window, following), dim=1)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("length", [8, 9, 20])
def test_a_prompt_as_long_as_the_context_and_longer(length):
    """Its last tokens count."""
    model = make_model()
    prompt = torch.randint(29, (1, length), generator=torch.Generator().manual_seed(1))
    got = generate(model, prompt, 1, temperature=0)
    with torch.no_grad():
        expected = model(prompt[:, -8:])[:, -1].argmax(-1)
    assert got[0, -1] == expected and torch.equal(got[:, :length], prompt)


def test_the_cache_is_as_long_as_the_text(monkeypatch):
    """However long a window the model takes; where the window moves on, as long as the window."""
    made = []

    class Cache(KVCache):
        def __init__(self, capacity):
            super().__init__(capacity)
            made.append(self)

    monkeypatch.setattr("fastlm.generate.KVCache", Cache)
    model, prompt = make_model(context=8), torch.tensor([[3, 1]])
    for new, sizes in ((3, [5]), (20, [8, 8, 8, 8])):
        made.clear()
        generate(model, prompt, new)
        assert [k.shape[2] for cache in made for k, _ in [cache._layers[0]]] == sizes


def test_a_context_of_one_token():
    model = make_model(context=1)
    got = generate(model, torch.tensor([[3]]), 5, temperature=0)[0].tolist()
    with torch.no_grad():
        for before, after in itertools.pairwise(got):
            assert after == int(model(torch.tensor([[before]])).argmax())


def test_generation_draws_from_its_generator_only_and_restores_the_mode():
    model = make_model().train()
    prompt = torch.tensor([[1], [1]])
    before = torch.get_rng_state()
    first = generate(model, prompt, 10, generator=torch.Generator().manual_seed(4))
    again = generate(model, prompt, 10, generator=torch.Generator().manual_seed(4))
    other = generate(model, prompt, 10, generator=torch.Generator().manual_seed(5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # samples of one batch differ
    assert torch.equal(torch.get_rng_state(), before) and model.training
    assert not first.requires_grad


@pytest.mark.parametrize("prompt", [torch.zeros(1, 0), torch.zeros(3), torch.zeros(1, 1, 1)])
def test_an_impossible_prompt_is_an_error(prompt):
    with pytest.raises(ValueError, match="prompt has shape"):
        generate(make_model(), prompt.long(), 3)


# --- texts ---


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture
def tokenizer_json(prepared) -> str:
    return (prepared / "tokenizer.json").read_text(encoding="utf-8")


def test_texts_begin_with_the_prompt_and_end_with_their_document(tokenizer_json, monkeypatch):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = tokenizer.encode("def").ids
    continuation = tokenizer.encode(" f(x)").ids
    rows = torch.tensor(
        [
            [end, *ids, *continuation, end, *continuation],
            [end, *ids, end, *continuation, *continuation],
        ]
    )
    monkeypatch.setattr("fastlm.generate.generate", lambda model, prompt, *a, **k: rows)
    texts = sample_texts(make_model(vocab_size=270), tokenizer_json, prompt="def", num_samples=2)
    assert texts == ["def f(x)", "def"]


def test_the_prompt_comes_back_as_it_was_given(tokenizer_json, monkeypatch):
    """What follows keeps its space; and bytes that are no character do not spoil the prompt's."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    new = []
    monkeypatch.setattr(
        "fastlm.generate.generate",
        lambda model, prompt, *a, **k: torch.cat((prompt, torch.tensor([new]).long()), dim=1),
    )
    model, prompt = make_model(vocab_size=270), "x<|endoftext|> é"
    assert sample_texts(model, tokenizer_json, prompt=prompt, num_samples=1) == [prompt]

    vocabulary = {"?": 0, "▁": 1, "a": 2, "b": 3, "<0xC3>": 4, "<0xA9>": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    for prompt, following, text in (("a ☃é", [1, 3], "a ☃é b"), ("a é", [5, 3], "a é\ufffdb")):
        new[:] = following
        assert sample_texts(model, tokenizer.to_str(), prompt=prompt, num_samples=1) == [text]


def test_another_end_of_text_and_the_end_of_a_turn(tokenizer_json, monkeypatch):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens(["<s>", "<|im_end|>"])
    end, turn = (tokenizer.token_to_id(token) for token in ("<s>", "<|im_end|>"))
    ids = tokenizer.encode("def").ids
    prompts = []

    def generate(model, prompt, *arguments, **keywords):
        prompts.append(prompt[0].tolist())
        return torch.tensor([[*prompts[-1], *ids, stop, *ids] for stop in (end, turn)])

    monkeypatch.setattr("fastlm.generate.generate", generate)
    texts = sample_texts(
        make_model(vocab_size=280), tokenizer.to_str(), num_samples=2, end_of_text=end
    )
    assert texts == ["def", "def"] and prompts == [[end]]


def test_a_new_document_begins_with_the_end_of_text(tokenizer_json, monkeypatch):
    prompts = []

    def remember(model, prompt, *arguments, **keywords):
        prompts.append(prompt.tolist())
        return prompt

    monkeypatch.setattr("fastlm.generate.generate", remember)
    assert sample_texts(make_model(vocab_size=270), tokenizer_json, num_samples=2) == ["", ""]
    assert prompts == [[[0], [0]]]


def test_a_prompt_is_encoded_as_training_text_is(tokenizer_json):
    """Only `<|endoftext|>` is a token of its own: what else the tokenizer adds or takes for one,
    prepare has written as text, and the model has never seen."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    plain = Tokenizer.from_str(tokenizer_json)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens(["[CLS]"])
    cls = tokenizer.token_to_id("[CLS]")
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", cls)]
    )
    assert tokenizer.encode("def").ids == [cls, *plain.encode("def").ids]  # what must not happen

    prompt = "def f[CLS]<|endoftext|>x"
    before, after = (plain.encode(part).ids for part in prompt.split("<|endoftext|>"))
    assert cls not in before
    assert encode_prompt(tokenizer, prompt) == [*before, 0, *after]
    assert encode_prompt(tokenizer, "") == []


def test_without_a_tokenizer_texts_are_ids():
    model = make_model()
    (text,) = sample_texts(model, None, prompt="5 17", num_samples=1, max_new_tokens=3)
    assert text.startswith("5 17 ") and len(text.split()) == 5
    with pytest.raises(ConfigError, match="no tokenizer; give token ids, as in '5 17'"):
        sample_texts(model, None, prompt="hello")
    with pytest.raises(ConfigError, match="outside the vocabulary of 29"):
        sample_texts(model, None, prompt="29")


# --- the command ---


@pytest.fixture(scope="module")
def run_directory(prepared, tmp_path_factory) -> Path:
    """A run's directory, its checkpoint of an untrained model that has the tokenizer."""
    directory = tmp_path_factory.mktemp("runs")
    cfg = tiny_config(directory / "run", vocab_size=270, context_len=16)
    torch.manual_seed(0)
    model = TransformerLM(
        270, cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.context_len, cfg.d_ff
    )
    tokenizer = (prepared / "tokenizer.json").read_text(encoding="utf-8")
    path = directory / "run" / "checkpoints" / "checkpoint_model.pt"
    save_checkpoint(model, None, 1, path, config=asdict(cfg), tokenizer=tokenizer)
    path = path.with_name("checkpoint_final.pt")
    save_checkpoint(model, None, 1, path, config=asdict(cfg), tokenizer=tokenizer)
    save_checkpoint(model, None, 1, directory / "bare.pt")
    nanogpt = {"model": {}, "iter_num": 5, "config": {"batch_size": 12}, "model_args": {}}
    torch.save(nanogpt, directory / "nanogpt.pt")
    (directory / "damaged.pt").write_bytes(path.read_bytes()[:-9])
    (directory / "empty").mkdir()
    return directory


def run_generate(directory: Path, **settings):
    defaults = dict(ckpt="run/checkpoints/checkpoint_model.pt", device="cpu", max_new_tokens=20)
    argv = flags(**{**defaults, **settings})
    return commands().run(argv, directory, call="fastlm.generate:main")


@pytest.mark.parametrize(
    "settings",
    [dict(), dict(qk_norm=True), dict(tie_embeddings=True, d_ff=40, rope_theta=100.0, num_heads=4)],
    ids=str,
)
def test_a_checkpoint_brings_its_model_back(tmp_path, settings):
    cfg = tiny_config(tmp_path, dropout=0.5, **settings)
    torch.manual_seed(1)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    save_checkpoint(model, optimizer, 1, tmp_path / "a.pt", config=asdict(cfg))
    again, payload = load_model(tmp_path / "a.pt", "cpu")
    ids = torch.randint(cfg.vocab_size, (2, cfg.context_len))
    with torch.no_grad():
        assert torch.equal(again(ids), model.eval()(ids)) and not again.training
    assert payload["config"]["d_ff"] == cfg.d_ff


def test_the_command_repeats_itself_with_a_seed(run_directory):
    before = listing(run_directory)
    first = run_generate(run_directory, prompt="def", seed=1)
    assert first.returncode == 0 and first.stderr == ""
    assert first.stdout.startswith("def")
    assert run_generate(run_directory, prompt="def", seed=1).stdout == first.stdout
    assert run_generate(run_directory, prompt="def", seed=2).stdout != first.stdout
    # A run's directory is its newest checkpoint, here of the same weights.
    assert run_generate(run_directory, ckpt="run", prompt="def", seed=1).stdout == first.stdout
    greedy = [
        run_generate(run_directory, prompt="def", temperature=0, seed=seed).stdout
        for seed in (1, 2)
    ]
    assert greedy[0] == greedy[1]
    only = run_generate(run_directory, prompt="def", top_k=1, top_p=0.5).stdout
    assert only == greedy[0]
    assert listing(run_directory) == before


def test_the_command_samples_as_a_run_does():
    function = inspect.signature(sample_texts).parameters
    for name in ("prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        assert getattr(GenerateArguments, name) == function[name].default, name


def test_the_command_numbers_several_samples(run_directory):
    shown = run_generate(run_directory, num_samples=3, max_new_tokens=60).stdout
    for number in (1, 2, 3):
        assert f"--- sample {number} of 3 ---" in shown


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ckpt="nowhere.pt"), "nowhere.pt: no such checkpoint"),
        (dict(ckpt="empty"), "empty: holds no readable checkpoint"),
        (dict(ckpt="damaged.pt"), "damaged.pt: is damaged"),
        (dict(ckpt="bare.pt"), "bare.pt: holds no model config"),
        (dict(ckpt="nanogpt.pt"), "nanogpt.pt: holds no model config"),
        (dict(max_new_tokens=0), "max_new_tokens=0: it must be at least 1"),
        (dict(num_samples=0), "num_samples=0: it must be at least 1"),
        (dict(temperature=-1), "temperature=-1.0: it must not be negative"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_p=2), "top_p=2.0"),
        (dict(device="tpu"), "device='tpu' is unknown"),
    ],
)
def test_mistakes_are_one_line(run_directory, settings, message):
    result = run_generate(run_directory, **settings)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {message}"), result.stderr
    assert result.stderr.count("\n") == 1


def test_unknown_flags_suggest_the_nearest(run_directory):
    result = run_generate(run_directory, temprature=1)
    assert result.returncode == 2 and "--temperature" in result.stderr


def test_the_checkpoint_of_a_trained_run_writes_what_it_learned(prepared, tmp_path):
    """From text to text: trained on one line over and over, it writes that line."""
    settings = dict(
        data=prepared, total_steps=150, context_len=16, d_model=32, num_heads=2, num_layers=1,
        batch_size=16, lr_max=1e-2, lr_min=1e-3, warmup_iters=5, dtype="float32", device="cpu",
        target_dir="run", eval_every=0, ckpt_every=0,
    )  # fmt: skip
    trained = commands().run(flags(**settings), tmp_path)
    assert trained.returncode == 0, trained.output
    assert trained.stdout.count("[sample ") == 5 and "bits/byte" in trained.stdout
    shown = run_generate(tmp_path, ckpt="run", prompt="def f(x):", temperature=0).stdout
    assert shown.startswith("def f(x):\n    return x + 1\n")
    (summary,) = metrics(tmp_path / "run", "summary")
    val = Manifest.load(prepared).splits["val"]
    nats = summary["val_loss"] * (val.tokens - 1)
    assert summary["bits_per_byte"] == pytest.approx(nats / math.log(2) / val.bytes)
