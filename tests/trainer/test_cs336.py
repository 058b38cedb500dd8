"""fastlm.cs336 against the mathematics of the CS336 assignment, written here anew in fp64.

B batch, T positions, D model width, H heads, d = D / H, F feed-forward width, V vocabulary.
"""

import inspect
import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastlm import TransformerLM, cs336

B, T, D, H, F, V, LAYERS, THETA = 3, 7, 24, 3, 40, 50, 2, 10000.0

PARAMETERS = {  # of the course's adapters, which its tests pass by name
    "get_adamw_cls": "",
    "run_cross_entropy": "inputs targets",
    "run_embedding": "vocab_size d_model weights token_ids",
    "run_get_batch": "dataset batch_size context_length device",
    "run_get_lr_cosine_schedule": (
        "it max_learning_rate min_learning_rate warmup_iters cosine_cycle_iters"
    ),
    "run_gradient_clipping": "parameters max_l2_norm",
    "run_linear": "d_in d_out weights in_features",
    "run_load_checkpoint": "src model optimizer",
    "run_multihead_self_attention": (
        "d_model num_heads q_proj_weight k_proj_weight v_proj_weight o_proj_weight in_features"
    ),
    "run_multihead_self_attention_with_rope": (
        "d_model num_heads max_seq_len theta q_proj_weight k_proj_weight v_proj_weight "
        "o_proj_weight in_features token_positions"
    ),
    "run_rmsnorm": "d_model eps weights in_features",
    "run_rope": "d_k theta max_seq_len in_query_or_key token_positions",
    "run_save_checkpoint": "model optimizer iteration out",
    "run_scaled_dot_product_attention": "Q K V mask",
    "run_silu": "in_features",
    "run_softmax": "in_features dim",
    "run_swiglu": "d_model d_ff w1_weight w2_weight w3_weight in_features",
    "run_transformer_block": "d_model num_heads d_ff max_seq_len theta weights in_features",
    "run_transformer_lm": (
        "vocab_size context_length d_model num_layers num_heads d_ff rope_theta weights in_indices"
    ),
}


# --- the mathematics, in fp64 ---


def rmsnorm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    return x * weight / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps) ** 0.5


def swiglu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    gate = x @ w1.T
    return (gate / (1 + torch.exp(-gate)) * (x @ w3.T)) @ w2.T


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = torch.where(mask, scores, -math.inf)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True) @ v


def rope(x: Tensor, positions: Tensor, theta: float = THETA) -> Tensor:
    """Pairs (x[2i], x[2i+1]) as complex numbers, turned by position * theta^(-2i/d)."""
    d = x.shape[-1]
    angles = positions[..., None].double() * theta ** (-torch.arange(0, d, 2).double() / d)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def self_attention(x: Tensor, q, k, v, o, positions: Tensor | None = None) -> Tensor:
    """Causal, head by head; positions (..., T) turn queries and keys, None leaves them."""
    causal = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
    d, heads = D // H, []
    for head in range(H):
        rows = slice(head * d, (head + 1) * d)
        queries, keys, values = x @ q[rows].T, x @ k[rows].T, x @ v[rows].T
        if positions is not None:
            queries, keys = rope(queries, positions), rope(keys, positions)
        heads.append(attention(queries, keys, values, causal))
    return torch.cat(heads, -1) @ o.T


