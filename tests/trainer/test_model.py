"""TransformerLM against an implementation written out in loops, and against CS336's names."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from training_runs import same

from fastlm import ConfigError, ModelConfig, TrainingConfig, TransformerLM, count_parameters
from fastlm.generate import generate
from fastlm.model import KVCache, training_flops_per_token

pytestmark = pytest.mark.usefixtures("one_thread")

V, D, H, L, T = 37, 24, 3, 2, 16  # heads of 8: no power of two in width or vocabulary


def make_model(**settings) -> TransformerLM:
    """With large weights: with those of the initialisation attention hardly looks anywhere."""
    arguments = dict(vocab_size=V, d_model=D, num_heads=H, num_layers=L, max_seq_len=T)
    model = TransformerLM(**{**arguments, **settings})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.5
            parameter.normal_(std=scale, generator=generator)
            if parameter.dim() == 1:
                parameter += 1.0
    return model


def random_tokens(*shape, seed=0) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def naive_logits(
    state, ids: list[int], num_heads: int, theta: float, qk_norm: bool = False, *,
    num_kv_heads: int | None = None, norm_eps: float = 1e-5, rope_scaling=None,
) -> torch.Tensor:  # fmt: skip
    """(T, V) in fp64, position by position and head by head, from the papers' formulas."""
    w = {name: tensor.double() for name, tensor in state.items()}
    num_layers = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("layers."))
    sharing = num_heads // (num_kv_heads or num_heads)

    def norm(x, weight):
        return x / math.sqrt(float((x * x).mean()) + norm_eps) * weight

    def unit(x, weight):
        if weight is not None:
            return norm(x, weight)
        return x / math.sqrt(float((x * x).mean()) + 1e-6) if qk_norm else x

    def rope(x, position):  # pairs of neighbours, as CS336 and the paper have them
        d, out = len(x), x.clone()
        for i in range(d // 2):
            frequency = theta ** (-2 * i / d)
            if rope_scaling:  # Llama 3's, by wavelengths
                factor, low, high, before = rope_scaling
                wavelength = 2 * math.pi / frequency
                if wavelength > before / low:
                    frequency /= factor
                elif wavelength > before / high:
                    share = (before / wavelength - low) / (high - low)
                    frequency = (1 - share) * frequency / factor + share * frequency
            angle = position * frequency
            a, b = float(x[2 * i]), float(x[2 * i + 1])
            out[2 * i] = a * math.cos(angle) - b * math.sin(angle)
            out[2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return out

    def mix(name, xs, ys):
        a, b = w.get(name, (1.0, 0.0))
        return [a * x + b * y for x, y in zip(xs, ys, strict=True)]

    first_values = None
    xs = embedded = [w["token_embeddings.weight"][i] for i in ids]
    for n in range(num_layers):
        p = f"layers.{n}."
        xs = mix(p + "embedding_mix", xs, embedded)
        normed = [norm(x, w[p + "ln1.weight"]) for x in xs]
        zero = torch.zeros(())
        q, k, v = (
            [w[f"{p}attn.{c}_proj.weight"] @ x + w.get(f"{p}attn.{c}_proj.bias", zero)
             for x in normed]
            for c in "qkv"
        )  # fmt: skip
        first_values = v if n == 0 else first_values
        v = mix(p + "attn.value_mix", v, first_values)
        q_norm, k_norm = (w.get(f"{p}attn.{c}_norm.weight") for c in "qk")
        width = len(q[0]) // num_heads
        for t in range(len(xs)):
            heads = []
            for h in range(num_heads):
                query = rope(unit(q[t][h * width : (h + 1) * width], q_norm), t)
                part = slice(h // sharing * width, (h // sharing + 1) * width)
                keys = [rope(unit(k[s][part], k_norm), s) for s in range(t + 1)]
                scores = [float(query @ key) / math.sqrt(width) for key in keys]
                weights = [math.exp(score - max(scores)) for score in scores]
                heads.append(sum(a / sum(weights) * v[s][part] for s, a in enumerate(weights)))
            xs[t] = xs[t] + w[p + "attn.output_proj.weight"] @ torch.cat(heads)
        for t, x in enumerate(xs):
            y = norm(x, w[p + "ln2.weight"])
            gate = w[p + "ffn.w1.weight"] @ y
            inner = gate / (1 + torch.exp(-gate)) * (w[p + "ffn.w3.weight"] @ y)
            xs[t] = x + w[p + "ffn.w2.weight"] @ inner
    return torch.stack([w["lm_head.weight"] @ norm(x, w["ln_final.weight"]) for x in xs])


@pytest.mark.parametrize(
    ("theta", "qk_norm"), [(10000.0, False), (50.0, False), (10000.0, True), (50.0, True)]
)
def test_logits_equal_the_naive_implementation(theta, qk_norm):
    model = make_model(rope_theta=theta, qk_norm=qk_norm)
    ids = random_tokens(2, T)
    with torch.no_grad():
        logits = model(ids)
    assert logits.shape == (2, T, V) and logits.dtype == torch.float32
    for row in range(2):
        expected = naive_logits(model.state_dict(), ids[row].tolist(), H, theta, qk_norm)
        torch.testing.assert_close(logits[row].double(), expected, rtol=1e-4, atol=1e-4)


LLAMA = dict(  # all that the family adds
    num_heads=4, num_kv_heads=2, head_dim=10, norm_eps=1e-2, qkv_bias=True, qk_norm=True,
    qk_norm_weight=True, rope_scaling=(8.0, 1.0, 4.0, 20), rope_theta=100.0,
)  # fmt: skip


RESIDUALS = [
    dict(value_residual=True),
    dict(embedding_residual=True),
    dict(value_residual=True, embedding_residual=True, qk_norm=True),
]


@pytest.mark.parametrize("settings", RESIDUALS)
def test_residuals_from_the_first_block_equal_the_naive_implementation(settings):
    model, ids = make_model(num_heads=4, num_kv_heads=2, **settings), random_tokens(1, T)
    state = model.state_dict()
    new = {n.partition(".attn")[0] for n in state if n.endswith("_mix")}
    assert new and not any(n.startswith("layers.0") for n in new)
    logits = model(ids)[0]
    naive = naive_logits(state, ids[0].tolist(), 4, 10000.0, "qk_norm" in settings, num_kv_heads=2)
    torch.testing.assert_close(logits.double(), naive, rtol=1e-4, atol=1e-4)
    logits.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    # New weights mix in half of the first values, and nothing of the embedding.
    for name, weight in TransformerLM(V, D, H, L, T, **settings).named_parameters():
        if name.endswith("_mix"):
            assert weight.tolist() == ([0.5, 0.5] if "value" in name else [1.0, 0.0])


@pytest.mark.parametrize("left_out", [(), ("num_kv_heads",), ("qk_norm", "qk_norm_weight")])
def test_logits_of_the_llama_family_equal_the_naive_implementation(left_out):
    settings = {name: value for name, value in LLAMA.items() if name not in left_out}
    model, ids = make_model(**settings), random_tokens(1, T)
    assert model.layers[0].attn.k_proj.weight.shape == (10 * model.config.num_kv_heads, D)
    state = model.state_dict()
    with torch.no_grad():
        logits = model(ids)[0]
    known = {n: settings[n] for n in ("num_kv_heads", "norm_eps", "rope_scaling") if n in settings}
    expected = naive_logits(state, ids[0].tolist(), 4, 100.0, **known)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


def test_a_config_makes_the_same_model():
    torch.manual_seed(0)
    model = TransformerLM(V, D, H, L, T, tie_embeddings=True, num_kv_heads=1)
    config = model.config
    torch.manual_seed(0)
    again = TransformerLM.from_config(config)
    assert again.config == config and same(dict(again.state_dict()), dict(model.state_dict()))
    assert (config.head_dim, config.d_ff, config.max_seq_len) == (8, 64, T)
    assert ModelConfig.of_settings(config.settings()) == config
    assert config.settings()["context_len"] == T  # as TrainingConfig calls it
    assert torch.equal(TransformerLM(V, D, H, L, T, qkv_bias=True).layers[0].attn.q_proj.bias,
                       torch.zeros(D))  # fmt: skip
    with pytest.raises(TypeError, match="num_kv_head"):
        TransformerLM(V, D, H, L, T, num_kv_head=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(head_dim=5), "head_dim=5: RoPE rotates pairs"),
        (dict(head_dim=0), "head_dim=0"),
        (dict(num_kv_heads=2), "num_heads=3 is not divisible by num_kv_heads=2"),
        (dict(num_kv_heads=0), "num_kv_heads=0"),
        (dict(qk_norm_weight=True), "it needs qk_norm=True"),
        (dict(norm_eps=0.0), "norm_eps=0.0: it must be positive"),
        (dict(rope_scaling=(8.0, 4.0, 1.0, 64)), "a larger high_freq_factor"),
        (dict(rope_scaling=(math.nan, 1.0, 4.0, 64)), "factor >= 1"),
    ],
)
def test_impossible_architectures_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        TransformerLM(V, D, H, 1, T, **settings)
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(d_model=D, num_heads=H, **settings)


def test_the_cache_holds_the_heads_of_keys():
    model = make_model(**LLAMA).eval()
    ids, cache = random_tokens(3, T), KVCache()
    with torch.no_grad():
        got = torch.cat([model(piece, cache) for piece in ids.split(5, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), rtol=1e-4, atol=1e-4)
    assert all(stored.shape == (3, 2, T, 10) for pair in cache._layers.values() for stored in pair)


def test_the_future_does_not_matter():
    model = make_model()
    ids = random_tokens(1, T)
    for cut in (1, 7, T - 1):
        other = ids.clone()
        other[:, cut:] = (other[:, cut:] + 1 + random_tokens(T - cut, seed=2) % (V - 1)) % V
        with torch.no_grad():
            a, b = model(ids), model(other)
        torch.testing.assert_close(a[:, :cut], b[:, :cut])
        assert not torch.allclose(a[:, cut:], b[:, cut:])


def test_the_order_of_the_past_matters():
    """RoPE is what tells positions apart: without it this would be equal."""
    model = make_model()
    ids = torch.tensor([[1, 2, 3, 4], [3, 2, 1, 4]])
    with torch.no_grad():
        logits = model(ids)[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def cs336_state_dict(d_ff: int) -> dict[str, torch.Tensor]:
    """The names and shapes of the assignment's transformer_lm fixture."""
    shapes = {"token_embeddings.weight": (V, D), "ln_final.weight": (D,), "lm_head.weight": (V, D)}
    for n in range(L):
        p = f"layers.{n}."
        shapes |= {f"{p}attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "output")}
        shapes |= {f"{p}ln1.weight": (D,), f"{p}ln2.weight": (D,)}
        shapes |= {
            f"{p}ffn.w1.weight": (d_ff, D),
            f"{p}ffn.w2.weight": (D, d_ff),
            f"{p}ffn.w3.weight": (d_ff, D),
        }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_a_cs336_state_dict_loads_strictly():
    state = cs336_state_dict(d_ff=40)
    model = make_model(d_ff=40)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state, strict=True)
    assert same(dict(model.state_dict()), state)


def test_d_ff_defaults_to_eight_thirds_rounded_up_to_64():
    for d_model, d_ff in ((24, 64), (32, 128), (96, 256), (512, 1408), (768, 2048), (1024, 2752)):
        layer = TransformerLM(2, d_model, 1, 1, 4).layers[0]
        assert layer.ffn.w1.weight.shape == (d_ff, d_model)


def test_the_initial_loss_is_that_of_a_uniform_guess():
    torch.manual_seed(0)
    model = TransformerLM(1000, 64, 2, 4, 32)
    ids = torch.randint(1000, (4, 33))
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(1000)) < 0.1


def test_tied_embeddings_are_one_matrix():
    tied, untied = make_model(tie_embeddings=True), make_model()
    assert tied.lm_head.weight is tied.token_embeddings.weight
    assert count_parameters(untied) - count_parameters(tied) == V * D
    assert tied.state_dict().keys() == untied.state_dict().keys()
    with torch.no_grad():
        untied.load_state_dict(tied.state_dict())
    ids = random_tokens(2, T)
    for model in (tied, untied):
        model(ids).square().mean().backward()
    # One matrix receives the gradients of both its uses.
    both = untied.lm_head.weight.grad + untied.token_embeddings.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, both)


def test_dropout_only_in_training_mode():
    dropping, plain = make_model(dropout=0.3), make_model()
    ids = random_tokens(2, T)
    with torch.no_grad():
        expected = plain(ids)
        dropping.eval()
        assert torch.equal(dropping(ids), expected)
        dropping.train()
        first, second = dropping(ids), dropping(ids)
        assert not torch.equal(first, expected) and not torch.equal(first, second)
        torch.manual_seed(3)
        third = dropping(ids)
        torch.manual_seed(3)
        assert torch.equal(dropping(ids), third)
    with torch.no_grad():  # also at each place alone: embedding, attention, residual branches
        for place in ("drop", "layers.0.drop", "layers.0.attn"):
            model = make_model().train()
            part = model.get_submodule(place)
            setattr(part, "dropout" if place.endswith("attn") else "p", 0.5)
            assert not torch.equal(model(ids), expected), place


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.2}, RESIDUALS[-1]])
def test_activation_checkpointing_gives_the_same_gradients(settings):
    ids = random_tokens(2, T)
    gradients, forwards = [], []
    for recompute in (False, True):
        model = make_model(**settings, activation_checkpointing=recompute).train()
        calls = []
        # Before, not after it: recomputation stops where the last saved tensor is.
        model.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(5)
        model(ids).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        forwards.append(len(calls))
    assert same(*gradients)
    assert forwards == [1, 2]  # it does recompute


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, *RESIDUALS])
def test_cached_logits_equal_those_of_the_whole_sequence(settings):
    model = make_model(**settings).eval()
    ids = random_tokens(3, T)
    with torch.no_grad():
        expected = model(ids)
        for prompt in (1, 5, T):
            cache, got = KVCache(), []
            got.append(model(ids[:, :prompt], cache))
            for t in range(prompt, T):
                got.append(model(ids[:, t : t + 1], cache))
            assert cache.length == T
            torch.testing.assert_close(torch.cat(got, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [(1, 3, 4), (5, 2, 1), (2, 2, 2)])
def test_several_tokens_after_a_cache_are_causal(pieces):
    model = make_model().eval()
    ids = random_tokens(3, sum(pieces))
    with torch.no_grad():
        cache = KVCache()
        got = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids), rtol=1e-4, atol=1e-4)
    assert cache.length == sum(pieces)


