"""docs/scaling.md holds what bench/scaling.py computes, for the models that fastlm builds."""

import math
from pathlib import Path

import pytest
import scaling
import torch

from fastlm.model import TransformerLM, count_parameters, training_flops_per_token

PAGE = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize("name", scaling.TABLES)
def test_the_page_holds_the_tables(name):
    assert f"\n\n{scaling.TABLES[name]()}\n\n" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("model", scaling.MODELS, ids=lambda model: model.name)
def test_the_models_are_ours(model):
    with torch.device("meta"):
        built = TransformerLM(model.V, model.D, 16, model.L, 32, model.F, tie_embeddings=model.tied)
    assert count_parameters(built) == model.parameters
    assert count_parameters(built.layers[0]) == model.block
    flops = training_flops_per_token(built, model.T)
    assert math.isclose(model.seconds(1) * scaling.FLOPS * scaling.MFU, flops)


def test_times_are_latency_and_bandwidth():
    """Against the formulas of the page, by hand."""
    assert math.isclose(scaling.ring(0, 8), 8.4e-6 + 7 * 3.4e-6)
    assert math.isclose(scaling.ring(0, 1024), 8.4e-6 + 896 * 3.4e-6 + 127 * 9.6e-6)
    per_byte = (scaling.ring(64e9, 64) - scaling.ring(0, 64)) / 64e9
    assert math.isclose(per_byte, 63 / 64 / 320e9)
    assert math.isclose(scaling.all_reduce(0, 64), 4.4e-6 + 2 * (7 * 1.2e-6 + 3 * 8.5e-6))
    engine = scaling.Ddp(scaling.MODELS[0], 1024)
    assert math.isclose(scaling.efficiency(engine, scaling.tokens_for(engine)), 0.9, rel_tol=1e-2)