def block(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    projections = [w[f"attn.{name}_proj.weight"] for name in ("q", "k", "v", "output")]
    positions = torch.arange(x.shape[-2])
    x = x + self_attention(rmsnorm(x, w["ln1.weight"]), *projections, positions=positions)
    weights = [w[f"ffn.w{i}.weight"] for i in (1, 2, 3)]
    return x + swiglu(rmsnorm(x, w["ln2.weight"]), *weights)


def transformer_lm(tokens: Tensor, w: dict[str, Tensor]) -> Tensor:
    x = w["token_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        prefix = f"layers.{layer}."
        x = block(x, {n.removeprefix(prefix): t for n, t in w.items() if n.startswith(prefix)})
    return rmsnorm(x, w["ln_final.weight"]) @ w["lm_head.weight"].T


# --- inputs ---


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def block_shapes() -> dict[str, tuple[int, ...]]:
    """The assignment's names and layouts of one block's weights."""
    attn = {f"attn.{name}_proj.weight": (D, D) for name in ("q", "k", "v", "output")}
    ffn = {"ffn.w1.weight": (F, D), "ffn.w2.weight": (D, F), "ffn.w3.weight": (F, D)}
    return {"ln1.weight": (D,), "ln2.weight": (D,), **attn, **ffn}


def lm_weights() -> dict[str, Tensor]:
    """A state dict as the assignment's model has it, with values that no initialisation gives."""
    shapes = {"token_embeddings.weight": (V, D), "ln_final.weight": (D,), "lm_head.weight": (V, D)}
    for layer in range(LAYERS):
        shapes |= {f"layers.{layer}.{name}": shape for name, shape in block_shapes().items()}
    return {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}


def run_lm(weights, tokens: Tensor, context_length: int = 16) -> Tensor:
    return cs336.run_transformer_lm(
        vocab_size=V,
        context_length=context_length,
        d_model=D,
        num_layers=LAYERS,
        num_heads=H,
        d_ff=F,
        rope_theta=THETA,
        weights=weights,
        in_indices=tokens,
    )


def doubled(tensors):
    if isinstance(tensors, dict):
        return {name: tensor.double() for name, tensor in tensors.items()}
    return [tensor.double() for tensor in tensors]


def assert_equal(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    """fp32 `actual` against fp64 `expected`, shapes included."""
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=atol)


# --- the names ---


def test_every_adapter_but_the_tokenizers_is_there():
    assert set(cs336.__all__) == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_parameter_names(name):
    assert list(inspect.signature(getattr(cs336, name)).parameters) == PARAMETERS[name].split()


# --- layers ---


def test_linear_and_embedding():
    x, weight = torch.randn(B, T, D), torch.randn(F, D)
    assert_equal(cs336.run_linear(D, F, weight, x), x.double() @ weight.double().T, atol=1e-5)
    table, ids = torch.randn(V, D), torch.randint(V, (B, T))
    assert torch.equal(cs336.run_embedding(V, D, table, ids), table[ids])


def test_silu_and_swiglu():
    x = torch.randn(B, T, D) * 5
    assert_equal(cs336.run_silu(x), x.double() / (1 + torch.exp(-x.double())))
    w1, w2, w3 = (torch.randn(s) / s[-1] ** 0.5 for s in ((F, D), (D, F), (F, D)))
    expected = swiglu(*doubled((x, w1, w2, w3)))
    assert_equal(cs336.run_swiglu(D, F, w1, w2, w3, x), expected, atol=1e-5)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax_with_and_without_large_values(dim):
    x = torch.randn(3, 4, 5)
    weights = torch.exp(x.double())
    expected = weights / weights.sum(dim, keepdim=True)
    assert_equal(cs336.run_softmax(x, dim=dim), expected)
    assert_equal(cs336.run_softmax(x + 100, dim=dim), expected, atol=1e-5)
    assert torch.isfinite(cs336.run_softmax(x * 1e4, dim=dim)).all()


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rmsnorm(eps):
    x, weight = torch.randn(B, T, D), torch.randn(D)
    assert_equal(cs336.run_rmsnorm(D, eps, weight, x), rmsnorm(x.double(), weight.double(), eps))


@pytest.mark.parametrize("batch", [(B,), (2, B)])
@pytest.mark.parametrize("masked", [False, True])
def test_scaled_dot_product_attention(batch, masked):
    queries, keys = 5, 9
    q, k = torch.randn(*batch, queries, 8), torch.randn(*batch, keys, 8)
    v, mask = torch.randn(*batch, keys, 8), torch.rand(*batch, queries, keys) > 0.5
    mask[..., 0] = True  # a query that sees nothing has no defined output
    mask = mask if masked else None
    expected = attention(*doubled((q, k, v)), mask)
    assert_equal(cs336.run_scaled_dot_product_attention(q, k, v, mask), expected)


@pytest.mark.parametrize("shape", [(T,), (1, T), (B, T)])
def test_rope(shape):
    x = torch.randn(B, T, D)
    positions = torch.randint(0, 100, shape)
    assert_equal(cs336.run_rope(D, THETA, 100, x, positions), rope(x, positions), atol=1e-5)
    assert torch.equal(cs336.run_rope(D, THETA, 100, x, torch.zeros(T, dtype=torch.long)), x)


def test_multihead_self_attention():
    x, weights = torch.randn(B, T, D), [torch.randn(D, D) / D**0.5 for _ in range(4)]
    actual = cs336.run_multihead_self_attention(D, H, *weights, x)
    assert_equal(actual, self_attention(x.double(), *doubled(weights)), atol=1e-5)


@pytest.mark.parametrize("shape", [None, (T,), (1, T), (B, T)])
def test_multihead_self_attention_with_rope(shape):
    x, weights = torch.randn(B, T, D), [torch.randn(D, D) / D**0.5 for _ in range(4)]
    positions = torch.arange(T) if shape is None else torch.randint(0, 64, shape)
    given = None if shape is None else positions
    actual = cs336.run_multihead_self_attention_with_rope(D, H, 64, THETA, *weights, x, given)
    expected = self_attention(x.double(), *doubled(weights), positions=positions)
    assert_equal(actual, expected, atol=1e-5)


def test_transformer_block():
    x = torch.randn(B, T, D)
    weights = {name: torch.randn(s) / s[-1] ** 0.5 for name, s in block_shapes().items()}
    actual = cs336.run_transformer_block(D, H, F, 16, THETA, weights, x)
    assert_equal(actual, block(x.double(), doubled(weights)), atol=1e-5)


# --- the model ---


def test_attention_of_odd_heads_and_of_one_batch_of_positions():
    weights = [torch.randn(6, 6) for _ in range(4)]
    x = torch.randn(2, 5, 6)
    q, k, v = (functional.linear(x, w).unflatten(-1, (2, 3)).transpose(1, 2) for w in weights[:3])
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)
    found = cs336.run_multihead_self_attention(6, 2, *weights, x)
    torch.testing.assert_close(found, functional.linear(y, weights[3]))
    arguments = (8, 2, 10, 1e4, *(torch.randn(8, 8) for _ in range(4)), torch.randn(5, 8))
    expected = cs336.run_multihead_self_attention_with_rope(*arguments, torch.arange(5))
    found = cs336.run_multihead_self_attention_with_rope(*arguments, torch.arange(5)[None])
    torch.testing.assert_close(found, expected)


def test_weights_that_are_missing_are_named():
    model = TransformerLM(20, 8, 2, 1, 6, d_ff=16)
    weights = dict(model.named_parameters())
    del weights["layers.0.ffn.w2.weight"]
    with pytest.raises(ValueError, match=r"weights has no layers\.0\.ffn\.w2\.weight$"):
        cs336.run_transformer_lm(20, 6, 8, 1, 2, 16, 1e4, weights, torch.zeros(1, 3).long())
    with pytest.raises(ValueError, match=r"weights has no ln1\.weight and 8 more"):
        cs336.run_transformer_block(8, 2, 16, 6, 1e4, {}, torch.randn(1, 3, 8))


@pytest.mark.parametrize("length", [16, 5, 1])
def test_transformer_lm(length):
    weights, tokens = lm_weights(), torch.randint(V, (B, length))
    actual = run_lm(weights, tokens)
    assert actual.shape == (B, length, V)
    assert_equal(actual, transformer_lm(tokens, doubled(weights)), atol=1e-5)


def test_a_state_dict_of_the_assignment_loads():
    weights, tokens = lm_weights(), torch.randint(V, (B, T))
    model = TransformerLM(V, D, H, LAYERS, 16, F, THETA)
    model.load_state_dict(weights, strict=True)
    assert set(model.state_dict()) == set(weights)
    expected = run_lm(weights, tokens)
    assert torch.equal(model(tokens), expected)
    assert torch.equal(run_lm(model, tokens), expected)


def test_gradients_reach_the_weights_that_are_given():
    model, tokens = TransformerLM(V, D, H, LAYERS, 16, F, THETA), torch.randint(V, (B, T))
    cotangent = torch.randn(B, T, V)
    (model(tokens) * cotangent).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}

    for weights in (dict(model.named_parameters()), model):
        model.zero_grad()
        (run_lm(weights, tokens) * cotangent).sum().backward()
        for name, p in model.named_parameters():
            assert p.grad.abs().sum() > 0, name
            torch.testing.assert_close(p.grad, expected[name], msg=name)

    # A state dict holds detached tensors: nothing can reach the model through them.
    assert not run_lm(model.state_dict(), tokens).requires_grad


