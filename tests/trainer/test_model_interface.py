"""What is asked of a model: what it must have, which faults are found before training, and what
blocks compiled one by one are."""

import copy

import pytest
import torch
from own_models import Fused, Plain, Silent
from torch import nn
from torch._dynamo.utils import counters
from training_runs import VOCAB_SIZE, same, tiny_config

from fastlm import CheckpointError, ConfigError, TransformerLM, train_loop
from fastlm.generate import generate, sample_texts
from fastlm.model import flop_formula, training_flops_per_token
from fastlm.model_interface import (
    blocks_of,
    check_model_class,
    compile_blocks,
    describe_model,
    has_fused_head,
    model_class,
    prepare_model,
)
from fastlm.step import graphs_compiled

pytestmark = pytest.mark.usefixtures("one_thread")

T = 32


def cfg(**settings):
    return tiny_config("unused", **settings)


def ours(**settings) -> TransformerLM:
    return TransformerLM(VOCAB_SIZE, 32, 2, settings.pop("num_layers", 2), T, **settings)


class WithHiddenLayer(Plain):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(16, 16)  # a layer, not a method
        self.lm_head = nn.Linear(16, VOCAB_SIZE)


def test_which_models_have_a_fused_head():
    assert has_fused_head(ours()) and has_fused_head(Fused())
    assert not has_fused_head(Plain()) and not has_fused_head(WithHiddenLayer())


def test_blocks_are_what_the_outermost_lists_hold():
    model = Plain(depth=3)
    assert blocks_of(model) == list(model.stack)
    model.stack[0].inner = nn.ModuleList([nn.Linear(16, 16)])
    assert blocks_of(model) == list(model.stack)
    model.few = nn.ModuleDict({"a": nn.ModuleList([nn.ModuleList([nn.Linear(2, 2)])])})
    assert blocks_of(model) == [*model.stack, model.few["a"][0][0]]
    assert blocks_of(ours(num_layers=3))[2].ffn.w1.weight.shape == (128, 32)
    assert blocks_of(Silent()) == []


def test_a_model_is_described():
    assert describe_model(ours()) == "2 layers, d_model 32, 2 heads, vocabulary 64"
    assert describe_model(Plain()) == "own_models.Plain, loss over its logits"
    assert describe_model(Fused()) == "own_models.Fused, head and loss in one"


def test_flops_of_another_model():
    V, D, depth = VOCAB_SIZE, 16, 2
    layers = depth * (2 * D + 2 * D * D + D)
    assert training_flops_per_token(Plain(), T) == 6 * (layers + D * V + V)
    assert training_flops_per_token(Plain(tied=True), T) == 6 * (layers + D * V + V)
    assert "attention not counted" in flop_formula(Plain())
    assert flop_formula(ours()) != flop_formula(Plain())


# --- faults, in one line, before training ---


