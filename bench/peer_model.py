"""The best composition of existing parts: what fastlm's training step is measured against.

A frozen model of TransformerLM's mathematics, written as is fastest under torch.compile: rotary
positions on halves instead of pairs, torch's SDPA. (Joining the matrices of q, k and v, and those
of w1 and w3, is slower in fp32 and no faster in bf16: LOG.md, 2026-11-26.) And a training step of
torch's own parts around a model.

Shapes: B batch, T positions, D model width, H heads, d = D / H, V vocabulary.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fastlm import TransformerLM
from fastlm.hardware import autocast


class Norm(nn.Module):
    def __init__(self, D: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, 1e-5)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, H, T, d), of which the elements i and i + d/2 are a pair."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.to(x.dtype)


class Block(nn.Module):
    def __init__(self, D: int, H: int, d_ff: int):
        super().__init__()
        self.H = H
        self.ln1, self.ln2 = Norm(D), Norm(D)
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(D, d_ff, bias=False) for _ in range(2))
        self.w2 = nn.Linear(d_ff, D, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.ln1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.H, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(rope(q, cos, sin), rope(k, cos, sin), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        y = self.ln2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class PeerLM(nn.Module):
    """The same function as `model`, in weights of its own: a copy, without dropout."""

    def __init__(self, model: TransformerLM):
        super().__init__()
        state = model.state_dict()
        V, D = state["lm_head.weight"].shape
        H = D // (2 * model.rope_cos.shape[1])
        d_ff = state["layers.0.ffn.w2.weight"].shape[1]
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        if model.lm_head.weight is model.token_embeddings.weight:
            self.head.weight = self.embedding.weight
        self.blocks = nn.ModuleList(Block(D, H, d_ff) for _ in model.layers)
        self.ln = Norm(D)
        for name in ("cos", "sin"):
            self.register_buffer(name, getattr(model, f"rope_{name}").clone(), persistent=False)
        self.load_state_dict(peer_state(state, len(self.blocks), H))
        self.to(model.lm_head.weight.device)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """x, y: (B, T) -> the mean loss, (); without y the logits, (B, T, V)."""
        T = x.shape[1]
        hidden = self.embedding(x)
        for block in self.blocks:
            hidden = block(hidden, self.cos[:T], self.sin[:T])
        logits = self.head(self.ln(hidden))
        return logits if y is None else F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())


def peer_state(state: Mapping[str, Tensor], layers: int, H: int) -> dict[str, Tensor]:
    """A TransformerLM's state dict as a PeerLM's."""
    found = {
        "embedding.weight": state["token_embeddings.weight"],
        "head.weight": state["lm_head.weight"],
        "ln.weight": state["ln_final.weight"],
    }
    for number in range(layers):

        def of(name: str, number: int = number) -> Tensor:
            return state[f"layers.{number}.{name}.weight"]

        q, k = (pairs_to_halves(of(f"attn.{name}"), H) for name in ("q_proj", "k_proj"))
        block = {
            "q": q,
            "k": k,
            "v": of("attn.v_proj"),
            "out": of("attn.output_proj"),
            "w1": of("ffn.w1"),
            "w3": of("ffn.w3"),
            "w2": of("ffn.w2"),
            "ln1": of("ln1"),
            "ln2": of("ln2"),
        }
        found |= {f"blocks.{number}.{name}.weight": weight for name, weight in block.items()}
    return found


def pairs_to_halves(weight: Tensor, H: int) -> Tensor:
    """(D, D) -> (D, D): within each head the rows 0, 2, 4, ... and then 1, 3, 5, ..."""
    return weight.unflatten(0, (H, -1, 2)).transpose(1, 2).flatten(0, 2)


class PeerStep:
    """A training step: compiled forward and backward in `dtype`, clip_grad_norm_, fused AdamW.

    model: called with (x, y), returns the loss, or a tuple that ends with it (nanoGPT).
    groups: for AdamW, as the model's authors form them.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict],
        dtype: torch.dtype,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        max_norm: float = 1.0,
        compiled: bool = True,
    ):
        self.dtype, self.max_norm = dtype, max_norm
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
        self._compiled = torch.compile(model, dynamic=False) if compiled else model

    def run(self, x: Tensor, y: Tensor, lr: float) -> Tensor:
        """x, y: (B, T) -> the loss before the update, ()."""
        return self.accumulate([(x, y)], lr, count=1)

    def accumulate(self, batches: Iterable[tuple[Tensor, Tensor]], lr: float, count: int) -> Tensor:
        """One update by the mean over `count` batches (x, y) -> their mean loss before it, ()."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for x, y in batches:
            with autocast(x.device, self.dtype):
                found = self._compiled(x, y)
            loss = found[-1] if isinstance(found, tuple) else found
            (loss / count).backward()
            losses.append(loss.detach())
        clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack(losses).mean()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices are decayed, vectors are not: the trainer's groups, and nanoGPT's."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