# --- loss, clipping, optimizer, schedule ---


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_cross_entropy(scale):
    inputs, targets = torch.rand(8, 5) * scale, torch.randint(5, (8,))
    x = inputs.double()
    shifted = x - x.amax(-1, keepdim=True)
    log_probabilities = shifted - shifted.exp().sum(-1, keepdim=True).log()
    expected = -log_probabilities[torch.arange(8), targets].mean()
    assert_equal(cs336.run_cross_entropy(inputs, targets), expected, atol=1e-4)


@pytest.mark.parametrize("container", [tuple, list, iter, lambda p: (q for q in p)])
@pytest.mark.parametrize("max_norm", [1e-2, 1e3])
def test_gradient_clipping(container, max_norm):
    values = [torch.randn(5, 5) for _ in range(6)]

    def with_gradients() -> list[nn.Parameter]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        parameters[-1].requires_grad_(False)  # frozen: it has no gradient
        torch.cat(parameters).square().sum().backward()
        return parameters

    expected, actual = with_gradients(), with_gradients()
    torch.nn.utils.clip_grad_norm_(expected, max_norm)
    cs336.run_gradient_clipping(container(actual), max_norm)
    assert actual[-1].grad is None
    for ours, torchs, value in zip(actual[:-1], expected[:-1], values, strict=False):
        torch.testing.assert_close(ours.grad, torchs.grad, rtol=1e-5, atol=1e-8)
        assert torch.equal(ours.grad, 2 * value) == (max_norm == 1e3)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in actual[:-1]))
    assert total <= max_norm * (1 + 1e-6)