class Returning(Plain):
    """forward() returns what `make` makes of the logits."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, ids):
        return self.make(super().forward(ids))


class Capped(Fused):
    def forward(self, ids):
        return 3 * torch.tanh(super().forward(ids) / 3) + 1


class Asserting(Plain):
    def forward(self, ids):
        assert ids.shape[1] <= 16, "block size is only 16"
        return super().forward(ids)


class OfLength(Plain):
    max_seq_len = 31


def frozen():
    return Plain().requires_grad_(False)


def on_meta():
    with torch.device("meta"):
        return Plain()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: len, "model=<built-in function len>: it must be a torch.nn.Module"),
        (lambda: torch.compile(Plain()), r"model is wrapped \(OptimizedModule\)"),
        (frozen, "no parameter that requires a gradient"),
        (on_meta, "meta device"),
        (OfLength, r"takes 31 positions \(max_seq_len\) and context_len=32: lower context_len"),
        (
            lambda: Plain(positions=31),
            "embedding positions has 31 rows and is asked for row 31: .*context_len=32",
        ),
        (lambda: Plain(vocab_size=63), "embedding tokens has 63 rows.*row 63: .*vocab_size=64"),
        (lambda: Returning(lambda y: y[..., :60]), "logits of 60 token ids and vocab_size=64"),
        (lambda: Returning(lambda y: y[:, -1:]), r"shape \(2, 1, 64\) for .*\(2, 32, 64\)"),
        (lambda: Returning(lambda y: (y, None)), r"returns a tuple .*\(B, T, V\) tensor of floats"),
        (lambda: Returning(lambda y: y.argmax(-1)), r"shape \(2, 32\) for token ids of shape"),
        (lambda: Returning(lambda y: y.long()), "tensor of floats"),
        (Capped, r"forward\(\) is not lm_head\(hidden\(\)\), it differs by .*rename hidden"),
        (Asserting, r"fails in forward\(\) on token ids of shape \(2, 32\).*AssertionError: block"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_in_one_line(make, message, tmp_path):
    config = tiny_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=message) as error:
        prepare_model(make(), config)
    assert "\n" not in str(error.value)
    data = torch.arange(500).numpy() % 64
    with pytest.raises(ConfigError, match=message):
        train_loop(data, data, config, model=make())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "setting",
    [
        dict(dropout=0.1),
        dict(tie_embeddings=True),
        dict(activation_checkpointing=True),
        dict(qk_norm=True),
    ],
)
def test_settings_that_would_do_nothing_are_refused(setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"{name}=.*does nothing for a model of your own"):
        prepare_model(Plain(), cfg(**setting))


def test_settings_must_describe_a_transformer_that_is_handed_over():
    assert prepare_model(ours(), cfg()) is not None
    for settings, message in (
        (dict(num_layers=3), "num_layers=2: the model handed over has 3"),
        (dict(dropout=0.25), "dropout=0.0: the model handed over has 0.25"),
        (dict(d_ff=64), "d_ff=128: the model handed over has 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare_model(ours(**settings), cfg())


def test_checking_changes_nothing():
    model = Fused(dropout=0.5)
    model.stack[1].eval()  # a part kept as it is, on purpose
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = torch.get_rng_state()
    assert prepare_model(model, cfg()) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert same(dict(model.state_dict()), before)
    assert model.training and model.stack[0].training and not model.stack[1].drop.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_in_eval_mode_is_trained_in_training_mode(capsys):
    model = prepare_model(Plain().eval(), cfg())
    assert all(module.training for module in model.modules())
    assert "came in eval mode" in capsys.readouterr().out


def test_running_out_of_memory_is_no_fault_of_the_model():
    class Greedy(Plain):
        def forward(self, ids):
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        prepare_model(Greedy(), cfg())


# --- the class that a checkpoint names ---


class Subclass(TransformerLM):
    pass


def test_the_class_of_a_model():
    assert model_class(ours()) is None
    assert model_class(Plain()) == "own_models.Plain"
    assert model_class(Subclass(8, 8, 1, 1, 4)).endswith("Subclass")
    stored = {"model_class": "nanogpt.GPT"}
    check_model_class(stored, "f.pt", Plain())
    check_model_class({}, "f.pt", ours())
    for model in (None, ours()):
        with pytest.raises(CheckpointError, match=r"f\.pt: .*'nanogpt.GPT', no TransformerLM"):
            check_model_class(stored, "f.pt", model)


# --- generation ---


def test_a_model_without_a_cache_generates():
    torch.manual_seed(0)
    model = Plain()
    prompt = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(IndexError):  # it has 32 positions and does not tell
        generate(model, prompt, T, temperature=0)
    got = generate(model, prompt, T, temperature=0, context_len=T)
    expected = prompt
    with torch.no_grad():
        for _ in range(T):
            following = model(expected[:, -T:])[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(got, expected)
    model.max_seq_len = T
    assert torch.equal(generate(model, prompt, T, temperature=0), expected)
    texts = sample_texts(model, None, prompt="1 2 3", num_samples=2, max_new_tokens=40)
    assert [len(text.split()) for text in texts] == [43, 43]


# --- blocks compiled one by one ---


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]


@pytest.fixture(params=BACKENDS)
def fresh_graphs(request, monkeypatch):
    """The counters of torch.compile. Which graphs there are does not hang on the backend."""
    compile = nn.Module.compile
    monkeypatch.setattr(
        nn.Module,
        "compile",
        lambda self, **options: compile(self, backend=request.param, **options),
    )
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


def test_a_model_without_a_list_of_layers_cannot_be_compiled_by_block():
    with pytest.raises(ConfigError, match=r"compile_scope='block': Silent has no nn\.ModuleList"):
        compile_blocks(Silent())


@pytest.mark.parametrize("recompute", [False, True])
def test_all_blocks_share_two_graphs_and_change_no_result(fresh_graphs, recompute):
    """One for training and one for evaluation, however many layers there are."""
    ids = torch.randint(VOCAB_SIZE, (2, T), generator=torch.Generator().manual_seed(0))
    for num_layers in (2, 5):
        torch.manual_seed(0)
        model = ours(num_layers=num_layers, activation_checkpointing=recompute)
        names = list(model.state_dict())
        model.eval()
        with torch.no_grad():
            evaluated = model(ids)
        model.train()
        expected = model(ids)
        expected.square().mean().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        compile_blocks(model)
        assert list(model.state_dict()) == names
        for _ in range(2):
            got = model(ids)
            model.zero_grad()
            got.square().mean().backward()
        torch.testing.assert_close(got, expected)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model(ids), evaluated)
        assert fresh_graphs["unique_graphs"] == 2, num_layers
    generate(model, ids[:, :3], 9)
    assert fresh_graphs["unique_graphs"] == 2  # not one for each length


def test_dropout_in_compiled_blocks_is_recomputed_as_it_was(fresh_graphs):
    """With activation checkpointing: gradients of the same masks as without."""
    ids = torch.randint(VOCAB_SIZE, (2, T), generator=torch.Generator().manual_seed(0))
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = ours(dropout=0.3, activation_checkpointing=recompute)
        compile_blocks(model)
        torch.manual_seed(1)
        model(ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class OfTorch(nn.Module):
    """Its blocks are torch's own, whose code torch.compile leaves out by itself."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.layers = nn.ModuleList([layer, copy.deepcopy(layer), copy.deepcopy(layer)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_of_torchs_own_are_compiled_and_share_a_graph():
    torch.compiler.reset()
    model, x = OfTorch(), torch.randn(2, 4, 16, requires_grad=True)
    expected, names, before = model(x), list(model.state_dict()), graphs_compiled()
    compile_blocks(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert graphs_compiled() == before + 1 and list(model.state_dict()) == names
