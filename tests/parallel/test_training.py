"""Several processes train as one does: losses, samples, checkpoints, evaluations (gloo, CPU)."""

import json
import shutil

import pytest
import torch
from rank_programs import TOKENS, WINDOWS, resume, run, succeeded
from ranks import run_ranks
from training_runs import VOCAB_SIZE, flags, losses, metrics, same, state, tiny_flags

from fastlm import TransformerLM
from fastlm.checkpoint import read_checkpoint
from fastlm.export import export

# 30 validation windows, which no world below shares evenly, in batches of the same windows.
STEPS = dict(total_steps=24, eval_every=10, tokens_per_step=TOKENS)
HIDE = {"hide_labels": True, "record": True}
BOUND = 1e-5


@pytest.fixture(scope="module")
def alone(directory):
    run(1, directory, "alone", HIDE, batch_size=6, eval_batches=5, **STEPS)
    return directory / "alone"


def figures(target):
    """All that a run has logged of its model: (event, step, what) -> value."""
    found = {}
    for event, names in (("train", ("loss", "grad_norm")), ("val", ("val_loss",))):
        for row in metrics(target, event):
            found |= {(event, row["step"], name): row[name] for name in names}
    found["summary"] = metrics(target, "summary")[-1]["val_loss"]
    return found


def assert_close(target, expected, bound=BOUND):
    actual, wanted = figures(target), figures(expected)
    assert actual.keys() == wanted.keys()
    off = {key: abs(actual[key] / wanted[key] - 1) for key in wanted}
    worst = max(off, key=off.get)
    assert off[worst] <= bound, (worst, actual[worst], wanted[worst])


def assert_samples_in_order(directory, size, batch_size, steps):
    """Each rank's micro-batches, put together: all samples once, in their order."""
    seen = [json.loads((directory / f"samples-{rank}.json").read_text()) for rank in range(size)]
    micro = WINDOWS // batch_size // size
    assert [len(of_rank) for of_rank in seen] == [steps * micro] * size
    together = [first for index in range(steps * micro) for first, _ in (s[index] for s in seen)]
    assert together == list(range(0, steps * WINDOWS, batch_size))
    if size > 1:  # or hidden labels prove nothing
        assert any(len({counted for _, counted in at}) > 1 for at in zip(*seen, strict=True))


FAST = [(4, "ddp", 3), (2, "fsdp", 2)]
SWEEP = [
    (size, parallel, batch_size)
    for size, batch_sizes in ((2, (6, 2)), (4, (3, 1)), (3, (4,)))
    for parallel in ("ddp", "fsdp")
    for batch_size in batch_sizes
]


