"""Models of a caller's own, for the tests of what the trainer asks of a model."""

import torch
from torch import Tensor, nn
from training_runs import TINY, VOCAB_SIZE


class Layer(nn.Module):
    """The mean of the positions so far, and a feed-forward part."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        past = normed.cumsum(1) / count
        return x + self.drop(torch.tanh(self.mix(torch.cat((normed, past), -1))))


class Plain(nn.Module):
    """Logits alone, learnt positions, names unlike TransformerLM's."""

    def __init__(
        self,
        vocab_size: int = VOCAB_SIZE,
        width: int = 16,
        depth: int = 2,
        positions: int = TINY["context_len"],
        dropout: float = 0.0,
        tied: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(positions, width)
        self.stack = nn.ModuleList(Layer(width, dropout) for _ in range(depth))
        self.out = nn.Linear(width, vocab_size, bias=bias)
        if tied:
            self.out.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.features(ids))

    def features(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.stack:
            x = layer(x)
        return x


class Fused(Plain):
    """The same with what the fused head takes."""

    @property
    def lm_head(self) -> nn.Linear:
        return self.out

    def hidden(self, ids: Tensor) -> Tensor:
        return self.features(ids)


class Counting(Plain):
    """With buffers that each forward in training changes: in place, and by another tensor."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.norm = nn.BatchNorm1d(self.tokens.embedding_dim)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("expanded", torch.zeros(1, 2).expand(3, 2), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + ids.numel()
        return self.out(self.norm(self.features(ids).transpose(1, 2)).transpose(1, 2))


class Silent(nn.Module):
    """A model without layers that could be compiled one by one."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)
