"""What the cases of cross-entropy's Triton kernels share: options, random rows, one comparison.

N rows, V vocabulary. Random numbers are the CPU's, so that they are the same on a GPU.
"""

import torch
import torch.nn.functional as F
from fastlm.kernels.cross_entropy import row_gradients, row_losses
from fastlm.kernels.loss_options import Options
from interpreter import DEVICE, INTERPRETED
from tolerance import assert_as_accurate, assert_bitwise_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "defaults": Options(),
    "smoothing": Options(label_smoothing=0.1),
    "all smoothed": Options(label_smoothing=1.0),
    "softcap": Options(softcap=30.0),
    "small softcap": Options(softcap=0.5),
    "z_loss": Options(z_loss=0.01),
    "together": Options(label_smoothing=0.2, softcap=8.0, z_loss=0.02, ignore_index=0),
}


def make(N, V, dtype=torch.float32, *, seed=0, scale=3.0, options=OPTIONS["defaults"]):
    """Random logits (N, V) and targets (N,); every third row from the second is ignored."""
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(N, V, generator=generator, device="cpu")).to(dtype)
    targets = torch.randint(V, (N,), generator=generator, device="cpu")
    targets[1::3] = options.ignore_index
    return logits.to(DEVICE), targets.to(DEVICE)


def by_torch(logits, targets, options, grad_losses, grad_lse, *, fp64):
    """(losses, lse, gradient of the logits) by autograd: fp64 truth, or torch's own fp32 path."""
    leaf = logits.detach().to(torch.float64 if fp64 else logits.dtype, copy=True).requires_grad_()
    x = leaf if fp64 else leaf.float()
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    lse = torch.logsumexp(x, -1)
    kept = targets != options.ignore_index
    s = options.label_smoothing
    if fp64:
        losses = torch.zeros_like(lse)
        x_y = x.gather(-1, torch.where(kept, targets, 0)[:, None])[:, 0]
        losses = losses + (1 - s) * (lse - x_y)
        if s:
            losses = losses + s * (lse - x.mean(-1))
    else:
        losses = F.cross_entropy(
            x, targets, reduction="none", ignore_index=options.ignore_index, label_smoothing=s
        )
    losses = torch.where(kept, losses + options.z_loss * lse.square(), 0.0)
    total = (grad_losses.to(losses.dtype) * losses).sum() + (grad_lse.to(lse.dtype) * lse).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return losses.detach(), lse.detach(), gradient


def assert_right(actual, logits, targets, options, grad_losses, grad_lse):
    """losses, lse and gradient as accurate as torch's, at the size of what cancels in them."""
    true = by_torch(logits, targets, options, grad_losses, grad_lse, fp64=True)
    torchs = by_torch(logits, targets, options, grad_losses, grad_lse, fp64=False)
    x = logits.double()
    if options.softcap is not None:
        x = options.softcap * torch.tanh(x / options.softcap)
    size = torch.where(x.isfinite(), x, 0.0).abs().amax(-1) + true[1].abs().nan_to_num(0, 0, 0)
    for i, what in enumerate(("losses", "lse")):
        magnitude = true[i].abs().nan_to_num(0, 0, 0) + size
        assert_as_accurate(actual[i], torchs[i], true[i], magnitude=magnitude, what=what)
    # Of p_v - s / V and of p_y - 1 the terms cancel, there is no error of less than theirs.
    everywhere = grad_losses.abs() * options.label_smoothing / logits.shape[1]
    magnitude = true[2].abs() + everywhere[:, None]
    labels = torch.where(targets == options.ignore_index, 0, targets)[:, None]
    magnitude = magnitude.scatter_add(-1, labels, magnitude.sum(-1, keepdim=True) / 2)
    # NumPy's float32 exp, which the interpreter uses, is off by up to 3 units on some processors.
    slack = 3.0 if INTERPRETED and logits.dtype == torch.float32 else 0.0
    # A GPU fuses softcap * t - m: of a product near 47,000, whose rounding the interpreter and
    # torch have in x and in m alike, 2^-9 is left in the exponent, two ULP of float16.
    if not INTERPRETED and options.softcap is not None and options.softcap > 1000.0:
        slack = 2.0
    assert_as_accurate(
        actual[2], torchs[2], true[2], magnitude=magnitude, slack=slack, what="gradient"
    )


def check(logits, targets, options=OPTIONS["defaults"], *, seed=1):
    """All that the row launchers return, against fp64; and that it is the same bits in any way."""
    N = len(targets)
    before = logits.clone()
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand((), generator=generator, device="cpu").to(DEVICE) + 0.2
    losses, lse, saved, gradient = row_losses(
        logits, targets, options, all_lse=True, gradient_scale=scale
    )
    assert saved.data_ptr() != lse.data_ptr()
    zeros = torch.zeros(N)
    assert_right((losses, lse, gradient), logits, targets, options, scale.expand(N), zeros)

    again = row_losses(logits, targets, options)
    assert_bitwise_equal(again[0], losses)
    kept = targets != options.ignore_index
    assert_bitwise_equal(again[1], torch.where(kept, lse, 0.0))
    assert again[2] is again[1] and again[3] is None
    assert_bitwise_equal(saved, lse)
    assert_bitwise_equal(logits, before, "logits")

    grad_losses, grad_lse = torch.randn(2, N, generator=generator, device="cpu").to(DEVICE)
    out = torch.empty_like(logits)
    row_gradients(logits, targets, saved, grad_losses, grad_lse, options, out)
    assert_right((losses, lse, out), logits, targets, options, grad_losses, grad_lse)
    assert_bitwise_equal(logits, before, "logits")
    # In place: the same bits.
    row_losses(before, targets, options, gradient_scale=scale, out=before)
    assert_bitwise_equal(before, gradient, "gradient in place")
    before.copy_(logits)
    row_gradients(before, targets, saved, grad_losses, grad_lse, options, before)
    assert_bitwise_equal(before, out, "gradient in place")
    return losses, lse, gradient
