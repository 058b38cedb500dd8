"""The parts of the benches that need no quiet machine: peers, profiles, curves."""

from types import SimpleNamespace

import pytest
import race
import step_profile
import torch
import torch.nn.functional as F
from peer_model import PeerLM, PeerStep, decay_groups

from fastlm import TransformerLM


@pytest.mark.parametrize("tied", [False, True])
def test_the_composition_trains_the_same_function(tied):
    model = TransformerLM(50, d_model=32, num_heads=2, num_layers=2, max_seq_len=16,
                          tie_embeddings=tied)  # fmt: skip
    peer = PeerLM(model)
    x, y = torch.randint(50, (2, 3, 16))
    loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    torch.testing.assert_close(peer(x, y), loss)
    loss.backward()
    peer(x, y).backward()
    for mine, theirs in (
        (model.token_embeddings.weight, peer.embedding.weight),
        (model.layers[0].ln1.weight, peer.blocks[0].ln1.weight),
    ):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-7)
    assert sum(p.numel() for p in peer.parameters()) == sum(p.numel() for p in model.parameters())


def test_a_peers_step_clips_and_takes_the_last_of_what_a_model_returns(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)

    class Squared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1, 1))

        def forward(self, x, y):
            return x, (self.weight * x - y).square().sum()

    model = Squared()
    step = PeerStep(model, decay_groups(model, 0.0), torch.float32, max_norm=0.25)
    seen = []
    step.optimizer.register_step_pre_hook(lambda *_: seen.append(float(model.weight.grad)))
    assert float(step.run(torch.tensor(3.0), torch.tensor(0.0), lr=0.5)) == 9
    assert seen == [pytest.approx(0.25)]
    assert model.weight.item() == pytest.approx(0.5)  # AdamW's first update has the rate's size


def event(name: str, parent=None):
    return SimpleNamespace(name=name, cpu_parent=parent)


def test_an_event_counts_where_its_innermost_kind_is():
    graph = event("## Call CompiledFxGraph abc ##", event("CompiledFunction"))
    loss = event("fastlm::linear_cross_entropy_loss")
    cases = {
        "pointwise": graph,
        "matmul": event("aten::mm", loss),
        "loss": event("aten::fill_", loss),
        "attention": event("aten::zeros", event("fastlm::causal_attention_backward", graph)),
        "optimizer": event("aten::mm", event("Optimizer.step#Muon.step")),
        "data": event("aten::empty", event("data")),
    }
    assert {kind: step_profile.kind_of(found) for kind, found in cases.items()} == {
        kind: kind for kind in cases
    }
    assert step_profile.kind_of(event("aten::add_", event("CompiledFunction"))) is None


def test_a_steps_split_adds_up_to_its_time():
    a = torch.randn(400, 400)

    def step():
        for _ in range(20):
            a @ a
        with torch.profiler.record_function("data"):
            sum(range(1000))

    split = step_profile.split_of_step(step)
    assert set(split) == {*step_profile.KINDS, "other"}
    assert split["data"] > 0 and split["other"] > 0
    assert split["attention"] == split["loss"] == split["optimizer"] == 0
    assert split["matmul"] > 0.5 * sum(split.values())


def test_a_runs_curve_is_over_the_seconds_of_its_steps():
    config = {"batch_size": 2, "context_len": 50, "grad_accum": 1}
    summary = {"steps": 30, "step_seconds": 4.0, "compile_seconds": 9.0, "bits_per_byte": 1.5}
    rows = [
        {"event": "start", "step": 0, "config": config},
        {"event": "train", "step": 0, "tokens_per_second": 100.0},  # 1 step: 1 s
        {"event": "train", "step": 20, "tokens_per_second": 1000.0},  # 20 steps: 2 s
        {"event": "val", "step": 20, "val_loss": 3.5},
        {"event": "val", "step": 29, "val_loss": 3.0},
        {"event": "summary", "step": 30, "tokens_per_second": 750.0, **summary},
    ]
    found = race.points_of(rows)
    assert found["curve"] == [(3.0, 3.5)]
    assert found["seconds"] == 4.0 and found["bits_per_byte"] == 1.5


def test_nanogpts_rate_rises_and_falls_to_a_tenth():
    rates = [race.nanogpt_rate(step, 1000, 1e-3) for step in range(1000)]
    assert rates[0] < rates[99] < rates[100] == 1e-3
    assert rates[101:] == sorted(rates[101:], reverse=True)
    assert rates[-1] == pytest.approx(1e-4, rel=1e-3)
