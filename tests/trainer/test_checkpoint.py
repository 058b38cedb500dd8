"""Checkpoints: other programs' layouts, damage, and processes that die while they save."""

import copy
import io
import os
import random
from pathlib import Path

import pytest
import torch
from checkpoints import everything, make_model, make_pair, train_step
from torch import nn
from training_runs import same

from fastlm import AdamW, CheckpointError, load_checkpoint, save_checkpoint
from fastlm.checkpoint import (
    FORMAT_VERSION,
    checkpoint_files,
    checkpoint_payload,
    newest_readable,
    read_checkpoint,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# --- round trips ---


@pytest.mark.parametrize("kind", ["path", "str", "BytesIO", "file"])
@pytest.mark.parametrize("order", ["model first", "source first"])
def test_round_trip(tmp_path, kind, order):
    path = tmp_path / "deep" / "checkpoint.pt"
    out = {"path": path, "str": str(path), "BytesIO": io.BytesIO()}.get(kind)
    if kind == "file":
        path.parent.mkdir()
        out = open(path, "w+b")  # noqa: SIM115
    model, optimizer = make_pair()
    save_checkpoint(model, optimizer, 7, out)
    if kind in ("BytesIO", "file"):
        out.seek(0)

    other, other_optimizer = make_pair(seed=1, steps=0)
    arguments = (other, other_optimizer, out)
    assert not same(everything(model, optimizer), everything(other, other_optimizer))
    if order == "source first":
        arguments = (out, other, other_optimizer)
    assert load_checkpoint(*arguments) == 7
    assert same(everything(model, optimizer), everything(other, other_optimizer))
    if kind == "file":
        out.close()
    # And it goes on in the same way.
    for pair in ((model, optimizer), (other, other_optimizer)):
        train_step(*pair, 9)
    assert same(everything(model, optimizer), everything(other, other_optimizer))


def test_keywords_and_optimizer_none(tmp_path):
    path = tmp_path / "a.pt"
    model, optimizer = make_pair()
    save_checkpoint(model=model, optimizer=optimizer, iteration=3, out=path)
    other = make_model(1)
    assert load_checkpoint(model=other, optimizer=None, src=path) == 3
    assert same(dict(other.state_dict()), dict(model.state_dict()))
    assert load_checkpoint(path, other, None) == 3

    save_checkpoint(model, None, 4, path)
    assert "optimizer_state" not in torch.load(path, weights_only=True)
    unused, unused_optimizer = make_pair(seed=2)
    before = unused_optimizer.state_dict()["state"]
    with pytest.warns(UserWarning, match=r"a\.pt: holds no optimizer state"):
        assert load_checkpoint(unused, unused_optimizer, path) == 4
    assert same(unused_optimizer.state_dict()["state"], before)


def test_the_keys_and_the_extras(tmp_path):
    path = tmp_path / "a.pt"
    model, optimizer = make_pair()
    save_checkpoint(model, optimizer, 5, path, config={"d_model": 8}, note="x")
    payload = torch.load(path, weights_only=True)
    assert {"model_state", "optimizer_state", "iteration"} <= payload.keys()
    assert (payload["iteration"], payload["config"], payload["note"]) == (5, {"d_model": 8}, "x")


def test_torch_loads_it_safely_and_memory_mapped(saved):
    for mmap in (False, True):
        payload = torch.load(saved, weights_only=True, mmap=mmap)
        assert same(dict(payload["model_state"]), dict(make_pair()[0].state_dict()))


def test_seeds_load_function_reads_our_files(saved):
    """The function of the seeds, as it stands there."""
    model, optimizer = make_pair(seed=1, steps=0, cls=torch.optim.AdamW)
    payload = torch.load(saved, map_location="cpu", weights_only=True)
    model.load_state_dict(payload["model_state"])
    optimizer.load_state_dict(payload["optimizer_state"])
    assert payload.get("iteration", 0) == 2
    assert same(dict(model.state_dict()), dict(make_pair()[0].state_dict()))


# --- other programs' files ---

LAYOUTS = {
    "functions notebook": ("model_state", "optimizer_state", "iteration"),
    "GPT tutorial": ("model_state_dict", "optimizer_state_dict", "step"),
    "nanoGPT": ("model", "optimizer", "iter_num"),
}


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts(tmp_path, layout, prefix):
    model, optimizer = make_pair(cls=torch.optim.AdamW)
    model_key, optimizer_key, step_key = LAYOUTS[layout]
    payload = {
        model_key: {prefix + name: tensor for name, tensor in model.state_dict().items()},
        optimizer_key: optimizer.state_dict(),
        step_key: 41,
        "loss": 1.5,
        "scheduler_state_dict": {"last_epoch": 41},
    }
    torch.save(payload, tmp_path / "other.pt")
    other, other_optimizer = make_pair(seed=1, steps=0)
    assert load_checkpoint(other, other_optimizer, tmp_path / "other.pt") == 41
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    for pair in ((model, optimizer), (other, other_optimizer)):
        train_step(*pair, 9)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_state_of_the_seeds_own_optimizer_loads(tmp_path):
    """It counts steps in a Python int, where torch's AdamW has a tensor."""
    model, optimizer = make_pair()
    state_dict = copy.deepcopy(optimizer.state_dict())
    for state in state_dict["state"].values():
        state["step"] = int(state["step"])
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    state_dict["param_groups"] = [{**group, "params": state_dict["param_groups"][0]["params"]}]
    payload = {"model_state": model.state_dict(), "optimizer_state": state_dict, "iteration": 2}
    torch.save(payload, tmp_path / "seed.pt")
    other, other_optimizer = make_pair(seed=1, steps=0)
    assert load_checkpoint(other, other_optimizer, tmp_path / "seed.pt") == 2
    for pair in ((model, optimizer), (other, other_optimizer)):
        train_step(*pair, 9)
    assert same(dict(model.state_dict()), dict(other.state_dict()))


def test_a_bare_state_dict_loads_as_step_0(tmp_path):
    torch.save(make_model().state_dict(), tmp_path / "weights.pt")
    other = make_model(1)
    assert load_checkpoint(other, None, tmp_path / "weights.pt") == 0
    assert same(dict(other.state_dict()), dict(make_model().state_dict()))


def test_a_compiled_model_is_saved_without_its_prefix(tmp_path):
    model = make_model()
    compiled = torch.compile(model)  # compiles when it is called, which it is not
    assert next(iter(compiled.state_dict())).startswith("_orig_mod.")
    save_checkpoint(compiled, None, 1, tmp_path / "a.pt")
    assert same(
        dict(torch.load(tmp_path / "a.pt", weights_only=True)["model_state"]),
        dict(model.state_dict()),
    )
    other = torch.compile(make_model(1))
    assert load_checkpoint(other, None, tmp_path / "a.pt") == 1
    assert same(dict(other._orig_mod.state_dict()), dict(model.state_dict()))


def test_a_distributed_model_is_saved_without_its_prefix(tmp_path):
    dist = torch.distributed
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(make_model()))
        save_checkpoint(wrapped, None, 1, tmp_path / "a.pt")
        other = nn.parallel.DistributedDataParallel(make_model(1))
        load_checkpoint(other, None, tmp_path / "a.pt")
        assert same(dict(other.module.state_dict()), dict(make_model().state_dict()))
    finally:
        dist.destroy_process_group()
    payload = torch.load(tmp_path / "a.pt", weights_only=True)
    assert payload["model_state"].keys() == make_model().state_dict().keys()