def test_greedy_generation_equals_that_by_whole_forward_passes():
    model = make_model()
    prompt = random_tokens(2, 3)
    got = generate(model, prompt, T - 3, temperature=0)
    expected = prompt
    with torch.no_grad():
        for _ in range(T - 3):
            following = model(expected)[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, following), dim=1)
    assert torch.equal(got, expected)
    assert len(set(got[0, 3:].tolist())) > 2  # not one token repeated, which anything would give


def test_a_cache_takes_the_memory_that_it_was_made_for():
    model, ids = make_model().eval(), random_tokens(3, T)
    cache = KVCache(5)
    with torch.no_grad():
        got = torch.cat([model(piece, cache) for piece in ids[:, :5].split(2, dim=1)], dim=1)
        torch.testing.assert_close(got, model(ids[:, :5]), rtol=1e-4, atol=1e-4)
        assert all(k.shape[2] == v.shape[2] == 5 for k, v in cache._layers.values())
        with pytest.raises(ValueError, match="6 positions: this cache was made for 5"):
            model(ids[:, 5:6], cache)
        assert cache.length == 5
        cache = KVCache(1 << 40)
        model(ids, cache)
        assert all(k.shape[2] == v.shape[2] == T for k, v in cache._layers.values())


def test_a_sequence_that_is_too_long_is_an_error():
    model = make_model()
    with pytest.raises(ValueError, match=f"{T + 1} positions.*built for {T}"):
        model(random_tokens(1, T + 1))
    cache = KVCache()
    with torch.no_grad():
        model(random_tokens(1, T), cache)
        with pytest.raises(ValueError, match=f"{T + 1} positions"):
            model(random_tokens(1, 1), cache)


