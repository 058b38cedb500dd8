"""How the tests of the ops compare: against fp64 truth, with PyTorch's own error as the measure."""

import torch
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def assert_as_accurate(
    actual: Tensor,
    torchs: Tensor,  # the same, by PyTorch's own path in the same dtype
    truth: Tensor,  # the same, in fp64
    *,
    magnitude: Tensor | None = None,  # what an element's error is scaled by; default |truth|
    slack: float = 0.0,  # more units that are allowed
    rms_slack: float | None = None,  # of the RMS; default slack
    what: str = "result",
) -> None:
    """Max and RMS error of `actual` <= 1.05 x that of `torchs` + 1, in units in the last place.

    The unit is one ULP of actual's dtype at `magnitude`: give it where the terms of a sum cancel,
    so that |truth| is smaller than what was rounded. NaN and infinity must stand where the truth
    has them.
    """
    assert actual.shape == truth.shape, f"{what} has shape {actual.shape}, not {truth.shape}"
    assert actual.dtype == torchs.dtype, f"{what} has dtype {actual.dtype}, not {torchs.dtype}"
    finfo = torch.finfo(actual.dtype)
    truth = truth.double()
    unit = finfo.eps * (truth.abs() if magnitude is None else magnitude.double())
    # Of a subnormal result the last place is that of the smallest normal number.
    unit = unit.clamp(min=finfo.eps * finfo.tiny)

    special = ~truth.isfinite()
    assert torch.equal(actual.double()[special].nan_to_num(7.0), truth[special].nan_to_num(7.0)), (
        f"{what}: NaN or infinity where the truth has another of them"
    )
    errors = []
    for values in (actual, torchs):
        error = ((values.double() - truth) / unit)[~special].abs()
        assert values is torchs or error.isfinite().all(), f"{what} is not finite, the truth is"
        errors.append(error)
    if not errors[0].numel():
        return
    rms_slack = slack if rms_slack is None else rms_slack
    for name, norm, more in (
        ("largest", torch.max, slack),
        ("RMS", _root_mean_square, rms_slack),
    ):
        ours, allowed = norm(errors[0]), 1.05 * norm(errors[1]) + 1 + more
        assert ours <= allowed, (
            f"{what}: {name} error is {ours:.4g} ULP; PyTorch's own allows {allowed:.4g}"
        )


def _root_mean_square(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """The same shape, dtype and bytes: NaN equals itself, and 0.0 is not -0.0."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    same = actual.contiguous().view(-1).view(torch.uint8)
    assert torch.equal(same, expected.contiguous().view(-1).view(torch.uint8)), what