# --- damage ---


def assert_damaged(path: Path, what) -> None:
    with pytest.raises(CheckpointError, match=path.name):
        read_checkpoint(path)
        pytest.fail(f"not detected: {what}")


def test_every_flipped_bit_is_detected(saved):
    whole = saved.read_bytes()
    rng = random.Random(0)
    size = len(whole)
    tail = range(size - 150, size)  # the zip's end record and its comment, where the digest is
    positions = [*range(64), *sorted(rng.sample(range(size), 300)), *tail]
    for position in positions:
        bits = range(8) if position in tail else [rng.randrange(8)]
        for bit in bits:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            saved.write_bytes(damaged)
            assert_damaged(saved, f"bit {bit} of byte {position} of {size}")
    saved.write_bytes(whole)
    assert read_checkpoint(saved)["iteration"] == 2


def test_every_overwritten_block_is_detected(saved):
    whole = saved.read_bytes()
    rng = random.Random(1)
    for block in (b"\0" * 16, rng.randbytes(64), b"\xff" * 512):
        for _ in range(20):
            at = rng.randrange(len(whole) - len(block))
            damaged = whole[:at] + block + whole[at + len(block) :]
            if damaged != whole:
                saved.write_bytes(damaged)
                assert_damaged(saved, f"{len(block)} bytes at {at}")