@pytest.mark.parametrize(
    "d_model, num_heads, message",
    [
        (24, 5, "d_model=24 is not divisible by num_heads=5"),
        (24, 0, "d_model=24 is not divisible by num_heads=0"),
        (24, -3, "d_model=24 is not divisible by num_heads=-3"),
        (24, 8, "d_model=24 over num_heads=8 gives heads of 3; .* even"),
    ],
)
def test_heads_of_impossible_width_are_errors(d_model, num_heads, message):
    with pytest.raises(ValueError, match=message):
        TransformerLM(V, d_model, num_heads, 1, T)


def test_count_parameters():
    d_ff = 40
    model = make_model(d_ff=d_ff)
    expected = 2 * V * D + D + L * (4 * D * D + 3 * D * d_ff + 2 * D)
    assert count_parameters(model) == expected
    model.lm_head.weight.requires_grad_(False)
    assert count_parameters(model) == expected - V * D


@pytest.mark.parametrize(
    "settings", [{}, dict(tie_embeddings=True), dict(num_kv_heads=1, head_dim=16, qkv_bias=True)]
)
def test_the_flop_formula_equals_what_torch_counts(settings):
    B = 2
    model = make_model(**settings)
    counter = FlopCounterMode(display=False)
    with counter:
        model(random_tokens(B, T)).sum().backward()
    by_op = counter.get_flop_counts()["Global"]
    weights = by_op.pop(torch.ops.aten.mm) + by_op.pop(torch.ops.aten.addmm, 0)
    forward = by_op.pop(torch.ops.fastlm.causal_attention)
    backward = by_op.pop(torch.ops.fastlm.causal_attention_gradients)
    assert not by_op
    # Forward two matmuls, backward four, and the scores once more, which the formula leaves out. It
    # takes half of attention's square, which is what the causal mask leaves.
    assert 2 * backward == 5 * forward
    assert training_flops_per_token(model, T) * B * T == weights + 3 * forward / 2
