"""The output head chunk by chunk: logits of some rows, their losses, and what flows back from them.

Device-agnostic: matmuls of torch around the row kernels of either device.
Shapes: N rows, D model width, V vocabulary, R rows of a chunk.
"""

import torch
from torch import Tensor

from fastlm.extension import extension
from fastlm.kernels.arguments import Options
from fastlm.kernels.cross_entropy_op import RowKernels

# Vocabulary rows whose gradient one matmul makes on the CPU, which cannot write fp32 from 16-bit
# operands: few enough that the 16-bit product is still in the cache when it is added in fp32.
_SLICE = 2048
# Columns whose bias gradient is summed at a time there: torch widens 16-bit terms in memory first.
_COLUMNS = 256


class Head:
    """logits = hidden @ weight.T + bias in `dtype`, and what computing them costs in memory."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self.V, self.D = weight.shape
        self.sliced = weight.device.type == "cpu" and dtype != torch.float32

    def fixed_bytes(self, chunks: int) -> int:
        """Extra memory whatever the chunks' size."""
        size = self.dtype.itemsize
        total = self.V * self.D * size if self.weight.dtype != self.dtype else 0
        # The fp32 sum of the weight's gradient, unless that is what is returned, or one product.
        if self.weight.dtype != torch.float32 and (chunks > 1 or self.weight.dtype != self.dtype):
            total += 4 * self.V * self.D
        if self.sliced:
            total += min(_SLICE, self.V) * self.D * size
        if self.bias is not None:
            total += 8 * self.V  # cast, and the fp32 gradient
        return total

    def bytes_per_row(self) -> int:
        """Extra memory for each row of a chunk: logits, hidden and its gradient, row results."""
        total = (self.V + 2 * self.D) * self.dtype.itemsize + 4 * self.D + 64
        return total + 4 * _COLUMNS if self.bias is not None and self.sliced else total