def test_every_truncation_is_detected(saved):
    whole = saved.read_bytes()
    rng = random.Random(2)
    size = len(whole)
    lengths = {*range(40), *rng.sample(range(size), 150), *range(size - 200, size)}
    for length in sorted(lengths):
        saved.write_bytes(whole[:length])
        assert_damaged(saved, f"cut to {length} of {size}")


def test_appended_bytes_are_detected(saved):
    whole = saved.read_bytes()
    for more in (b"\0", b"\0" * 100, b"sha256:" + b"0" * 64):
        saved.write_bytes(whole + more)
        assert_damaged(saved, more)


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint at all\n" * 50, b"\x80\x02}q\x00.", bytes(5000)],
    ids=["empty", "text", "old pickle", "zeros"],
)
def test_files_that_are_no_checkpoints(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    model = make_model()
    with pytest.raises(CheckpointError, match=r"x\.pt") as caught:
        load_checkpoint(model, None, path)
    assert "\n" not in str(caught.value)
    assert same(dict(model.state_dict()), dict(make_model().state_dict()))


@pytest.mark.parametrize(
    "payload",
    [[1, 2], torch.zeros(3), {"model": 5}, {"loss": 1.5}, {"model_state": {"a": 1}}, {}],
    ids=str,
)
def test_files_of_torch_that_hold_no_model(tmp_path, payload):
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(CheckpointError):
        load_checkpoint(make_model(), None, tmp_path / "x.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model_state": Bomb()}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"x\.pt") as caught:
        load_checkpoint(make_model(), None, tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)  # nor is it recommended to run it


def test_a_newer_format_is_refused_by_name(tmp_path):
    model = make_model()
    payload = {**checkpoint_payload(model, None, 3), "format_version": FORMAT_VERSION + 1}
    torch.save(payload, tmp_path / "new.pt")
    with pytest.raises(
        CheckpointError, match=r"new\.pt: is of format 2, .* up to 1; update fastlm"
    ):
        load_checkpoint(model, None, tmp_path / "new.pt")
    # A run does not go on from an older one, as it does where the newest is damaged.
    torch.save(checkpoint_payload(model, None, 2), tmp_path / "checkpoint_2.pt")
    torch.save(payload, tmp_path / "checkpoint_3.pt")
    with pytest.raises(CheckpointError, match=r"checkpoint_3\.pt: is of format 2"):
        newest_readable(tmp_path, "checkpoint")
    # Of another program the key means something else, or nothing.
    torch.save({"model": model.state_dict(), "format_version": 7}, tmp_path / "other.pt")
    assert load_checkpoint(model, None, tmp_path / "other.pt") == 0


def test_a_missing_file_is_named(tmp_path):
    for arguments in (
        (make_model(), None, tmp_path / "nowhere.pt"),
        (str(tmp_path / "nowhere.pt"), make_model(), None),
    ):
        with pytest.raises(CheckpointError, match=r"nowhere\.pt: no such checkpoint"):
            load_checkpoint(*arguments)