@pytest.mark.parametrize(
    ("size", "parallel", "batch_size"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.exhaustive) for case in SWEEP],
)
def test_losses_and_samples_are_those_of_one_process(alone, size, parallel, batch_size):
    """Accumulation 1 and 3; unequal numbers of labels; evaluations that the ranks share."""
    directory, target = alone.parent, f"{parallel}-{size}-{batch_size}"
    run(
        size, directory, target, HIDE, parallel=parallel, batch_size=batch_size,
        eval_batches=-(-30 // batch_size), sample_every=10, track="csv", **STEPS,
    )  # fmt: skip
    assert_samples_in_order(directory, size, batch_size, STEPS["total_steps"])
    # Rank 0 alone writes and tracks; a sharded model's weights come from all.
    sampled = [row["step"] for row in metrics(directory / target, "sample")]
    assert sampled == [10, 20]
    lines = (directory / target / "logs" / "train.csv").read_text().splitlines()
    assert sum(line.split(",")[4] != "" for line in lines[1:]) == len(losses(directory / target))
    if 30 % batch_size:  # other validation windows
        assert_close_losses(directory / target, alone)
    else:
        assert_close(directory / target, alone)


def test_muon_on_two_ranks_is_muon_on_one(directory):
    """Each orthogonalizes the same sums: their weights stay the same."""
    settings = dict(optimizer="muon", total_steps=8, tokens_per_step=TOKENS, log_every=1)
    run(1, directory, "muon", HIDE, batch_size=6, **settings)
    run(2, directory, "muon-2", HIDE, batch_size=3, **settings)
    assert_close_losses(directory / "muon-2", directory / "muon")


def assert_close_losses(target, expected):
    actual, wanted = losses(target), losses(expected)
    assert actual.keys() == wanted.keys()
    assert all(abs(actual[step] / wanted[step] - 1) <= BOUND for step in wanted)


def test_ranks_begin_with_a_directory_of_transformers(directory):
    """Each reads its part of the weights, or all."""
    torch.manual_seed(0)
    model = TransformerLM(
        VOCAB_SIZE, 32, 2, 2, 32, num_kv_heads=1, head_dim=8, qkv_bias=True, tie_embeddings=True
    )
    export(model, directory / "llama", file_bytes=10_000)
    settings = dict(init_from="llama", total_steps=4, tokens_per_step=TOKENS, log_every=1)
    settings["joint_projections"] = True  # of weights that fsdp gathers
    run(1, directory, "begun-1", HIDE, batch_size=6, **settings)
    results = run(2, directory, "begun-2", HIDE, batch_size=3, parallel="fsdp", **settings)
    assert "[init] weights of llama" in results[0].stdout
    assert_close_losses(directory / "begun-2", directory / "begun-1")
    weights = read_checkpoint(directory / "begun-2" / "checkpoints" / "checkpoint_model.pt")
    assert weights["model_state"]["layers.0.attn.k_proj.bias"].shape == (8,)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("size", "parallel", "scope", "batch_size"),
    [
        (size, parallel, scope, batch_size)
        for size in (1, 2, 4)
        for parallel, scope in (("ddp", "block"), ("ddp", "model"), ("fsdp", "block"))
        for batch_size in ((WINDOWS // size, 1) if size == 4 else (WINDOWS // size, 4 // size))
    ],
)
def test_compiled(alone, size, parallel, scope, batch_size):
    directory, target = alone.parent, f"compiled-{parallel}-{scope}-{size}-{batch_size}"
    run(
        size, directory, target, HIDE, parallel=parallel, batch_size=batch_size, compile=True,
        compile_scope=scope, eval_batches=5, **STEPS,
    )  # fmt: skip
    assert_close_losses(directory / target, alone)


# Checkpoints

HALVES = dict(total_steps=16, ckpt_every=8, eval_every=4, tokens_per_step=TOKENS, log_every=1)


def half_of(directory, source, target):
    """A run that has come to step 8: `source` without what it wrote later."""
    shutil.copytree(directory / source, directory / target)
    for path in (directory / target / "checkpoints").iterdir():
        if "_8." not in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return directory / target


@pytest.fixture(scope="module")
def sources(directory):
    """What each kind of world leaves: run -> how it was started."""
    made = {}

    def source(size, parallel):
        name = f"source-{parallel}-{size}"
        if name not in made:
            made[name] = True
            run(size, directory, name, HIDE, parallel=parallel, eval_batches=5, **HALVES)
        return name

    return source


CHANGES = [
    ((2, "fsdp"), (2, "ddp")),
    ((2, "fsdp"), (1, "fsdp")),
    ((2, "fsdp"), (3, "fsdp")),
    ((2, "fsdp"), (4, "fsdp")),
    ((2, "fsdp"), (2, "fsdp")),
    ((2, "ddp"), (3, "fsdp")),
    ((2, "ddp"), (1, "ddp")),
    ((1, "ddp"), (2, "fsdp")),
    ((1, "ddp"), (4, "ddp")),
]


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        pytest.param(*change, marks=() if i in (0, 7) else pytest.mark.exhaustive)
        for i, change in enumerate(CHANGES)
    ],
)
def test_a_run_goes_on_in_another_world(directory, sources, saved, resumed):
    source = sources(*saved)
    target = half_of(directory, source, f"{source}-on-{resumed[1]}-{resumed[0]}")
    size, parallel = resumed
    results = resume(
        size, directory, target.name, HIDE, parallel=parallel, batch_size=WINDOWS // size
    )
    assert "at step 8" in results[0].stdout
    assert_close_losses(target, directory / source)
    ours, theirs = (metrics(place, "summary")[-1] for place in (target, directory / source))
    assert abs(ours["val_loss"] / theirs["val_loss"] - 1) <= BOUND
    expected = "dcp" if parallel == "fsdp" and size > 1 else "pt"
    assert (target / "checkpoints" / f"checkpoint_final.{expected}").exists()


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.exhaustive)])
def test_dropout_is_drawn_again(directory, parallel):
    """Two ranks that go on draw what two ranks without a break did: bit for bit. On one rank, with
    the same micro-batches, the same is drawn."""
    settings = dict(total_steps=8, ckpt_every=4, batch_size=2, dropout=0.2, tokens_per_step=TOKENS)
    name = f"dropout-{parallel}"
    run(2, directory, name, parallel=parallel, **settings)
    again = shutil.copytree(directory / name, directory / f"{name}-again")
    suffix = "dcp" if parallel == "fsdp" else "pt"
    for gone in ("final.dcp", "final.pt", "model.pt"):
        path = again / "checkpoints" / f"checkpoint_{gone}"
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    alone = shutil.copytree(again, directory / f"{name}-alone")
    resume(2, directory, again.name)
    final = f"checkpoints/checkpoint_final.{suffix}"
    states = [state_of(place / final) for place in (directory / name, again)]
    assert same(*states)
    resume(1, directory, alone.name)
    assert_close_losses(alone, directory / name)