def head_losses(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64
    options: Options,
    *,
    all_lse: bool,
    gradient_scale: Tensor | None,  # 0-d fp32; None: no gradients
    wanted: list[bool],  # the gradients of hidden, weight, bias
    rows_per_chunk: int,
    num_valid: int | None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """(losses, lse: (N,) fp32, stats, gradients of gradient_scale * sum of losses).

    Ignored rows are left out where all_lse does not ask for them and their number is known.
    """
    hidden = hidden.detach()
    N, device = targets.numel(), hidden.device
    losses = torch.zeros(N, device=device)
    lse = torch.zeros(N, device=device)
    stats = torch.zeros(N, kernels.STATS_COLUMNS, dtype=torch.float64, device=device)
    if gradient_scale is None:
        wanted = [False] * 3
    kept = None if all_lse else _rows_that_count(targets, options.ignore_index, num_valid)
    chunks = chunks_of(kept, N, rows_per_chunk)
    sums = GradientSums(head, hidden, wanted, len(chunks))
    compute = LogitsOf(head, min(rows_per_chunk, N))
    for rows in chunks:
        x, y = _take(hidden, rows).to(head.dtype), _take(targets, rows)
        logits = compute(x)
        row_stats = stats.new_empty(len(y), kernels.STATS_COLUMNS)
        losses[rows], lse[rows], _ = kernels.row_losses(
            logits,
            y,
            options,
            all_lse=all_lse,
            gradient_scale=gradient_scale if any(wanted) else None,
            out=logits if any(wanted) else None,
            stats=row_stats,
        )
        stats[rows] = row_stats
        if any(wanted):
            sums.add(rows, x, compute.weight, logits)
    if num_valid is not None and device.type != "cpu":
        # Rows left out because the number was too small: seen without waiting for the device.
        counted = (targets != options.ignore_index).sum()
        losses = torch.where(counted == num_valid, losses, torch.nan)
    return losses, lse, stats, sums.results()


def head_gradients(
    kernels: RowKernels,
    hidden: Tensor,  # (N, D)
    head: Head,
    targets: Tensor,  # (N,) int64
    lse: Tensor,  # (N,) fp32
    stats: Tensor,  # (N, STATS_COLUMNS) fp64
    grad_losses: Tensor | None,  # (N,) or 0-d fp32
    grad_lse: Tensor | None,  # (N,) fp32
    options: Options,
    *,
    wanted: list[bool],
    rows_per_chunk: int,
) -> list[Tensor | None]:
    """Gradients of hidden, weight and bias; the logits are computed again."""
    hidden = hidden.detach()
    kept = None
    if grad_lse is None:
        kept = _rows_that_count(targets, options.ignore_index, None)
    chunks = chunks_of(kept, targets.numel(), rows_per_chunk)
    sums = GradientSums(head, hidden, wanted, len(chunks))
    compute = LogitsOf(head, min(rows_per_chunk, targets.numel()))
    for rows in chunks:
        x = _take(hidden, rows).to(head.dtype)
        logits = compute(x)
        kernels.row_gradients(
            logits,
            _take(targets, rows),
            _take(lse, rows),
            _of_rows(grad_losses, rows),
            _of_rows(grad_lse, rows),
            options,
            logits,
            stats=_take(stats, rows),
        )
        sums.add(rows, x, compute.weight, logits)
    return sums.results()


class LogitsOf:
    """Computes logits, those of every chunk in the same memory."""

    def __init__(self, head: Head, most_rows: int):
        self.weight = head.weight.detach().to(head.dtype)
        self.bias = None if head.bias is None else head.bias.detach().to(head.dtype)
        self._memory = self.weight.new_empty(most_rows, head.V)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (R, D) -> (R, V), valid until the next call."""
        out = self._memory[: len(x)]
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


class GradientSums:
    """Gradients of hidden (N, D), weight (V, D) and bias (V,), summed over chunks in fp32."""

    def __init__(self, head: Head, hidden: Tensor, wanted: list[bool], chunks: int):
        self.head, self.chunks = head, chunks
        self.first = True
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight_wanted = wanted[1]
        self.weight: Tensor | None = None  # the sum so far
        self.bias = hidden.new_zeros(head.V, dtype=torch.float32) if wanted[2] else None

    def add(self, rows: slice | Tensor, x: Tensor, weight: Tensor, grad_logits: Tensor) -> None:
        """x: (R, D), weight: (V, D), grad_logits: (R, V), all in the head's dtype."""
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(grad_logits, weight).to(self.hidden.dtype)
        if self.bias is not None:
            width = _COLUMNS if self.head.sliced else self.head.V
            for begin in range(0, self.head.V, width):
                columns = slice(begin, begin + width)
                self.bias[columns] += grad_logits[:, columns].sum(0, dtype=torch.float32)
        if self.weight_wanted:
            self._add_weight(x, grad_logits)
        self.first = False

    def _add_weight(self, x: Tensor, grad_logits: Tensor) -> None:
        if self.chunks == 1 and x.dtype == self.head.weight.dtype:
            self.weight = torch.mm(grad_logits.t(), x)  # summed in fp32 inside, rounded once
            return
        if self.weight is None:
            self.weight = torch.empty(self.head.V, self.head.D, device=x.device)
        if x.dtype == torch.float32:
            torch.addmm(
                self.weight, grad_logits.t(), x, beta=0 if self.first else 1, out=self.weight
            )
        elif self.head.sliced:
            kind = str(x.dtype).removeprefix("torch.")
            for begin in range(0, self.head.V, _SLICE):
                part = torch.mm(grad_logits[:, begin : begin + _SLICE].t(), x)
                extension().accumulate(
                    self.weight[begin : begin + _SLICE].numpy(),
                    part.view(torch.int16).numpy(),
                    kind,
                    self.first,
                )
        elif self.first:
            torch.mm(grad_logits.t(), x, out_dtype=torch.float32, out=self.weight)
        else:
            torch.addmm(self.weight, grad_logits.t(), x, out_dtype=torch.float32, out=self.weight)

    def results(self) -> list[Tensor | None]:
        """In the parameters' own dtypes; zeros where no row counted."""
        weight = self.weight
        if self.weight_wanted and weight is None:
            weight = torch.zeros_like(self.head.weight)
        bias = self.bias
        return [
            self.hidden,
            None if weight is None else weight.to(self.head.weight.dtype),
            None if bias is None else bias.to(self.head.bias.dtype),
        ]


def chunks_of(kept: Tensor | None, N: int, rows_per_chunk: int) -> list[slice | Tensor]:
    """Rows of each chunk: slices of all N, or pieces of the indices `kept`."""
    count = N if kept is None else len(kept)
    bounds = [(i, min(i + rows_per_chunk, count)) for i in range(0, count, max(rows_per_chunk, 1))]
    return [slice(*bound) if kept is None else kept[slice(*bound)] for bound in bounds]


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
