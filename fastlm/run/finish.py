"""The end of a run: the weights alone, the loss over all validation data, samples, the summary."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fastlm.checkpoint import checkpoint_payload, restore_model
from fastlm.evaluate import describe_sets, evaluating, loss_over_sets, mean_of_sets
from fastlm.generate import sample_texts
from fastlm.model_interface import model_class
from fastlm.parallel.wrap import gathered_on_main
from fastlm.run.commands import generate_command
from fastlm.run.signals import Stopped
from fastlm.run.summary import measured_ceiling, print_samples, print_summary
from fastlm.step import create_model


def finish(run: Any) -> bool:  # run: fastlm.loop.Run
    """Behind the last step. False if it was stopped: the resumed run does it then."""
    cfg, runner, data = run.cfg, run.runner, run.data
    model_path: Path = run.directory.checkpoint_path("model")
    weights = checkpoint_payload(runner.model, None, run.completed, **run.identity())
    if runner.is_sharded:
        weights["model_state"] = gathered_on_main(weights["model_state"], run.world)
    run.saver.save("model", weights, wait=True)
    run.report_saves()
    run.watch.look(run.log, run.completed)
    run.log.close()  # and its progress bar: the evaluation has its own
    run.stop.promise = "the run's end can be had by --resume"
    try:
        with evaluating(runner.model):
            found = loss_over_sets(run.summed, data, cfg, runner.device, run.world)
    except Stopped:
        return False
    run.memory.sample()
    # Now, not behind the samples, which rank 0 alone writes.
    peaks, run_seconds = run.world.gather(run.memory.bytes), run.clock.run_seconds
    whole = partial(_whole_model, run, weights)
    texts = run.log.attempt("samples", lambda: print_samples(whole, data, cfg))
    if texts:
        run.log.metrics("sample", step=run.completed, texts=texts)
    ceiling = run.log.attempt("matmul ceiling", lambda: measured_ceiling(runner))
    final = mean_of_sets(found)
    summary = print_summary(run, final, ceiling, run_seconds, peaks)
    for name, said in describe_sets(found, data).items():
        print(f"[summary] validation  {name}: {said}")
        summary[f"val_loss/{name}"] = found[name].loss
    run.log.metrics("summary", step=run.completed, **summary)
    run.watch.complain(run.missing, final.loss)
    print(f"[summary] files       {cfg.ckpt_dir}, {cfg.log_dir}")
    if model_path.exists() and model_class(runner.model) is None:
        command = generate_command(model_path, cfg, tokenizer=data.tokenizer_json is not None)
        print(f"[summary] try it      {command}", flush=True)
    return True


def sample(run: Any, step: int) -> None:  # run: fastlm.loop.Run
    """One sample behind `step`, of a new document; without a tokenizer, ids. It draws from a
    generator of its own: training goes on as without it. Every rank calls it: a sharded model's
    weights are spread over all of them."""
    cfg, data = run.cfg, run.data
    weights: dict[str, Any] = {}
    if run.runner.is_sharded:
        whole = checkpoint_payload(run.runner.model, None, run.completed)["model_state"]
        weights["model_state"] = gathered_on_main(whole, run.world)

    def write() -> None:
        (text,) = sample_texts(
            _whole_model(run, weights), data.tokenizer_json, num_samples=1, max_new_tokens=100,
            seed=cfg.seed, context_len=cfg.context_len, end_of_text=data.end_of_text,
        )  # fmt: skip
        run.log.sample(step, text)

    run.log.attempt("sample", write)


def _whole_model(run: Any, weights: dict[str, Any]) -> nn.Module:
    """The model, on rank 0 alone: a sharded one answers to all ranks at once."""
    if not run.runner.is_sharded:
        return run.runner.model
    if model_class(run.runner.model) is not None:
        raise RuntimeError("only a TransformerLM can be gathered on one process")
    model = create_model(run.cfg)
    restore_model(model, weights)
    model.document_end = run.runner.model.document_end
    return model
