"""from_pretrained and export against transformers: equal logits, both ways."""

import json
import shutil

import pytest
import torch
from training_runs import same

import fastlm
from fastlm.errors import CheckpointError, OutputError
from fastlm.export import export, main
from fastlm.generate import generate
from fastlm.huggingface import sliding_window

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

V, T = 61, 64
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=T,
)  # fmt: skip
LLAMA_3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=32,
)  # fmt: skip
# Sizes apart from one another, and each with what its family alone has.
CONFIGS = {
    "llama3": lambda: transformers.LlamaConfig(**SIZES, head_dim=32, rope_parameters=LLAMA_3),
    "llama2": lambda: transformers.LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "smollm2": lambda: transformers.LlamaConfig(
        **{**SIZES, "num_attention_heads": 2, "num_key_value_heads": 1}, rms_norm_eps=1e-5,
        rope_parameters=dict(rope_type="default", rope_theta=100000.0), tie_word_embeddings=True,
    ),
    "qwen2.5": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(
        **{**SIZES, "num_attention_heads": 5, "num_key_value_heads": 1}, head_dim=8,
        sliding_window=T,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def fill(model, seed: int = 1):
    """Weights large enough for attention to look at some positions more than at others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.dim() == 1 and "bias" not in name
            parameter.normal_(std=0.3 if parameter.dim() == 1 else 0.12, generator=generator)
            if is_norm:
                parameter += 1.0
    return model.eval()


def theirs(name: str):
    config = CONFIGS[name]()
    return fill(transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(V, (2, T), generator=torch.Generator().manual_seed(seed))


def logits(model, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_equal(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.std() > 0.3  # they are not all near zero, where everything is equal
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_both_ways(name, tmp_path):
    model, x = theirs(name), ids()
    model.save_pretrained(tmp_path / "theirs")
    ours = fastlm.from_pretrained(tmp_path / "theirs")
    expected = logits(model, x)
    assert_equal(logits(ours, x), expected)
    assert not ours.training and ours.config.max_seq_len == T
    assert {p.dtype for p in ours.parameters()} == {torch.float32}

    export(fill(ours, seed=2), tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(logits(again, x), logits(ours, x))
    assert (logits(ours, x) - expected).abs().max() > 0.1  # other weights, indeed
    back = fastlm.from_pretrained(tmp_path / "ours")
    assert same(dict(back.state_dict()), dict(ours.state_dict()))
    assert back.config == ours.config


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_greedy_continuations_are_those_of_transformers(name, tmp_path):
    """The cache holds the heads of keys, rotated by their positions."""
    model = theirs(name)
    model.save_pretrained(tmp_path)
    prompt = ids()[:, :5]
    ours = generate(fastlm.from_pretrained(tmp_path), prompt, 20, temperature=0)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours, found)
    assert len(set(ours[0].tolist())) > 5


def test_shards_are_read_and_written(tmp_path):
    model, x = theirs("qwen3"), ids()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    assert len([*(tmp_path / "theirs").glob("*.safetensors")]) > 3
    ours = fastlm.from_pretrained(tmp_path / "theirs")
    assert_equal(logits(ours, x), logits(model, x))
    export(ours, tmp_path / "ours", file_bytes=10_000)
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_equal(logits(again, x), logits(model, x))
    (tmp_path / "ours" / files[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{files[1]}: cannot be read"):
        fastlm.from_pretrained(tmp_path / "ours")


def test_the_settings_of_transformers_4_mean_the_same(tmp_path):
    model = theirs("llama3")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    content["rope_scaling"] = rope
    del content["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"q_proj.weight is \(128, 32\), and .* \(32, 32\)"):
        fastlm.from_pretrained(tmp_path)  # a head's width that is missing is d_model / heads
    (tmp_path / "config.json").write_text(json.dumps({**content, "head_dim": 32}))
    assert_equal(logits(fastlm.from_pretrained(tmp_path), ids()), logits(model, ids()))


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(qk_norm=True),  # the demo's: without weights, and with an epsilon of its own
        dict(qk_norm=True, norm_eps=1e-3, num_kv_heads=1),
        dict(num_heads=5, head_dim=8),  # d_model is not divisible
        dict(tie_embeddings=True, dropout=0.1, rope_scaling=(4.0, 1.0, 4.0, 16)),
    ],
)
def test_own_architectures_are_exported(tmp_path, settings):
    arguments = dict(vocab_size=V, d_model=32, num_heads=4, num_layers=2, max_seq_len=T)
    model = fill(fastlm.TransformerLM(**{**arguments, **settings}))
    if settings.get("qk_norm"):  # short queries, for which the epsilon counts
        with torch.no_grad():
            for layer in model.layers:
                layer.attn.q_proj.weight *= 1e-2
    export(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_equal(logits(again, ids()), logits(model, ids()))
    back = fastlm.from_pretrained(tmp_path / "out")
    assert_equal(logits(back, ids()), logits(model, ids()))


def test_what_no_model_of_transformers_has_is_refused(tmp_path):
    model = fastlm.TransformerLM(V, 32, 4, 1, T, qkv_bias=True, qk_norm=True)
    for name in ("value_residual", "embedding_residual"):
        flag = name.replace("_", "-")
        mixed = fastlm.TransformerLM(V, 32, 4, 1, T, **{name: True})
        with pytest.raises(CheckpointError, match=f"{name}=True: no model.*with --no-{flag}"):
            export(mixed, tmp_path / "out")
    with pytest.raises(CheckpointError, match="qkv_bias with qk_norm"):
        export(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


LONG = dict(sliding_window=T // 2)
REFUSED = {
    "model_type='gemma2'.*supported are llama, mistral, qwen2, qwen3": dict(model_type="gemma2"),
    "model_type=None": dict(model_type=None),
    "hidden_act='gelu'": dict(hidden_act="gelu"),
    "attention_bias=True": dict(attention_bias=True),
    "mlp_bias=True": dict(mlp_bias=True),
    "quantization_config=": dict(quantization_config={"quant_method": "gptq"}),
    "layer_types=.*'chunked_attention'.*supported are": dict(
        layer_types=["full_attention", "chunked_attention"]
    ),
    "rope_type='yarn'.*supported are default, llama3": dict(rope_parameters={"rope_type": "yarn"}),
    "rope_type='linear'": dict(rope_parameters=None, rope_scaling={"type": "linear", "factor": 2}),
    "factor=None: it must be a positive number": dict(rope_parameters={"rope_type": "llama3"}),
    "partial_rotary_factor=0.5": dict(partial_rotary_factor=0.5),
    "num_hidden_layers=.*integer from 1 to 16383": dict(num_hidden_layers=10**9),
    "hidden_size='32'": dict(hidden_size="32"),
    "rms_norm_eps=-1": dict(rms_norm_eps=-1),
    "head_dim=7: RoPE rotates pairs": dict(head_dim=7),
    "num_heads=4 is not divisible by num_kv_heads=3": dict(num_key_value_heads=3),
    "sliding_window=32: windows of attention.*context of 32, not 64": dict(
        model_type="mistral", **LONG
    ),
    "sliding_window='32': it must be an integer": dict(sliding_window="32"),
    "q_norm.weight is missing": dict(model_type="qwen3"),
    "q_proj.bias is missing": dict(model_type="qwen2"),
    r"layers.1.\S+ has no place in a TransformerLM of model_type llama": dict(num_hidden_layers=1),
    r"gate_proj.weight is \(48, 32\), and config.json wants \(40, 32\)": dict(intermediate_size=40),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    theirs("llama2").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_supported_is_named(llama, tmp_path, message):
    shutil.copytree(llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | REFUSED[message]))
    with pytest.raises(CheckpointError, match=message):
        fastlm.from_pretrained(tmp_path / "model", max_seq_len=T)


@pytest.mark.parametrize(
    ("settings", "window"),
    [
        (dict(model_type="llama", sliding_window=8), None),
        (dict(model_type="mistral", sliding_window=8), 8),
        (dict(model_type="mistral", sliding_window=None), None),
        (dict(model_type="mistral"), 4096),  # transformers' default
        (dict(model_type="qwen2", sliding_window=8, use_sliding_window=False), None),
        (dict(sliding_window=8, use_sliding_window=True, max_window_layers=3), 8),
        (dict(sliding_window=8, use_sliding_window=True, max_window_layers=4), None),
        (dict(sliding_window=8, use_sliding_window=True, layer_types=["full_attention"]), None),
        (dict(sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"]), 8),
    ],
)
def test_which_settings_are_windows_of_attention(settings, window):
    assert sliding_window({"model_type": "qwen3", "num_hidden_layers": 4, **settings}) == window


def test_a_sliding_window_is_no_obstacle_within_it(tmp_path):
    model = theirs("mistral")
    model.config.sliding_window = T // 2
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"sliding_window=32.*max_seq_len is 32.*not 64"):
        ours = fastlm.from_pretrained(tmp_path)
    assert ours.config.max_seq_len == T // 2
    x = ids()[:, : T // 2]
    assert_equal(logits(ours, x), logits(model, x))


def test_damage_is_named(llama, tmp_path):
    def copy(name: str):
        shutil.copytree(llama, tmp_path / name)
        return tmp_path / name

    cut = copy("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (copy("no-json") / "config.json").write_text("{")
    (copy("list") / "config.json").write_text("[]")
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    index = copy("index")
    (index / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x"}}')
    for name, message in {
        "cut": "model.safetensors: cannot be read",
        "no-json": "config.json: cannot be read",
        "list": "config.json: holds no JSON object",
        "pickled": r"has neither model.safetensors nor .*\.bin files are pickled",
        "index": "weight_map names no files beside it",
        "nowhere": "no such checkpoint",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            fastlm.from_pretrained(tmp_path / name)


def test_the_command_exports_a_run_with_its_tokenizer(
    tmp_path, monkeypatch, capsys, without_extras
):
    from training_runs import tiny_config, write_prepared

    from fastlm.data.files import open_data
    from fastlm.train import train

    monkeypatch.chdir(tmp_path)
    data = open_data((str(write_prepared(tmp_path / "data")),))
    cfg = tiny_config(tmp_path / "run", vocab_size=270, total_steps=2, num_kv_heads=1, qk_norm=True)
    trained = train(data, cfg)
    assert main(["--ckpt", "run", "--out", "out", "--dtype", "float32"]) == 0
    assert "wrote out" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    text = "def f(x):\n    return x + 1\n"
    found = tokenizer(text).input_ids
    from tokenizers import Tokenizer

    assert found == Tokenizer.from_str(data.tokenizer_json).encode(text).ids
    assert tokenizer.decode(found) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    x = torch.tensor([found])[:, :32]
    torch.testing.assert_close(logits(model, x), logits(trained.eval(), x), rtol=0, atol=1e-5)

    assert main(["--ckpt", "run", "--out", "out"]) == 2
    assert "--out out: is there already" in capsys.readouterr().err
    assert main(["--ckpt", "run", "--out", "half", "--dtype", "bfloat16"]) == 0
    half = transformers.AutoModelForCausalLM.from_pretrained("half", dtype="auto")
    assert half.dtype == torch.bfloat16
    with pytest.raises(OutputError):
        export(trained, tmp_path / "run")