def state_of(path):
    if path.suffix == ".pt":
        return state(path)
    payload = read_checkpoint(path)
    return {name: payload[name] for name in ("model_state", "optimizer_state", "iteration")}


def test_old_sharded_checkpoints_are_deleted_as_files_are(directory):
    """The last two and the best, written in the background."""
    settings = dict(
        total_steps=12, ckpt_every=2, eval_every=2, eval_batches=5, keep_last=2, lr_max=5.0,
        warmup_iters=100, guard="off", tokens_per_step=TOKENS,
    )  # fmt: skip
    run(1, directory, "files", batch_size=6, **settings)
    run(2, directory, "directories", batch_size=6, parallel="fsdp", **settings)
    files, directories = (
        {path.stem: path.suffix for path in (directory / name / "checkpoints").iterdir()}
        for name in ("files", "directories")
    )
    assert directories.keys() == files.keys()
    assert {stem for stem, suffix in directories.items() if suffix == ".pt"} == {"checkpoint_model"}
    best = read_checkpoint(directory / "directories/checkpoints/checkpoint_final.dcp")[
        "best_checkpoint"
    ]
    assert best["step"] < 8, "else it is one of the last two anyway"
    assert directories[f"checkpoint_{best['step']}"] == ".dcp"


# Decisions


@pytest.mark.parametrize(
    ("parallel", "guard"),
    [
        ("ddp", "rollback"),
        ("fsdp", "skip"),
        pytest.param("ddp", "skip", marks=pytest.mark.exhaustive),
        pytest.param("fsdp", "rollback", marks=pytest.mark.exhaustive),
    ],
)
def test_a_nan_on_one_rank(directory, parallel, guard):
    """All skip the step; after ten in a row all go back."""
    settings = dict(total_steps=24, ckpt_every=5, guard=guard, tokens_per_step=TOKENS, batch_size=6)
    plan = {"what": "nan", "step": 8, "steps": 10 if guard == "rollback" else 1}
    run(1, directory, f"nan-{parallel}-{guard}", {**plan, "rank": 0}, **settings)
    target = f"nan-{parallel}-{guard}-2"
    run(2, directory, target, {**plan, "rank": 1}, parallel=parallel, **settings)
    alone, together = (
        [
            (row["event"], row["step"], row.get("loss"))
            for event in ("train", "guard", "rollback")
            for row in metrics(directory / name, event)
        ]
        for name in (f"nan-{parallel}-{guard}", target)
    )
    assert {event for event, _, _ in alone} >= {"train", "guard" if guard == "skip" else "rollback"}
    assert [row[:2] for row in together] == [row[:2] for row in alone]
    pairs = [(a, b) for (_, _, a), (_, _, b) in zip(alone, together, strict=True) if a == a and a]
    assert all(abs(b / a - 1) <= BOUND for a, b in pairs)