def test_adamw_over_1000_steps():
    def train(optimizer_class) -> Tensor:
        torch.manual_seed(42)
        model = nn.Linear(3, 2, bias=False)
        optimizer = optimizer_class(
            model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
        )
        for _ in range(1000):
            optimizer.zero_grad()
            x = torch.rand(3)
            wanted = torch.stack((x[0] + x[1], -x[2]))
            (model(x) - wanted).square().sum().backward()
            optimizer.step()
        return model.weight.detach()

    assert issubclass(cs336.get_adamw_cls(), torch.optim.Optimizer)
    # The course allows 1e-4. torch's own rounding of 1 - lr * weight_decay is 5e-6 by then.
    torch.testing.assert_close(
        train(cs336.get_adamw_cls()), train(torch.optim.AdamW), rtol=0, atol=1e-5
    )


def test_lr_cosine_schedule():
    def rate(it: int) -> float:
        return cs336.run_get_lr_cosine_schedule(
            it=it,
            max_learning_rate=1,
            min_learning_rate=0.1,
            warmup_iters=7,
            cosine_cycle_iters=21,
        )

    warmup = [it / 7 for it in range(7)]
    cosine = [0.1 + 0.45 * (1 + math.cos(math.pi * (it - 7) / 14)) for it in range(7, 21)]
    expected = [*warmup, *cosine, 0.1, 0.1, 0.1, 0.1]
    assert (expected[0], expected[7], round(expected[14], 12)) == (0, 1, 0.55)
    np.testing.assert_allclose([rate(it) for it in range(25)], expected, rtol=1e-12)


# --- data and checkpoints ---


@pytest.mark.parametrize("dtype", ["int64", "uint16"])
def test_get_batch_draws_every_start_equally_often(dtype):
    tokens, length, batch, rounds = 100, 7, 32, 1000
    dataset = np.arange(tokens, dtype=dtype)
    counts = np.zeros(tokens, dtype=int)
    for _ in range(rounds):
        x, y = cs336.run_get_batch(dataset, batch_size=batch, context_length=length, device="cpu")
        assert x.shape == y.shape == (batch, length)
        assert x.dtype == y.dtype == torch.int64
        assert torch.equal(x[:, 1:] - x[:, :-1], torch.ones(batch, length - 1, dtype=torch.int64))
        assert torch.equal(y, x + 1)
        counts += np.bincount(x[:, 0], minlength=tokens)

    starts = tokens - length  # 0 … 92: the window after the last start would want a token more
    assert counts[starts:].sum() == 0
    mean = batch * rounds / starts
    sigma = math.sqrt(batch * rounds / starts * (1 - 1 / starts))
    assert abs(counts[:starts] - mean).max() < 5 * sigma


def test_get_batch_refuses_a_device_that_is_not_there():
    with pytest.raises(RuntimeError) as error:
        cs336.run_get_batch(np.arange(100), batch_size=32, context_length=7, device="cuda:99")
    reasons = ("CUDA error", "Torch not compiled with CUDA enabled", "finds no usable GPU")
    assert any(reason in str(error.value) for reason in reasons)


@pytest.mark.parametrize("kind", ["path", "string", "file object"])
def test_checkpoint_round_trip(tmp_path, kind):
    def network() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        optimizer = cs336.get_adamw_cls()(
            model.parameters(), lr=1e-3, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-8
        )
        return model, optimizer

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for step in range(steps):
            optimizer.zero_grad()
            model(torch.linspace(0, 1 + step, 20)).square().sum().backward()
            optimizer.step()

    model, optimizer = network()
    train(model, optimizer, 10)
    target = {"path": tmp_path / "c.pt", "string": str(tmp_path / "c.pt")}.get(kind, io.BytesIO())
    cs336.run_save_checkpoint(model, optimizer, iteration=10, out=target)
    if kind == "file object":
        target.seek(0)

    new_model, new_optimizer = network()
    loaded = cs336.run_load_checkpoint(src=target, model=new_model, optimizer=new_optimizer)
    assert loaded == 10
    assert new_optimizer.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    states = optimizer.state_dict()["state"], new_optimizer.state_dict()["state"]
    assert states[0].keys() == states[1].keys() and len(states[0]) == 4
    for index, state in states[0].items():
        assert state.keys() == states[1][index].keys()
        assert all(torch.equal(state[name], states[1][index][name]) for name in state)
    # What was loaded trains on as if nothing had happened.
    for network_ in ((model, optimizer), (new_model, new_optimizer)):
        train(*network_, 3)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, new_model.state_dict()[name]), name
