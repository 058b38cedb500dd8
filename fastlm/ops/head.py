"""The output head chunk by chunk: logits of some rows, their losses, and what flows back from them.

Device-agnostic: matmuls of torch around the row kernels of either device.
Shapes: N rows, D model width, V vocabulary, R rows of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.cross_entropy_op import RowKernels, fp32
from fastlm.kernels.loss_options import Options

# Bytes of a chunk's scratch by default: on a CPU six chunks at Llama 3's head (V = 128256,
# D = 4096) and 8192 rows in bf16, less than a quarter of the logits.
_SCRATCH = 480 << 20
# But no less than this: each chunk reads the weight and adds to all of its gradient, 8 bytes an
# element read and written beside 6 FLOPs a row. On a GPU, whose ratio of FLOPs to bytes is 200 to
# 300, that takes a quarter of the time of a chunk of 1,536 rows, and a tenth of one of 4,096.
_LEAST_ROWS = 1024
_LEAST_ROWS_GPU = 4096
# Chunks are multiples of this: matmuls want it, and slices of targets stay aligned.
_ROWS = 256
# Vocabulary rows whose gradient one matmul makes if it cannot write fp32 from 16-bit operands: few
# enough that the 16-bit product is still in the cache when it is added in fp32.
_SLICE = 2048
# Columns whose bias gradient is summed at a time on the CPU: torch widens 16-bit terms in memory.
_COLUMNS = 256


@dataclass(frozen=True)
class LinearCrossEntropyPlan:
    """How linear_cross_entropy_loss splits its work. Bytes beyond inputs and returned gradients."""

    rows_per_chunk: int  # whose logits exist at a time
    chunks: int
    scratch_bytes: int  # of a chunk: its logits and what goes with them
    weight_bytes: int  # whatever the chunks: the weight's cast, the fp32 sum of its gradient

    @property
    def extra_bytes(self) -> int:
        return self.scratch_bytes + self.weight_bytes


class Head:
    """logits = hidden @ weight.T + bias in `dtype`, and what computing them costs in memory.

    fp8: that product, not those of the gradients, reads its operands in float8_e4m3fn.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, fp8: bool = False):
        self.weight, self.bias, self.dtype, self.fp8 = weight, bias, dtype, fp8
        self.V, self.D = weight.shape
        self.on_cpu = weight.device.type == "cpu"

    @property
    def sliced(self) -> bool:
        """Can torch not write fp32 from 16-bit operands? True on CPUs, up to torch 2.14."""
        return self.on_cpu and self.dtype != torch.float32

    def plan(self, N: int, budget: int | None) -> LinearCrossEntropyPlan:
        """Everything in one chunk if that fits. budget: for scratch and weight together; None: a
        default for the scratch alone. ValueError, naming the least, for a budget too small."""
        if budget is None:
            least = _LEAST_ROWS if self.on_cpu else _LEAST_ROWS_GPU
            most = max(_SCRATCH // self._row_bytes() // _ROWS * _ROWS, least)
        elif self._plan(N, 1).extra_bytes <= budget:
            most = N
        else:
            most = (budget - self._plan(0, 2).extra_bytes) // self._row_bytes()
            most = most // _ROWS * _ROWS if most >= _ROWS else most
            if most < 1:
                least, whole = self._plan(1, 2), self._plan(N, 1)
                raise ValueError(
                    f"memory_budget={budget}: it must be at least "
                    f"{min(least.extra_bytes, whole.extra_bytes):,} bytes, {least.weight_bytes:,} "
                    f"of them for the weight; one chunk takes {whole.extra_bytes:,}, and None "
                    f"chooses chunks of {min(N, self.plan(N, None).rows_per_chunk):,} rows"
                )
        if most >= N:
            return self._plan(N, min(N, 1))
        chunks = -(-N // most)
        rows = -(-N // chunks)  # chunks of one size
        if most >= _ROWS:
            rows = -(-rows // _ROWS) * _ROWS
        return self._plan(rows, -(-N // rows))

    def _plan(self, rows: int, chunks: int) -> LinearCrossEntropyPlan:
        size, elements = self.dtype.itemsize, self.V * self.D
        weight = elements * size if self.weight.dtype != self.dtype else 0
        # The fp32 sum of the weight's gradient, unless that is what is returned, or one product.
        if self.weight.dtype != torch.float32 and (chunks > 1 or self.weight.dtype != self.dtype):
            weight += 4 * elements
        if self.bias is not None:
            weight += 8 * self.V  # cast, and the fp32 gradient
        if self.fp8:
            weight += elements * (1 + size)  # float8, and what is rounded to it
        scratch = rows * self._row_bytes()
        if self.sliced:
            scratch += min(_SLICE, self.V) * self.D * size
        return LinearCrossEntropyPlan(rows, chunks, scratch, weight)

    def _row_bytes(self) -> int:
        """For each row of a chunk: logits, hidden and its gradient, row results."""
        total = (self.V + 2 * self.D) * self.dtype.itemsize + 4 * self.D + 64
        if self.sliced and self.dtype == torch.float16:
            total += 4 * (self.D + min(_SLICE, self.V))  # what fp32 products read
        return total + 4 * _COLUMNS if self.bias is not None and self.on_cpu else total


def head_losses(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64, checked
    options: Options,
    *,
    all_lse: bool,
    gradient_scale: Tensor | None,  # 0-d fp32; None: no gradients
    wanted: list[bool],  # the gradients of hidden, weight, bias
    memory_budget: int | None,
    num_valid: int | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """(losses (N,), lse (N,) if all_lse, the kernels' `saved` if there is no gradient_scale,
    gradients of gradient_scale * sum of losses); what is not asked for has no rows.

    Ignored rows are left out if all_lse does not ask for them and their number is known.
    """
    N, device = targets.numel(), hidden.device
    losses = fp32(N, device).zero_()
    lse = fp32(N if all_lse else 0, device)
    saved = kernels.empty_saved(N if gradient_scale is None else 0, device).zero_()
    kept = None if all_lse else _rows_that_count(targets, options.ignore_index, num_valid)
    chunks = Chunks(head, hidden, kept, memory_budget)
    sums = GradientSums(chunks, wanted if gradient_scale is not None else [False] * 3)
    for rows, x, logits in chunks:
        losses[rows], row_lse, row_saved, gradient = kernels.row_losses(
            logits, _take(targets, rows), options, all_lse=all_lse, gradient_scale=gradient_scale,
            out=logits,
        )  # fmt: skip
        if all_lse:
            lse[rows] = row_lse
        if gradient is None:
            saved[rows] = row_saved
        else:
            sums.add(rows, x, gradient)
    if num_valid is not None and device.type != "cpu":
        # Rows left out because the number was too small: seen without waiting for the device.
        counted = (targets != options.ignore_index).sum()
        losses = torch.where(counted == num_valid, losses, torch.nan)
    return losses, lse, saved, sums.results()


def head_gradients(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64
    saved: Tensor,  # (N, ...), by head_losses
    grad_losses: Tensor | None,  # (N,) or 0-d fp32
    grad_lse: Tensor | None,  # (N,) fp32
    options: Options,
    *,
    wanted: list[bool],
    memory_budget: int | None,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias; the logits are computed again."""
    kept = None
    if grad_lse is None:
        kept = _rows_that_count(targets, options.ignore_index, None)
    chunks = Chunks(head, hidden, kept, memory_budget)
    sums = GradientSums(chunks, wanted)
    for rows, x, logits in chunks:
        kernels.row_gradients(
            logits, _take(targets, rows), _take(saved, rows), _of_rows(grad_losses, rows),
            _of_rows(grad_lse, rows), options, logits,
        )  # fmt: skip
        sums.add(rows, x, logits)
    return sums.results()


class Chunks:
    """Iterates over (rows, their hidden states (R, D), their logits (R, V)); the logits of every
    chunk have the same memory. rows: a slice of all N, or a piece of the indices `kept`."""

    def __init__(self, head: Head, hidden: Tensor, kept: Tensor | None, memory_budget: int | None):
        self.head, self.hidden, self.kept = head, hidden.detach(), kept
        self.weight = head.weight.detach().to(head.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(head.dtype)
        self.weight_fp8 = to_fp8(self.weight) if head.fp8 else None
        self.rows_per_chunk = head.plan(len(hidden), memory_budget).rows_per_chunk
        count = len(hidden if kept is None else kept)
        starts = range(0, count, max(self.rows_per_chunk, 1))
        self.bounds = [slice(i, min(i + self.rows_per_chunk, count)) for i in starts]

    def __iter__(self) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
        memory = self.weight.new_empty(self.rows_per_chunk, self.head.V)
        for bound in self.bounds:
            rows = bound if self.kept is None else self.kept[bound]
            x = _take(self.hidden, rows).to(self.head.dtype)
            logits = memory[: len(x)]
            if self.weight_fp8 is not None:
                fp8_product(to_fp8(x), self.weight_fp8, out=logits)
                if self.bias is not None:
                    logits += self.bias
            elif self.bias is None:
                torch.mm(x, self.weight.t(), out=logits)
            else:
                torch.addmm(self.bias, x, self.weight.t(), out=logits)
            yield rows, x, logits


class GradientSums:
    """Gradients of hidden (N, D), weight (V, D) and bias (V,), summed over chunks in fp32."""

    def __init__(self, chunks: Chunks, wanted: list[bool]):
        self.head, self.chunks, self.first = chunks.head, chunks, True
        self.hidden = dense_zeros(chunks.hidden) if wanted[0] else None
        self.weight_wanted = wanted[1]
        self.weight: Tensor | None = None  # the sum so far
        self.bias = fp32(self.head.V, chunks.hidden.device).zero_() if wanted[2] else None

    def add(self, rows: slice | Tensor, x: Tensor, grad_logits: Tensor) -> None:
        """x: (R, D), grad_logits: (R, V), both in the head's dtype."""
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(grad_logits, self.chunks.weight).to(self.hidden.dtype)
        if self.bias is not None:
            width = _COLUMNS if self.head.on_cpu else self.head.V
            for begin in range(0, self.head.V, width):
                columns = slice(begin, begin + width)
                self.bias[columns] += grad_logits[:, columns].sum(0, dtype=torch.float32)
        if self.weight_wanted:
            self._add_weight(x, grad_logits.t())
        self.first = False

    def _add_weight(self, x: Tensor, grad_logits: Tensor) -> None:
        """x: (R, D), grad_logits: (V, R)."""
        if len(self.chunks.bounds) == 1 and x.dtype == self.head.weight.dtype:
            self.weight = torch.mm(grad_logits, x)  # summed in fp32 inside, rounded once
            return
        if self.weight is None:
            self.weight = fp32((self.head.V, self.head.D), x.device)
        if x.dtype == torch.float32:
            beta = 0 if self.first else 1
            torch.addmm(self.weight, grad_logits, x, beta=beta, out=self.weight)
        elif self.head.sliced:
            wide = x.float() if x.dtype == torch.float16 else None
            for begin in range(0, self.head.V, _SLICE):
                part, sum = (t[begin : begin + _SLICE] for t in (grad_logits, self.weight))
                if wide is not None:  # a product in fp16 may overflow, or lose what is small
                    torch.addmm(sum, part.float(), wide, beta=0 if self.first else 1, out=sum)
                    continue
                bits = torch.mm(part, x).view(torch.int16)
                extension().accumulate(sum.numpy(), bits.numpy(), "bfloat16", self.first)
        elif self.first:
            torch.mm(grad_logits, x, out_dtype=torch.float32, out=self.weight)
        else:
            torch.addmm(self.weight, grad_logits, x, out_dtype=torch.float32, out=self.weight)

    def results(self) -> list[Tensor | None]:
        """In the parameters' own dtypes; zeros where no row counted."""
        weight = self.weight
        if self.weight_wanted and weight is None:
            weight = dense_zeros(self.head.weight)
        like = (None, self.head.weight, self.head.bias)
        return [
            g if g is None or p is None else g.to(p.dtype)
            for g, p in zip((self.hidden, weight, self.bias), like, strict=True)
        ]


def dense_zeros(x: Tensor) -> Tensor:
    """As the ops' fakes and scaling have gradients: whatever the strides of x."""
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values float8_e4m3fn, scale 0-d fp32), x about values * scale. Nothing waits for the device.

    The scale is a power of two, so that dividing by it rounds nothing, and the largest magnitude
    becomes 224 to 448, the largest number of the type.
    """
    x = x.detach()
    largest = fp32((), x.device).zero_()  # of no numbers
    if x.numel():
        largest = torch.linalg.vector_norm(x, torch.inf).float()
    _, exponent = torch.frexp(largest / torch.finfo(torch.float8_e4m3fn).max)
    least = -15 if x.dtype == torch.float16 else -126  # whose inverse is a number, too
    scale = torch.ldexp(torch.ones_like(largest), exponent.clamp_min(least))
    return (x * (1 / scale).to(x.dtype)).to(torch.float8_e4m3fn), scale


def fp8_product(
    x: tuple[Tensor, Tensor],  # (R, D), by to_fp8
    weight: tuple[Tensor, Tensor],  # (V, D)
    *,
    out: Tensor,  # (R, V)
) -> None:
    """out = x @ weight.T, summed in fp32 (on a GPU in the tensor cores' somewhat narrower sums)."""
    (a, scale_a), (b, scale_b) = x, weight
    if len(a):
        torch._scaled_mm(
            a, b.t(), scale_a, scale_b, out_dtype=out.dtype, use_fast_accum=True, out=out
        )


def _rows_that_count(targets: Tensor, ignore_index: int, num_valid: int | None) -> Tensor | None:
    """Indices of the rows that are not ignored; None for all, or where that is not known here."""
    counts = targets != ignore_index
    if targets.device.type == "cpu":
        kept = counts.nonzero().view(-1)
        return None if len(kept) == len(targets) else kept
    if num_valid is None or num_valid == len(targets):
        return None
    # A stable sort brings them to the front in order, without the host knowing how many there are.
    return torch.argsort((~counts).to(torch.uint8), stable=True)[:num_valid]


def _take(x: Tensor, rows: slice | Tensor) -> Tensor:
    return x[rows] if isinstance(rows, slice) else x.index_select(0, rows)


def _of_rows(x: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    return x if x is None or x.dim() == 0 else _take(x, rows)
