"""Muon for the hidden matrices and AdamW for all else, as one optimizer.

For a matrix W (rows, columns) with the clipped gradient G and the momentum M:

    M <- momentum * M + (1 - momentum) * G
    O  = orthogonalized((1 - momentum) * G + momentum * M)             (Nesterov)
    W <- W * (1 - lr * weight_decay) - lr * sqrt(max(1, rows / columns)) * O

(K. Jordan, kellerjordan.github.io/posts/muon; torch.optim.Muon has the same formula and state.)
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlm.hardware import has_fast_bfloat16
from fastlm.kernels.collect import (
    GROUP,
    Collected,
    StepOptions,
    collect_gradients,
    collect_step,
    is_dtensor,
    moment_dtype,
    position_name,
)
from fastlm.ops import optimizer_torch
from fastlm.optim import AdamW

# The quintics a x + b x^3 + c x^5 that bring singular values near 1, one after the other: each is
# the one nearest to 1 (minimax) on the interval where the one before has left [0.01, 1], as in
# arXiv:2505.16932. These three leave [0.73, 1.27] of it; five steps of Jordan's single quintic
# [0.68, 1.14]. They cost up to 3 * (narrower side) / (tokens in the step) of a matrix's matmuls.
QUINTICS = (
    (8.09337398643186, -23.62045307307063, 17.44616896711246),
    (3.636585238411428, -2.721926565350831, 0.5365462763335219),
    (2.661299721330003, -1.9771542178553332, 0.4526163661516398),
)
_MARGIN = 1.01  # what was rounded must not lie above 1, where the first quintic shoots up
_ELEMENTS = 1 << 24  # of matrices in one product of many: bounds the memory of a step


_Place = tuple[int, int, Tensor]  # (group, index in it, parameter)


class Muon(AdamW):
    """AdamW whose groups with a `momentum` are updated by Muon; the others are AdamW's.

        Muon([{"params": matrices, "momentum": 0.95, "lr": 0.02}, {"params": rest, "lr": 3e-3}])

    A Muon group holds matrices (2-D) and has lr, weight_decay and momentum; its betas and eps do
    nothing. All parameters are on one device and are no DTensors: a matrix cannot be orthogonalized
    in parts. Raises ValueError otherwise.

    max_grad_norm, skip_nonfinite, last_grad_norm, first_nonfinite(), a GradScaler and state dicts
    are AdamW's, over all groups together. State of a matrix: `momentum_buffer`, of its shape, fp32
    (fp64 of fp64). matmul_dtype: of the products that orthogonalize; None: bfloat16 where the
    device multiplies it faster, else float32. options: AdamW's arguments, but param_precision.

    Not torch.optim.Muon: it multiplies in bfloat16, matrix by matrix, which a CPU without fast
    bfloat16 does at half of fp32's rate; and its step cannot be skipped, nor clipped together with
    AdamW's, without a wait for the device.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        matmul_dtype: torch.dtype | None = None,
        **options: Any,
    ):
        if matmul_dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"matmul_dtype={matmul_dtype}: it must be float32 or bfloat16")
        if "param_precision" in options:
            raise TypeError("Muon has no argument 'param_precision'")
        super().__init__(params, lr, **options)
        fast = any(has_fast_bfloat16(p.device) for p in self._params()[:1])
        self.matmul_dtype = matmul_dtype or (torch.bfloat16 if fast else torch.float32)

    def _check_last_group(self) -> None:
        super()._check_last_group()
        group, what = self.param_groups[-1], len(self.param_groups) - 1
        if len({p.device for p in self._params()}) > 1:
            raise ValueError("Muon needs all parameters on one device")
        if "momentum" not in group:
            return
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']} of group {what}: it must be in [0, 1)")
        for index, p in enumerate(group["params"]):
            if p.ndim != 2 or is_dtensor(p):
                kind = "a DTensor" if is_dtensor(p) else f"no matrix: its shape is {tuple(p.shape)}"
                name = position_name(self.param_groups, what, index)
                raise ValueError(f"{name} is {kind}; leave it in a group without momentum")

    # State

    def _matrices(self) -> set[int]:
        """The ids of the parameters that Muon updates."""
        return {id(p) for g in self.param_groups if "momentum" in g for p in g["params"]}

    def _create_state(self, params: Sequence[Tensor]) -> None:
        matrices = self._matrices()
        super()._create_state([p for p in params if id(p) not in matrices])
        for p in params:
            if id(p) in matrices and not self.state.get(p):
                self.state[p] = {"momentum_buffer": torch.zeros_like(p, dtype=moment_dtype(p))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class, whose groups are these. ValueError, with nothing
        changed, if a group is Muon's on one side only, or a momentum has not its matrix's shape."""
        loaded = {}
        state = dict(state_dict["state"])
        for g, (saved, group) in enumerate(
            zip(state_dict["param_groups"], self.param_groups, strict=False)
        ):
            if ("momentum" in saved) != ("momentum" in group):
                names = ("AdamW", "Muon")
                raise ValueError(
                    f"group {g} of the state dict is {names['momentum' in saved]}'s, and here "
                    f"{names['momentum' in group]}'s"
                )
            if "momentum" not in group:
                continue
            for i, (saved_id, p) in enumerate(zip(saved["params"], group["params"], strict=False)):
                if entry := state.pop(saved_id, None):
                    what = position_name(self.param_groups, g, i)
                    loaded[p] = {"momentum_buffer": _momentum_of(entry, p, what)}
        super().load_state_dict({**state_dict, "state": state})
        self.state.update(loaded)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "matmul_dtype": self.matmul_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch's Adam expects its own entries.
        entries = state["state"]
        muons = {p: entry for p, entry in entries.items() if "momentum_buffer" in entry}
        others = {p: entry for p, entry in entries.items() if p not in muons}
        super().__setstate__({**state, "state": defaultdict(dict, others)})
        self.state.update(muons)

    # The step

    def _update(self) -> None:
        self._create_state([p for p in self._params() if p.grad is not None])
        groups, found = [], []
        for g, group in enumerate(self.param_groups):
            is_muon = "momentum" in group
            groups.append({**group, "params": []} if is_muon else group)
            members = enumerate(group["params"]) if is_muon else ()
            found += [(g, i, p) for i, p in members if p.grad is not None]
        if self._by_torch():
            self._update_by_torch(groups, found)
            return
        others = collect_step(groups, self.state, False, self._caches)
        gradients = collect_gradients([p for _, _, p in found])
        for table in gradients.tables:  # one, since all is on one device
            table.cache = self._caches.setdefault("matrices", {})
            table.rows[:, GROUP:] = torch.tensor([place[:2] for place in found], device="cpu")
        all_of_them = Collected(others.tables + gradients.tables)
        if not all_of_them.tables:
            return
        kernels = [self.kernels_for(table.device, self._impl) for table in all_of_them.tables]
        options, square_sum = self._options(all_of_them.tables[0].device), None
        if self._takes_norm:
            square_sum, bad = all_of_them.square_sum(kernels)
            tables = zip(bad, all_of_them.tables, strict=True)
            self._last = [(b, table.rows[:, GROUP:]) for b, table in tables]
        for table, kernel in zip(others.tables, kernels, strict=False):
            kernel.step(table, options, square_sum)
        others.write_back()
        torch.autograd.graph.increment_version(others.updated)
        factor, skip, norm = _clipping(square_sum, options)
        if norm is not None:
            dtype = max((t.norm_dtype for t in all_of_them.tables), key=lambda d: d.itemsize)
            self.last_grad_norm = norm.to(dtype)
        self._update_all_matrices(found, factor, skip)

    def _update_by_torch(self, groups: list[dict], found: Sequence[_Place]) -> None:
        """On devices without kernels. groups: AdamW's, and Muon's without their matrices."""
        if not optimizer_torch.clipped(self):
            return
        own, self.param_groups = self.param_groups, groups
        try:
            optimizer_torch.torchs_step(self)
        finally:
            self.param_groups = own
        self._update_all_matrices(found, 1.0, None)

    def _update_all_matrices(
        self, found: Sequence[_Place], factor: Tensor | float, skip: Tensor | None
    ) -> None:
        for batch in _batches(found):
            g, _, first = batch[0]
            dtype = torch.float64 if first.dtype == torch.float64 else self.matmul_dtype
            params = [p for _, _, p in batch]
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            _update_matrices(params, buffers, self.param_groups[g], factor, skip, dtype)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """matrices: (n, rows, columns) = U S V^T each -> about U V^T, in `dtype`.

    Newton-Schulz iterations with QUINTICS, products in `dtype`. Singular values below a hundredth
    of the matrix's Frobenius norm come out as up to 78 times as much. A matrix of zeros stays one.
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    # At least 1e-7, as torch.optim.Muon has it: momentum that decays to nothing moves nothing.
    x = (x / (_MARGIN * norms).clamp_min(1e-7)).to(dtype)
    for a, b, c in QUINTICS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrices.shape[1] > matrices.shape[2] else x


def _update_matrices(
    params: Sequence[Tensor],  # (rows, columns) each, of one shape and dtype
    buffers: Sequence[Tensor],
    group: dict[str, Any],
    factor: Tensor | float,  # of the gradients
    skip: Tensor | None,  # 0-d bool on the device: change nothing
    dtype: torch.dtype,
) -> None:
    """The formula at the file's top, for many matrices at once. Nothing waits for the device."""
    momentum, lr = group["momentum"], group["lr"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    keep = momentum
    rows, columns = params[0].shape
    grads = torch.stack([p.grad for p in params]).to(buffers[0].dtype)
    grads.mul_(factor * (1 - momentum))
    if skip is not None:  # then the momentum stays, and the rate is 0
        grads.masked_fill_(skip, 0)
        moves = (~skip).double()
        keep, lr = 1 - moves * (1 - momentum), moves * lr
    torch._foreach_mul_(buffers, keep)
    torch._foreach_add_(buffers, list(grads.unbind()))
    update = orthogonalized(grads.add_(torch.stack(buffers), alpha=momentum), dtype)
    update = update.to(grads.dtype) * (lr * math.sqrt(max(1, rows / max(1, columns))))
    decay = 1 - lr * group["weight_decay"]
    if params[0].dtype == grads.dtype:
        torch._foreach_mul_(params, decay)
        torch._foreach_sub_(params, list(update.unbind()))
    else:  # rounded once
        for p, change in zip(params, update.unbind(), strict=True):
            p.copy_(p.to(grads.dtype) * decay - change)


def _clipping(
    square_sum: Tensor | None, options: StepOptions
) -> tuple[Tensor | float, Tensor | None, Tensor | None]:
    """(factor of the gradients, whether to skip the step, norm before clipping), as the kernels of
    AdamW's step have them, on the device."""
    factor: Tensor | float = 1.0
    norm, skip = None, None
    if options.grad_scale is not None:
        factor = 1.0 / options.grad_scale.reshape(()).double()
    if square_sum is not None:
        norm = factor * square_sum.sqrt()
        if options.max_grad_norm is not None:
            factor = factor * (options.max_grad_norm / (norm + 1e-6)).clamp_max(1.0)
        if options.skip_nonfinite:
            skip = ~norm.isfinite()
    if options.found_inf is not None:
        found = options.found_inf.reshape(()) != 0
        skip = found if skip is None else skip | found
    return factor, skip, norm


def _batches(found: Sequence[_Place]) -> list[list[_Place]]:
    """Matrices of one group, shape and dtype, at most _ELEMENTS together or one alone."""
    batches: dict[Any, list] = {}
    full = []
    for place in found:
        g, _, p = place
        key = (g, p.shape, p.dtype)
        batch = batches.setdefault(key, [])
        if batch and (len(batch) + 1) * p.numel() > _ELEMENTS:
            full.append(batch)
            batch = batches[key] = []
        batch.append(place)
    return full + list(batches.values())


def _momentum_of(entry: dict[str, Any], param: Tensor, what: str) -> Tensor:
    """A copy of what is stored of a matrix. Raises ValueError if it is no momentum of its shape."""
    if entry.keys() != {"momentum_buffer"}:
        raise ValueError(f"the state of {what} has {sorted(entry)}, not Muon's momentum_buffer")
    buffer = entry["momentum_buffer"]
    if not isinstance(buffer, Tensor) or not buffer.is_floating_point():
        raise ValueError(f"momentum_buffer of {what} is no tensor of floats")
    if buffer.shape != param.shape:
        raise ValueError(
            f"momentum_buffer of {what} has shape {tuple(buffer.shape)}, not {tuple(param.shape)}"
        )
    return torch.empty_like(param, dtype=moment_dtype(param)).copy_(buffer)
