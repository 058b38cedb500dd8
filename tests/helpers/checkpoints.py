"""Models and optimizers for the tests of checkpoints."""

import torch

from fastlm import AdamW, TransformerLM


def make_model(seed: int = 0, **settings) -> TransformerLM:
    torch.manual_seed(seed)
    arguments = dict(vocab_size=11, d_model=8, num_heads=2, num_layers=1, max_seq_len=8, d_ff=16)
    return TransformerLM(**{**arguments, **settings})


def make_pair(seed: int = 0, steps: int = 2, cls: type = AdamW, **settings):
    """A model and its optimizer after a few steps."""
    model = make_model(seed, **settings)
    optimizer = cls(model.parameters(), lr=1e-2)
    for step in range(steps):
        train_step(model, optimizer, step)
    return model, optimizer


def train_step(model, optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(11, (2, 8), generator=generator)
    model(ids).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def everything(model, optimizer) -> list:
    return [dict(model.state_dict()), optimizer.state_dict()]
