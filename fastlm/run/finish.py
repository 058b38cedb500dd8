"""The end of a run: the weights alone, the loss over all validation data, samples, the summary."""

from pathlib import Path
from typing import Any

from torch import nn

from fastlm.checkpoint import checkpoint_payload, restore_model
from fastlm.evaluate import (
    bits_per_byte,
    describe_sets,
    evaluating,
    loss_over_sets,
    mean_of_sets,
)
from fastlm.generate import sample_texts
from fastlm.model_interface import model_class
from fastlm.parallel.wrap import gathered_on_main
from fastlm.run.commands import generate_command
from fastlm.run.signals import Stopped
from fastlm.run.summary import RunFigures, measured_ceiling, print_samples, print_summary
from fastlm.step import create_model, graphs_compiled


def finish(run: Any) -> bool:  # run: fastlm.loop.Run
    """Behind the last step. False if it was stopped: the resumed run does it then."""
    cfg, runner, data, clock = run.cfg, run.runner, run.data, run.clock
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
            found = loss_over_sets(
                run.summed,
                data,
                cfg.batch_size,
                cfg.context_len,
                runner.device,
                max_targets=cfg.final_eval_tokens,
                world=run.world,
            )
    except Stopped:
        return False
    run.memory.sample()
    final, known = mean_of_sets(found), data.val_bytes
    in_bytes = bits_per_byte(final.loss, final.of_targets, known) if known else None
    whole = clock.knows_all
    figures = RunFigures(
        steps=run.completed - (0 if whole else run.start_step),
        tokens=(run.samples_seen - (0 if whole else run.start_samples)) * cfg.context_len,
        step_seconds=clock.all_seconds,
        run_seconds=clock.run_seconds,
        piece_seconds=clock.seconds,
        waited_seconds=runner.step_loader.waited,
        start_step=run.start_step,
        whole=whole,
        compile_seconds=runner.compile_seconds,
        recompiles=graphs_compiled() - run.graphs if cfg.compile else 0,
        flops_per_token=run.flops_per_token,
        final=final,
        peak_memory=run.memory,
        peaks=run.world.gather(run.memory.bytes),
        skipped=run.watch.report.skipped,
        rolled_back=runner.guard.rolled_back,
        bits_per_byte=in_bytes,
    )
    texts = run.log.attempt(
        "samples",
        lambda: print_samples(
            _whole_model(run, weights),
            data.tokenizer_json,
            cfg.seed,
            cfg.context_len,
            data.end_of_text,
        ),
    )
    if texts:
        run.log.metrics("sample", step=run.completed, texts=texts)
    ceiling = run.log.attempt("matmul ceiling", lambda: measured_ceiling(runner))
    summary = print_summary(figures, runner, ceiling)
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
