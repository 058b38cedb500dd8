"""What the tests of cross_entropy_loss share: its options, random cases, and one assertion.

N rows, V vocabulary.
"""

import os

import fastlm.kernels
import torch
import torch.nn.functional as F
from tolerance import assert_as_accurate

import fastlm
from fastlm.ops.cross_entropy import cross_entropy_loss_reference

# test_triton_cross_entropy.py runs the test files with Triton's interpreter, for the same cases to
# go through the GPU's kernels.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
cross_entropy_loss = (fastlm.kernels if INTERPRETED else fastlm).cross_entropy_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

OPTIONS = {
    "defaults": {},
    "ignore_index": {"ignore_index": 3},
    "label_smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0},
    "softcap": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.01},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "num_items": {"num_items": 11},
    "together": {"label_smoothing": 0.2, "softcap": 8.0, "z_loss": 0.02, "num_items": 7.5},
    "together, none": {
        "label_smoothing": 0.2, "softcap": 8.0, "z_loss": 0.02, "reduction": "none",
    },
}  # fmt: skip


def make(shape, dtype=torch.float32, device="cpu", *, seed=0, scale=3.0, ignored=True):
    """Random logits (..., V) and targets (...); every third target is -100."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(shape, generator=generator)).to(device, dtype)
    targets = torch.randint(shape[-1], shape[:-1], generator=generator)
    if ignored:
        targets.view(-1)[1::3] = -100
    return logits, targets.to(device)


def torch_loss(logits, targets, *, softcap=None, z_loss=0.0, num_items=None, **options):
    """The same by PyTorch's own functions, on fp32 logits."""
    reduction = options.pop("reduction", "mean")
    ignore_index = options.get("ignore_index", -100)
    V = logits.shape[-1]
    rows, labels = logits.float().reshape(-1, V), targets.reshape(-1)
    if softcap is not None:
        rows = softcap * torch.tanh(rows / softcap)
    loss = F.cross_entropy(rows, labels, reduction="none", **options)
    if z_loss:
        kept = labels != ignore_index
        loss = loss + torch.where(kept, z_loss * torch.logsumexp(rows, dim=-1).square(), 0.0)
    if reduction == "none":
        return loss.view(targets.shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / ((labels != ignore_index).sum() if num_items is None else num_items)


def loss_and_gradient(loss_function, logits, targets, **options):
    """(loss, gradient of the logits) for an upstream gradient that is not 1."""
    leaf = logits.detach().clone().requires_grad_()
    loss = loss_function(leaf, targets, **options)
    # In fp32, then widened: the truth must get the same.
    generator = torch.Generator().manual_seed(5)
    upstream = (0.2 + torch.rand(loss.shape, generator=generator)).to(loss.device, loss.dtype)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def assert_right(loss, gradient, logits, targets, **options):
    """The suite's one comparison of values and gradients: fp64 truth, PyTorch's error allowed."""
    true_loss, true_gradient = loss_and_gradient(
        cross_entropy_loss_reference, logits.double(), targets, **options
    )
    torchs_loss, torchs_gradient = loss_and_gradient(torch_loss, logits, targets, **options)
    # In lse - l_y and in p_v - [v = y] terms cancel. Each is rounded at its own size: that of the
    # row's lse and, for the gradient, the row's upstream gradient over the denominator.
    rows = logits.double()
    if (softcap := options.get("softcap")) is not None:
        rows = softcap * torch.tanh(rows / softcap)
    finite = torch.where(rows.isfinite(), rows, 0.0)
    size = finite.abs().amax(-1) + torch.logsumexp(rows, -1).abs().nan_to_num(0, 0, 0)
    if loss.dim() == 0:
        size = size.mean() if options.get("reduction", "mean") == "mean" else size.sum()
    assert_as_accurate(
        loss, torchs_loss, true_loss, magnitude=true_loss.abs().nan_to_num(0, 0, 0) + size,
        what="loss",
    )  # fmt: skip
    labels = torch.where(targets == options.get("ignore_index", -100), 0, targets).unsqueeze(-1)
    size = true_gradient.abs().nan_to_num(0, 0, 0)
    row_size = size.sum(-1, keepdim=True) / 2  # of p_v - [v = y] the positive part, or a bound
    size = size.scatter_add(-1, labels, row_size)
    size = (
        size + 2 * options.get("label_smoothing", 0.0) / logits.shape[-1] * row_size
    )  # p_v - s / V
    size = size + 2**-29 * row_size  # fp64 rounds, too: 1 - tanh^2 is 0 there where it is 1e-17
    if INTERPRETED:
        # It truncates to bf16, and its exp and tanh are NumPy's.
        size = 2 * size
        torchs_gradient = true_gradient + 1.2 * (torchs_gradient.double() - true_gradient)
        torchs_gradient = torchs_gradient.to(gradient.dtype)
    # x - m is rounded by up to 8 ULP of its exponential, torch's x - lse by as many, elsewhere: of
    # a few thousand elements either has the largest. (An H100: 8.6, torch's own 7.1.)
    draw = 2.0 if logits.is_cuda and logits.dtype == torch.float32 else 0.0
    assert_as_accurate(
        gradient, torchs_gradient, true_gradient, magnitude=size, slack=draw, rms_slack=0.0,
        what="gradient of the logits",
    )  # fmt: skip
