"""cross_entropy_loss: what its arguments may be, and what is said of those that may not."""

import pytest
import torch
from tolerance import assert_bitwise_equal

from fastlm import active_implementation, cross_entropy_loss, linear_cross_entropy_loss
from fastlm.ops.cross_entropy import cross_entropy_loss_reference


def logits_and_targets(shape=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator)
    return logits, torch.randint(shape[-1], shape[:-1], generator=generator)


LABEL_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes(dtype):
    # V = 200 is no int8, -100 as uint8 is 156: compared in the labels' own dtype both wrap around.
    logits, _ = logits_and_targets((3, 200))
    targets = torch.tensor([1, 127, 0] if dtype == torch.int8 else [156, 199, 0])
    expected = cross_entropy_loss(logits, targets)
    assert_bitwise_equal(cross_entropy_loss(logits, targets.to(dtype)), expected)
    reference = cross_entropy_loss_reference(logits, targets.to(dtype))
    torch.testing.assert_close(reference, expected)


@pytest.mark.parametrize(
    "error, message, change",
    [
        (ValueError, r"targets has shape \(3, 1\), logits \(3, 5\)",
         lambda x, y: cross_entropy_loss(x, y[:, None])),
        (ValueError, r"targets has shape \(2,\), logits \(3, 5\)",
         lambda x, y: cross_entropy_loss(x, y[:2])),
        (ValueError, r"targets has shape \(\), logits \(\)",
         lambda x, y: cross_entropy_loss(x[0, 0], y[0])),
        (ValueError, r"logits has shape \(3, 0\)", lambda x, y: cross_entropy_loss(x[:, :0], y)),
        (TypeError, "logits has dtype torch.int64", lambda x, y: cross_entropy_loss(x.long(), y)),
        (TypeError, "targets has dtype torch.float32", lambda x, y: cross_entropy_loss(x, y * 1.0)),
        (TypeError, "targets has dtype torch.bool", lambda x, y: cross_entropy_loss(x, y > 1)),
        (ValueError, "label_smoothing=1.5",
         lambda x, y: cross_entropy_loss(x, y, label_smoothing=1.5)),
        (ValueError, "label_smoothing=-0.1",
         lambda x, y: cross_entropy_loss(x, y, label_smoothing=-0.1)),
        (ValueError, "label_smoothing=nan",
         lambda x, y: cross_entropy_loss(x, y, label_smoothing=float("nan"))),
        (ValueError, "softcap=0", lambda x, y: cross_entropy_loss(x, y, softcap=0.0)),
        (ValueError, "softcap=nan", lambda x, y: cross_entropy_loss(x, y, softcap=float("nan"))),
        (ValueError, "z_loss=-1", lambda x, y: cross_entropy_loss(x, y, z_loss=-1.0)),
        (ValueError, "z_loss=nan", lambda x, y: cross_entropy_loss(x, y, z_loss=float("nan"))),
        (ValueError, "reduction='average'",
         lambda x, y: cross_entropy_loss(x, y, reduction="average")),
        (ValueError, "num_items replaces",
         lambda x, y: cross_entropy_loss(x, y, num_items=3, reduction="sum")),
        (ValueError, "num_items=0", lambda x, y: cross_entropy_loss(x, y, num_items=0)),
        (ValueError, r"num_items has shape \(3,\)",
         lambda x, y: cross_entropy_loss(x, y, num_items=torch.ones(3))),
        (TypeError, "ignore_index=None", lambda x, y: cross_entropy_loss(x, y, ignore_index=None)),
        (TypeError, "ignore_index='pad'",
         lambda x, y: cross_entropy_loss(x, y, ignore_index="pad")),
        (TypeError, "^cross_entropy_loss has no argument 'in_place', but logits, targets, inplace,",
         lambda x, y: cross_entropy_loss(x, y, in_place=True)),
        (TypeError, "^linear_cross_entropy_loss has no argument 'inplace', but hidden, weight,",
         lambda x, y: linear_cross_entropy_loss(x, torch.ones(9, 5), y, inplace=True)),
        (TypeError, "targets is a list", lambda x, y: cross_entropy_loss(x, [0, 1, 2])),
        (TypeError, "logits is a ndarray", lambda x, y: cross_entropy_loss(x.numpy(), y)),
        (TypeError, "bias is a list",
         lambda x, y: linear_cross_entropy_loss(x, torch.ones(9, 5), y, bias=[1.0])),
        (TypeError, r"uint64: pass targets\.long\(\)",
         lambda x, y: cross_entropy_loss(x, y.to(torch.uint64))),
        (ValueError, "impl='cuda'", lambda x, y: cross_entropy_loss(x, y, impl="cuda")),
        (ValueError, "impl='triton'", lambda x, y: cross_entropy_loss(x, y, impl="triton")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_bad_arguments_are_named(error, message, change):
    logits, targets = logits_and_targets()
    with pytest.raises(error, match=message):
        change(logits, targets)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8], ids=str)
@pytest.mark.parametrize("value", [5, -1, -99, 127])
def test_label_out_of_range(value, dtype):
    logits, targets = logits_and_targets((2, 3, 5))
    targets = targets.to(dtype)
    targets[1, 2] = value
    with pytest.raises(ValueError, match=rf"targets\[1, 2\] = {value}: .*\[0, 5\).*-100"):
        cross_entropy_loss(logits, targets)
    # It is the first wrong one that is named, and ignore_index is not wrong.
    targets[0, 1] = 77
    with pytest.raises(ValueError, match=r"targets\[0, 1\] = 77"):
        cross_entropy_loss(logits, targets)
    targets[0, 1] = value
    assert cross_entropy_loss(logits, targets, ignore_index=value).isfinite()


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_the_active_implementation_of_float64_is_torch(op):
    assert active_implementation(op) == "cpp"
    assert active_implementation(op, dtype=torch.float64) == "torch"
    assert active_implementation("adamw", dtype=torch.float64) == "cpp"


def test_batches_are_gathered_on_the_host():
    # By C++, whatever device they are copied to.
    assert active_implementation("gather_batch", "cuda") == "cpp"
    assert active_implementation("gather_batch", "mps") == "cpp"


def test_targets_on_another_device():
    logits, targets = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match="targets is on meta, logits on cpu"):
        cross_entropy_loss(logits, targets)
    with pytest.raises(ValueError, match="targets is on meta, hidden on cpu"):
        linear_cross_entropy_loss(logits, torch.zeros(4, 5), targets)
