"""Bytes and time of a step's collectives on paper: the tables of docs/scaling.md.

    python bench/scaling.py

Nothing is measured here; docs/scaling.md gives the assumptions and their sources.
"""

import math
from dataclasses import dataclass

FLOPS = 989e12  # H100 SXM, bf16, dense
MFU = 0.45  # of the computation alone
GPUS_PER_NODE = 8
NVLINK = 0.8 * 450e9  # bytes/s and direction that a ring reaches within a node
NETWORK = 0.8 * 8 * 50e9  # and between nodes: a ring's channels use all eight NICs
RING_BASE, RING_NVLINK, RING_NETWORK = 8.4e-6, 3.4e-6, 9.6e-6  # s; and per hop
TREE_BASE, TREE_NVLINK, TREE_NETWORK = 4.4e-6, 1.2e-6, 8.5e-6
TCP_HOP = 30e-6  # of gloo
BUCKET = 25 * 2**20  # bytes, DDP's
MEMORY = 80e9
TOKENS = 16_384  # of a GPU in a step: one micro-batch, the hardest case
SIZES = (8, 64, 1024)


@dataclass(frozen=True)
class Model:
    """A TransformerLM: L layers of width D, F feed-forward, V vocabulary, T context."""

    name: str
    L: int
    D: int
    F: int
    V: int
    T: int
    tied: bool

    @property
    def block(self) -> int:
        return 4 * self.D**2 + 3 * self.D * self.F + 2 * self.D

    @property
    def root(self) -> int:
        """Embeddings, head and last norm: FSDP2's outermost group."""
        return self.V * self.D * (1 if self.tied else 2) + self.D

    @property
    def parameters(self) -> int:
        return self.L * self.block + self.root

    def seconds(self, tokens: float) -> float:
        """Forward and backward; a third of it is forward. Per token 6 FLOPs a matmul weight, and
        causal attention (fastlm.model.training_flops_per_token)."""
        weights = self.L * (self.block - 2 * self.D) + self.V * self.D
        flops = 6 * weights + 6 * self.L * self.T * self.D
        return tokens * flops / (FLOPS * MFU)


MODELS = (
    Model("124 M", 12, 768, 2048, 50304, 1024, True),
    Model("1.5 B", 48, 1600, 4288, 50304, 1024, True),
    Model("8 B", 32, 4096, 12288, 128256, 8192, False),
)


def ring(size: float, n: int) -> float:
    """Seconds of an all-gather to, or a reduce-scatter of, `size` bytes over n GPUs."""
    nodes = math.ceil(n / GPUS_PER_NODE)
    latency = RING_BASE + (n - nodes) * RING_NVLINK + (nodes - 1) * RING_NETWORK
    return latency + size * (n - 1) / n / (NVLINK if nodes == 1 else NETWORK)


def all_reduce(size: float, n: int) -> float:
    """A tree's latency, a ring's bandwidth: NCCL takes the better one."""
    nodes = math.ceil(n / GPUS_PER_NODE)
    hops = (GPUS_PER_NODE - 1) * TREE_NVLINK + math.log2(nodes) * TREE_NETWORK
    moved = 2 * size * (n - 1) / n / (NVLINK if nodes == 1 else NETWORK)
    return TREE_BASE + 2 * hops + moved


def vote(n: int) -> float:
    """gloo's all_reduce of a few bytes, a ring over TCP."""
    return 2 * (n - 1) * TCP_HOP


@dataclass(frozen=True)
class Ddp:
    model: Model
    n: int

    @property
    def reduce(self) -> float:
        """All gradients, in buckets."""
        size = 4 * self.model.parameters
        buckets = math.ceil(size / BUCKET)
        return buckets * all_reduce(size / buckets, self.n)

    def exposed(self, tokens: float) -> float:
        """What backward does not hide: the last bucket at least."""
        size = 4 * self.model.parameters
        last = all_reduce(size / math.ceil(size / BUCKET), self.n)
        return max(last, self.reduce - 2 / 3 * self.model.seconds(tokens))

    @property
    def state(self) -> float:
        """Bytes on a GPU: weights, gradients, two moments, all fp32."""
        return 16 * self.model.parameters


