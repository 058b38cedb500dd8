"""What the tests of linear_cross_entropy_loss share: random cases, PyTorch's path, one assertion.

N rows, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from cross_entropy_cases import torch_loss
from tolerance import assert_as_accurate

from fastlm.ops.cross_entropy import cross_entropy_loss_reference
from fastlm.ops.linear_cross_entropy import linear_cross_entropy_loss_reference


def make(shape, dtype=torch.float32, device="cpu", *, bias=True, master=True, ignored=True, seed=0):
    """hidden (..., D), weight (V, D), bias (V,) or None, targets (...); shape: (..., D, V).

    master: weight and bias are fp32 numbers that `dtype` holds exactly, so that casting them
    inside loses nothing.
    """
    *rows, D, V = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(size, generator=generator).to(dtype)

    hidden, weight = random(*rows, D), random(V, D) * 3 / D**0.5
    b = random(V) if bias else None
    targets = torch.randint(V, rows, generator=generator)
    if ignored:
        targets.view(-1)[1::3] = -100
    if master:
        weight, b = weight.float(), None if b is None else b.float()
    moved = [None if t is None else t.to(device) for t in (hidden, weight, b, targets)]
    return tuple(moved)


def results(function, hidden, weight, bias, targets, **options):
    """(loss, gradients of hidden, weight and bias) for upstream gradients that are not 1."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (hidden, weight, bias)]
    loss = function(leaves[0], leaves[1], targets, bias=leaves[2], **options)
    generator = torch.Generator().manual_seed(5)
    upstream = (0.2 + torch.rand(loss.shape, generator=generator)).to(loss.device, loss.dtype)
    gradients = torch.autograd.grad(loss, [t for t in leaves if t is not None], upstream)
    return loss.detach(), *gradients


def torch_linear_loss(hidden, weight, targets, *, bias=None, **options):
    """PyTorch's own path in hidden's dtype: a linear layer, fp32 logits, and their loss."""
    dtype = hidden.dtype
    logits = F.linear(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
    return torch_loss(logits, targets, **options)


def in_fp64(hidden, weight, bias, targets):
    return hidden.double(), weight.double(), None if bias is None else bias.double(), targets


def assert_right(got, tensors, **options):
    """The suite's one comparison: fp64 truth, PyTorch's own error allowed.

    An error is scaled by what was rounded on the way. For the loss that are the logits. The other
    results are sums of products with the logits' gradient g, rounded to hidden's dtype, and to fp32
    when it was p - 1: one ULP of each, summed without the signs by which products cancel.
    """
    doubles = in_fp64(*tensors)
    truth = results(linear_cross_entropy_loss_reference, *doubles, **options)
    torchs = results(torch_linear_loss, *tensors, **options)
    hidden, weight, bias, targets = doubles
    logits = F.linear(hidden, weight, bias).flatten(0, -2).requires_grad_()
    loss = cross_entropy_loss_reference(logits, targets.flatten(), **options)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    fp32, dtype = torch.finfo(torch.float32).eps, torch.finfo(tensors[0].dtype)
    unit = (
        dtype.eps * g.abs().clamp(min=dtype.tiny)
        + fp32 * torch.softmax(logits.detach(), -1) * g.abs().sum(-1).max()
    )
    units = [
        fp32 * (truth[0].abs() + 10),  # logits of order 10
        (unit @ weight.abs()).view_as(hidden),
        unit.t() @ hidden.flatten(0, -2).abs(),
        unit.sum(0),
    ]
    names = ["loss", "gradient of hidden", "gradient of weight", "gradient of bias"]
    for name, actual, peer, true, unit in zip(names, got, torchs, truth, units, strict=False):
        size = true.abs() + unit / torch.finfo(actual.dtype).eps
        assert_as_accurate(actual, peer, true, magnitude=size, what=name)