def test_rank_0_says_when_time_is_up(directory):
    settings = dict(total_steps=10_000, ckpt_minutes=1e-6, max_minutes=0.005, keep_last=3)
    results = run(2, directory, "timed", **settings)
    assert "(--max-minutes 0.005)" in results[0].stdout
    steps = sorted(
        int(path.stem.split("_")[1]) for path in (directory / "timed/checkpoints").iterdir()
    )
    assert len(steps) == 3 and steps[2] - steps[0] == 2, steps  # every step is saved


def test_calibration_is_rank_0s(directory):
    settings = dict(total_steps=None, train_minutes=0.001, cosine_iters=None)
    results = run(2, directory, "calibrated", {"calibration": 0.3}, **settings)
    assert "[calibrate]" in results[0].stdout and results[1].stdout == ""
    steps = metrics(directory / "calibrated", "summary")[-1]["step"]
    assert steps % 10 == 0 and f"{steps:,} steps take about" in results[0].stdout


def test_evaluation_alone(directory, sources):
    """The validation data is shared; rank 0 alone looks for ids out of range."""
    source = sources(2, "fsdp")
    argv = ["--resume", source, "--eval-only", *flags(device="cpu", data="train.npy")]
    argv = [json.dumps({"rank": 1, "what": "no scan"}), *argv]
    told = [
        succeeded(run_ranks(size, argv, directory, call="rank_programs:train"))[0].stdout
        for size in (1, 2)
    ]
    lines = [[line for line in text.splitlines() if line.startswith("[VAL]")] for text in told]
    assert lines[0] == lines[1] and len(lines[0]) == 1


def test_tokens_that_do_not_divide(directory):
    argv = [json.dumps({}), *tiny_flags(tokens_per_step=1000, batch_size=4)]
    results = run_ranks(2, argv, directory, call="rank_programs:train")
    assert [r.returncode for r in results] == [2, 2]
    (message,) = (results[0].stderr + results[1].stderr).splitlines()
    assert message.startswith("error: tokens_per_step=1000: ")
    assert message.endswith("2 processes = 256 does not divide it; the nearest is 1024")


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [
        ("Plain", "fsdp"),
        pytest.param("Plain", "ddp", marks=pytest.mark.exhaustive),
        pytest.param("Fused", "ddp", marks=pytest.mark.exhaustive),
        pytest.param("Fused", "fsdp", marks=pytest.mark.exhaustive),
    ],
)
def test_a_callers_own_model(directory, kind, parallel):
    targets = []
    for size in (1, 2):
        targets.append(directory / f"own-{kind}-{parallel}-{size}")
        settings = dict(
            target_dir=str(targets[-1]), parallel=parallel, tokens_per_step=TOKENS, ckpt_every=6,
            batch_size=6, eval_every=6, eval_batches=3, log_every=1,
        )  # fmt: skip
        argv = [kind, json.dumps(settings)]
        results = run_ranks(size, argv, directory, call="rank_programs:train_own")
        output = "".join(r.output for r in succeeded(results))
        assert "[train] missing" not in output and "[sample] none: the data has no" in output
    assert_close(targets[1], targets[0])


def test_overwrite_removes_directories_too(directory):
    settings = dict(ckpt_every=2, parallel="fsdp", tokens_per_step=TOKENS)
    run(2, directory, "again", total_steps=5, **settings)
    run(2, directory, "again", total_steps=2, overwrite=True, **settings)
    found = {path.name for path in (directory / "again/checkpoints").iterdir()}
    assert found == {"checkpoint_final.dcp", "checkpoint_model.pt"}
