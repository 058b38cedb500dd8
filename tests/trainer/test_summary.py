"""The figures at the end of a run, and that nothing optional fails it."""

import re

import pytest
import torch
from in_process import TRAIN, checkpoint, run_tiny
from training_runs import metrics, tiny_config

from fastlm.data.loader import TrainLoader
from fastlm.model_loss import ModelLoss
from fastlm.run.log import metrics_path
from fastlm.run.summary import Clock, print_summary
from fastlm.step import TrainStep, create_model_and_optimizer

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def test_a_resumed_summary_covers_the_whole_run(tmp_path, capsys):
    settings = dict(ckpt_every=8)
    run_tiny(tmp_path / "run", **settings)
    before = torch.load(checkpoint(tmp_path / "run", 8), weights_only=True)["clock"]
    assert before["run_seconds"] > before["step_seconds"] > 0
    capsys.readouterr()
    resumed = str(checkpoint(tmp_path / "run", 8))
    run_tiny(tmp_path / "run", ckpt_path_to_resume=resumed, **settings)
    said = capsys.readouterr().out
    summary = metrics(tmp_path / "run", "summary")[-1]
    assert (summary["steps"], summary["tokens"], summary["whole_run"]) == (12, 12 * 128, True)
    assert summary["step_seconds"] > before["step_seconds"]
    assert summary["run_seconds"] > before["run_seconds"] + summary["step_seconds"] / 2
    assert summary["tokens_per_second"] == pytest.approx(
        summary["tokens"] / summary["step_seconds"], rel=0.01
    )
    assert 0 < summary["data_wait_seconds"] < summary["step_seconds"]
    assert re.search(r"data +\d+\.\d\d% of the steps' time was waiting for batches$", said, re.M)
    assert re.search(r"12 steps, 1,536 tokens .*; all pieces, this one from step 8 on$", said, re.M)


def test_max_minutes_are_those_of_this_piece():
    stored = {"clock": {"step_seconds": 1e6, "run_seconds": 2e6}}
    clock = Clock(torch.device("cpu"), 0.0, stored)
    assert clock.seconds == 0 and clock.all_seconds == 1e6 and clock.knows_all


def test_a_run_that_only_gets_its_end_records_its_speed(tmp_path):
    run_tiny(tmp_path / "run")
    path = metrics_path(tmp_path / "run" / "logs")
    (first,) = metrics(tmp_path / "run", "summary")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    resumed = checkpoint(tmp_path / "run")
    run_tiny(tmp_path / "run", ckpt_path_to_resume=str(resumed))
    (again,) = metrics(tmp_path / "run", "summary")
    assert again["steps"] == 12
    assert again["tokens_per_second"] == pytest.approx(first["tokens_per_second"], rel=0.2)
    # Without the time of the steps before, it is not known, and not 0.
    payload = torch.load(resumed, weights_only=True)
    del payload["clock"], payload["guard"]
    torch.save(payload, tmp_path / "old_12.pt")
    run_tiny(tmp_path / "old", ckpt_path_to_resume=str(tmp_path / "old_12.pt"))
    (old,) = metrics(tmp_path / "old", "summary")
    assert (old["steps"], old["tokens_per_second"], old["mfu"]) == (0, None, None)
    assert old["whole_run"] is False


def test_each_processs_speed_and_the_mfu_are_of_this_piece(tmp_path, monkeypatch, capsys):
    """The pieces before may have had other processes, or another machine."""
    run_tiny(tmp_path, total_steps=8)
    payload = torch.load(checkpoint(tmp_path), weights_only=True)
    payload["clock"] = {"step_seconds": 1e4, "run_seconds": 1e4}
    torch.save(payload, tmp_path / "slow.pt")
    two = lambda *figures: print_summary(*figures[:-1], peaks=[1, 1])  # noqa: E731
    monkeypatch.setattr("fastlm.run.finish.print_summary", two)
    capsys.readouterr()
    run_tiny(tmp_path / "on", ckpt_path_to_resume=str(tmp_path / "slow.pt"))
    said, (summary,) = capsys.readouterr().out, metrics(tmp_path / "on", "summary")
    assert summary["tokens_per_second"] < 1
    each = summary["mfu"] * summary["matmul_ceiling_flops"] / summary["flops_per_token"]
    assert each > 100
    form = r"^\[summary\] processes   2, ([\d,]+) tokens/s in steps each in this piece$"
    assert float(re.search(form, said, re.M)[1].replace(",", "")) == pytest.approx(each, rel=0.01)
    assert re.search(r"^\[summary\] model FLOPs .* TFLOP/s in this piece$", said, re.M)