@pytest.mark.parametrize(
    "settings, first_difference",
    [
        (dict(num_layers=2), r"layers\.1\.attn\.k_proj\.weight is missing, not \(8, 8\)"),
        (dict(d_ff=64), r"layers\.0\.ffn\.w1\.weight is \(16, 8\), not \(64, 8\) and 2 more"),
        (dict(vocab_size=12), r"lm_head\.weight is \(11, 8\), not \(12, 8\) and 1 more"),
    ],
)
def test_another_architecture_is_named_and_changes_nothing(saved, settings, first_difference):
    model, optimizer = make_pair(seed=1, **settings)
    before = everything(*make_pair(seed=1, **settings))
    with pytest.raises(CheckpointError, match=first_difference):
        load_checkpoint(model, optimizer, saved)
    assert same(everything(model, optimizer), before)


def test_another_optimizer_is_an_error_and_changes_nothing(saved):
    model = make_model(1)
    groups = [{"params": [p]} for p in model.parameters()]
    optimizer = AdamW(groups)
    before = everything(model, optimizer)
    before[0] = {name: tensor.clone() for name, tensor in before[0].items()}
    with pytest.raises(CheckpointError, match="optimizer state does not fit"):
        load_checkpoint(model, optimizer, saved)
    assert same(everything(model, optimizer), before)


def test_two_matrices_do_not_load_into_a_tied_model(saved):
    """Whichever came last would silently replace the other."""
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_checkpoint(make_model(tie_embeddings=True), None, saved)
    save_checkpoint(make_model(tie_embeddings=True), None, 1, saved)
    for tied in (True, False):
        model = make_model(1, tie_embeddings=tied)
        assert load_checkpoint(model, None, saved) == 1
        assert torch.equal(model.lm_head.weight, model.token_embeddings.weight)


# --- which one is the newest ---


def write_series(directory: Path, *names: str) -> list[Path]:
    """Checkpoints whose `iteration` counts up, each written a second after the one before."""
    paths = []
    for number, name in enumerate(names):
        path = directory / name
        save_checkpoint(make_model(), None, number, path)
        os.utime(path, ns=(0, number * 10**9))
        paths.append(path)
    return paths


def test_checkpoint_files_lists_what_can_be_resumed_newest_first(tmp_path):
    old, new, final, other = write_series(
        tmp_path,
        "checkpoint_900.pt", "checkpoint_1000.pt", "checkpoint_final.pt", "other_7.pt",
    )  # fmt: skip
    write_series(tmp_path, "checkpoint_model.pt", ".checkpoint_1000.pt.abc.tmp", "notes.txt")
    (tmp_path / "checkpoint_1000.pt.tmp").write_bytes(b"")
    assert checkpoint_files(tmp_path) == [other, final, new, old]
    assert checkpoint_files(tmp_path, "checkpoint") == [final, new, old]
    assert checkpoint_files(tmp_path, "check.*") == []  # no pattern
    assert checkpoint_files(tmp_path / "nowhere") == []


def test_newest_readable_falls_back_and_says_so(tmp_path, capsys):
    first, second, third = write_series(tmp_path, "c_1.pt", "c_2.pt", "c_3.pt")
    path, payload = newest_readable(tmp_path)
    assert (path, payload["iteration"]) == (third, 2)
    assert capsys.readouterr().out == ""

    damage(third)
    path, payload = newest_readable(tmp_path)
    assert (path, payload["iteration"]) == (second, 1)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "c_3.pt" in said and "damaged" in said
    assert "trying the one before" in said

    damage(second)
    damage(first)
    with pytest.raises(CheckpointError, match="no readable checkpoint"):
        newest_readable(tmp_path)


def damage(path: Path) -> None:
    """Flips a bit in the middle, and keeps the file's time."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=times)