@dataclass(frozen=True)
class Fsdp:
    """Blocks gathered in bf16, in forward and in backward; the rest once in fp32."""

    model: Model
    n: int

    @property
    def gather(self) -> float:
        return ring(2 * self.model.block, self.n)

    @property
    def reduce(self) -> float:
        return ring(4 * self.model.block, self.n)

    @property
    def root(self) -> float:
        """Gathered before everything, and reduced behind everything: both take this long."""
        return ring(4 * self.model.root, self.n)

    def exposed(self, tokens: float) -> float:
        """Both go over one communicator, beside the computation of the neighbouring block."""
        m = self.model
        block = m.seconds(tokens) / (m.L + m.root / m.block)
        forward = self.gather + (m.L - 1) * max(0.0, self.gather - block / 3)
        both = self.gather + self.reduce
        backward = self.reduce + (m.L - 1) * max(0.0, both - block * 2 / 3)
        return 2 * self.root + forward + backward

    @property
    def state(self) -> float:
        """Bytes on a GPU; gathered root and its gradient, and two blocks."""
        m = self.model
        return 16 * m.parameters / self.n + 8 * m.root + 2 * 6 * m.block


def efficiency(engine: Ddp | Fsdp, tokens: float) -> float:
    compute = engine.model.seconds(tokens)
    return compute / (compute + engine.exposed(tokens))


def tokens_for(engine: Ddp | Fsdp, wanted: float = 0.9) -> float:
    """The tokens of a GPU and step from which on the step is `wanted` computation."""
    low, high = 1.0, 1e9
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if efficiency(engine, middle) >= wanted else (middle, high)
    return high


def size(number: float) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.3g} GB" if number >= 1e9 else f"{number / 1e6:.3g} MB"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.3g}"


def table(header: str, rows: list[list[str]]) -> str:
    lines = [header, "|".join(["", *["---"] * (header.count("|") - 1), ""])]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def verdict(engine: Ddp | Fsdp) -> list[str]:
    least = tokens_for(engine)
    fits = engine.state <= MEMORY
    of_all = f"{least * engine.n / 1e6:.3g} M"
    return [
        ms(engine.exposed(TOKENS)),
        f"{efficiency(engine, TOKENS):.0%}",
        f"{least:,.0f}",
        of_all,
        size(engine.state) + ("" if fits else ", does not fit"),
    ]


def models() -> str:
    rows = [
        [
            m.name, f"{m.parameters / 1e9:.3g} B", f"{m.L} x {m.D}", size(2 * m.block),
            size(4 * m.block), size(4 * m.root), size(4 * m.parameters), ms(m.seconds(TOKENS)),
        ]
        for m in MODELS
    ]  # fmt: skip
    return table(
        "| model | parameters | layers x width | block, bf16 | block, fp32 | the rest, fp32 "
        "| all, fp32 | compute, ms |",
        rows,
    )


def ddp() -> str:
    rows = []
    for model in MODELS:
        for n in SIZES:
            engine = Ddp(model, n)
            rows.append([model.name, str(n), ms(engine.reduce), *verdict(engine)])
    return table(
        "| model | GPUs | all-reduce, ms | exposed, ms | efficiency | tokens per GPU for 90 % "
        "| per step | state per GPU |",
        rows,
    )


def fsdp() -> str:
    rows = []
    for model in MODELS:
        for n in SIZES:
            engine = Fsdp(model, n)
            times = [
                f"{model.L} x {ms(engine.gather)}", f"{model.L} x {ms(engine.gather)}",
                f"{model.L} x {ms(engine.reduce)}", f"2 x {ms(engine.root)}",
            ]  # fmt: skip
            rows.append([model.name, str(n), *times, *verdict(engine)])
    return table(
        "| model | GPUs | gather, forward, ms | gather, backward, ms | reduce-scatter, ms "
        "| the rest, ms | exposed, ms | efficiency | tokens per GPU for 90 % | per step "
        "| state per GPU |",
        rows,
    )


def scalars() -> str:
    rows = [[str(n), ms(all_reduce(4, n)), ms(vote(n))] for n in SIZES]
    return table("| GPUs | loss, norm: each, ms | vote, ms |", rows)


TABLES = {part.__name__: part for part in (models, ddp, fsdp, scalars)}

if __name__ == "__main__":
    for name, part in TABLES.items():
        print(f"{name}\n\n{part()}\n")