@pytest.mark.parametrize(
    "place, what",
    [
        ("fastlm.run.summary.matmul_ceiling", "matmul ceiling"),
        ("fastlm.run.plot.LivePlotter.save", "loss curve"),
        ("fastlm.run.summary.sample_texts", "samples"),
    ],
)
def test_nothing_optional_fails_a_finished_run(tmp_path, monkeypatch, capsys, place, what):
    from fastlm.data.dataset import as_dataset
    from fastlm.data.files import Data
    from fastlm.train import train

    def fail(*args, **options):
        raise MemoryError("DefaultCPUAllocator: can't allocate memory\nmore")

    monkeypatch.setattr(place, fail)
    data = Data(as_dataset(TRAIN), as_dataset(TRAIN[:500]), tokenizer_json="{}")
    if what != "samples":
        monkeypatch.setattr("fastlm.run.summary.sample_texts", lambda *args, **options: ["text"])
    train(data, tiny_config(tmp_path, total_steps=3))
    said = capsys.readouterr().out
    reason = r"\(MemoryError: DefaultCPUAllocator: can't allocate memory\)"
    assert re.search(rf"^\[train\] no {what} {reason}$", said, re.M), said
    assert len(metrics(tmp_path, "summary")) == 1 and "missing" not in said
    if what == "matmul ceiling":
        assert "[summary] MFU         unknown" in said


def test_nothing_of_the_warm_up_stays_in_memory():
    """Its moments, 8 bytes a parameter, are gone before the first step."""
    cfg = tiny_config("unused")
    model, optimizer, _ = create_model_and_optimizer(cfg)
    loader = TrainLoader(TRAIN, cfg.batch_size, cfg.context_len, seed=0)
    runner = TrainStep(ModelLoss(model, loader.device, cfg), optimizer, loader, cfg)
    storages = []
    run = runner.run

    def watched(*args, **options):
        result = run(*args, **options)
        for entry in optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                storages.append(entry[name].untyped_storage()._weak_ref())
        return result

    runner.run = watched
    runner.warm_up()
    assert len(storages) == 2 * 2 * len(list(model.parameters()))
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)
    for storage in storages:
        torch.UntypedStorage._free_weak_ref(storage)


def test_a_checkpoint_that_is_resumed_is_not_kept(tmp_path, monkeypatch):
    """Its tensors, 12 bytes a parameter, are gone before the first step."""
    run_tiny(tmp_path / "run", ckpt_every=6)
    import fastlm.run.resume as resume_module

    read, run = resume_module.read_checkpoint, TrainStep.run
    storages, alive = [], []

    def watched(path):
        payload = read(path)
        tensors = [*payload["model_state"].values()]
        for entry in payload["optimizer_state"]["state"].values():
            tensors += [entry["exp_avg"], entry["exp_avg_sq"]]
        storages.extend(tensor.untyped_storage()._weak_ref() for tensor in tensors)
        return payload

    def step(self, first_sample, lr, *stop):
        if first_sample and not alive:
            kept = [ref for ref in storages if not torch.UntypedStorage._expired(ref)]
            alive.append(len(kept))
        return run(self, first_sample, lr, *stop)

    monkeypatch.setattr(resume_module, "read_checkpoint", watched)
    monkeypatch.setattr(TrainStep, "run", step)
    run_tiny(tmp_path / "run", ckpt_path_to_resume=str(checkpoint(tmp_path / "run", 6)))
    assert storages and alive == [0]
