"""The trainer: python -m fastlm.train --compile

main() is the command; train_loop() is the same run for data and settings of one's own.
"""

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastlm import __version__
from fastlm.checkpoint import iteration_of, read_checkpoint, restore_model, save_checkpoint
from fastlm.config import TrainingConfig
from fastlm.data.files import Data, as_dataset, check_dataset, open_data
from fastlm.data.loader import TrainLoader, spread_batches
from fastlm.errors import CheckpointError, ConfigError, UserError
from fastlm.evaluate import bits_per_byte, evaluating, loss_over_all, mean_loss
from fastlm.generate import sample_texts
from fastlm.hardware import device_name, is_out_of_memory, keep_freed_memory, select_device
from fastlm.model import TransformerLM, count_parameters, training_flops_per_token
from fastlm.rundir import RunDirectory, StopSignals
from fastlm.runlog import RunLog
from fastlm.schedule import cosine_lr_schedule, wsd_lr_schedule
from fastlm.step import TrainStep, create_model_and_optimizer, graphs_compiled, set_seed
from fastlm.summary import Clock, RunFigures, print_summary


def train_loop(train_data: Any, val_data: Any, cfg: TrainingConfig) -> TransformerLM:
    """Trains a TransformerLM under `cfg` and returns it; writes checkpoints, log and loss curve.

    train_data, val_data: (n,) token ids, NumPy arrays or memory maps (load_token_dataset).
    Ctrl-C saves a checkpoint at the next step's end, then raises KeyboardInterrupt.
    """
    return train(Data(as_dataset(train_data), as_dataset(val_data)), cfg)


def train(data: Data, cfg: TrainingConfig) -> TransformerLM:
    """train_loop for opened data. Every check that can fail comes before anything is written."""
    begin = time.perf_counter()
    device = select_device(cfg.device)
    if device.type == "cpu":
        keep_freed_memory()
    for dataset, what in ((data.train, "training"), (data.val, "validation")):
        check_dataset(dataset, what, context_len=cfg.context_len, vocab_size=cfg.vocab_size)

    set_seed(cfg.seed)
    model, optimizer, _ = create_model_and_optimizer(cfg)
    resumed = _weights_to_start_from(model, data, cfg)
    start_step = iteration_of(resumed) if resumed else 0
    if resumed and start_step >= cfg.total_steps:
        print(
            f"[resume] the run is complete: {start_step} of {cfg.total_steps} steps; "
            f"--total-steps N continues it up to N"
        )
        return model
    loader = TrainLoader(
        data.train,
        cfg.batch_size,
        cfg.context_len,
        seed=cfg.seed,
        device=device,
        grad_accum=cfg.grad_accum,
    )
    runner = TrainStep(model, optimizer, loader, cfg)
    _describe(data, cfg, model, runner)

    with RunDirectory(cfg, resuming=resumed is not None) as directory:
        if cfg.compile:
            print("[compile] compiling the training and the evaluation step ...", flush=True)
        runner.warm_up()
        if cfg.compile:
            print(f"[compile] done in {runner.compile_seconds:.1f} s, not counted in tokens/s")
        if cfg.train_minutes is not None:
            cfg = _calibrated(cfg, runner)
        if resumed:
            _restore_state(runner, resumed)
        directory.begin()
        return _run(data, cfg, runner, directory, start_step, begin)


def _run(
    data: Data,
    cfg: TrainingConfig,
    runner: TrainStep,
    directory: RunDirectory,
    start_step: int,
    begin: float,  # time.perf_counter() of the run's begin
) -> TransformerLM:
    """The loop and the end of a run."""
    model, optimizer, device = runner.model, runner.optimizer, runner.device
    log = RunLog(
        cfg.log_dir, cfg.log_save_prefix, start_step=start_step, total_steps=cfg.total_steps
    )
    log.metrics("start", step=start_step, config=asdict(cfg), data=_fingerprint(data))
    graphs = graphs_compiled() if cfg.compile else 0

    def save(completed: int, name: str) -> Path:
        path = directory.checkpoint_path(name)
        save_checkpoint(model, optimizer, completed, path, **_state(data, cfg, runner))
        log.checkpoint(path)
        return path

    clock = Clock(device)
    window_loss, window_steps, window_begin = torch.zeros((), device=device), 0, 0.0
    completed = start_step
    with StopSignals() as stop:
        clock.start()
        for step in range(start_step, cfg.total_steps):
            lr = learning_rate(step, cfg)
            loss = runner.run(step, lr)
            completed = step + 1
            window_loss += loss
            window_steps += 1
            log.advance()

            if step % cfg.log_every == 0:
                average = float(window_loss) / window_steps  # waits for the device
                seconds = clock.seconds - window_begin
                norm = optimizer.last_grad_norm
                log.train(
                    step,
                    loss=float(loss),
                    avg_loss=average,
                    lr=lr,
                    grad_norm=float("nan") if norm is None else float(norm),
                    steps_per_second=window_steps / seconds,
                    tokens_per_second=window_steps * runner.tokens / seconds,
                )
                window_loss.zero_()
                window_steps, window_begin = 0, clock.seconds

            stopping = stop.requested or _time_is_up(cfg, clock)
            last = completed == cfg.total_steps
            # A checkpoint comes before an evaluation: what could fail must not cost the steps.
            saving = not last and (stopping or _is_multiple(completed, cfg.ckpt_every))
            evaluating_now = last or (step > 0 and _is_multiple(step, cfg.eval_every))
            if saving or evaluating_now:
                clock.pause()
                if saving:
                    save(completed, str(completed))
                if evaluating_now and not (stopping and not last):
                    log.val(step, _quick_validation(data, cfg, runner))
                clock.start()
            if stopping:
                break
        clock.pause()

    if completed < cfg.total_steps:
        log.close()
        why = stop.name or f"--max-minutes {cfg.max_minutes}"
        print(
            f"[train] stopped after {completed} of {cfg.total_steps} steps ({why}); continue with: "
            f"python -m fastlm.train --resume {cfg.target_dir}" + (" --compile" * cfg.compile)
        )
        stop.leave()
        return model

    save(completed, "final")
    path = directory.checkpoint_path("model")
    save_checkpoint(model, None, completed, path, config=asdict(cfg), tokenizer=_tokenizer(data))
    log.checkpoint(path)
    with evaluating(model):
        val_loss, targets = loss_over_all(
            runner.summed_loss, data.val, cfg.batch_size, cfg.context_len, device
        )
    log.close()
    figures = RunFigures(
        steps=completed - start_step,
        tokens=(completed - start_step) * runner.tokens,
        step_seconds=clock.seconds,
        run_seconds=time.perf_counter() - begin,
        compile_seconds=runner.compile_seconds,
        recompiles=graphs_compiled() - graphs if cfg.compile else 0,
        flops_per_token=training_flops_per_token(model, cfg.context_len),
        val_loss=val_loss,
        val_targets=targets,
        bits_per_byte=bits_per_byte(val_loss, targets, data.val_bytes) if data.val_bytes else None,
    )
    _print_samples(model, data, cfg)
    log.metrics("summary", **print_summary(figures, device, runner.dtype))
    print(f"[summary] files       {cfg.ckpt_dir}, {cfg.log_dir}")
    print(f'[summary] try it      python -m fastlm.generate --ckpt {path} --prompt "..."')
    return model


def learning_rate(step: int, cfg: TrainingConfig) -> float:
    """The rate of a step under cfg.schedule."""
    if cfg.schedule == "wsd":
        return wsd_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.total_steps)
    return cosine_lr_schedule(step, cfg.lr_max, cfg.lr_min, cfg.warmup_iters, cfg.cosine_iters)


def _is_multiple(number: int, every: int) -> bool:
    return every > 0 and number % every == 0


def _time_is_up(cfg: TrainingConfig, clock: Clock) -> bool:
    return cfg.max_minutes is not None and clock.seconds >= cfg.max_minutes * 60


def _quick_validation(data: Data, cfg: TrainingConfig, runner: TrainStep) -> float:
    """Mean loss on the fixed batches."""
    batches = spread_batches(
        data.val, cfg.batch_size, cfg.context_len, cfg.eval_batches, runner.device
    )
    with evaluating(runner.model):
        return mean_loss(runner.summed_loss, batches)


def _weights_to_start_from(
    model: TransformerLM, data: Data, cfg: TrainingConfig
) -> dict[str, Any] | None:
    """Loads what --init-from or --resume names; returns the checkpoint to resume, or None."""
    if cfg.ckpt_path_to_resume and cfg.init_from:
        raise ConfigError("--resume continues a run and --init-from starts one: give one of them")
    if cfg.init_from:
        restore_model(model, read_checkpoint(cfg.init_from))
        print(f"[init] weights of {cfg.init_from}")
    if not cfg.ckpt_path_to_resume:
        return None
    print(f"[resume] Loading checkpoint from {cfg.ckpt_path_to_resume}")
    payload = read_checkpoint(cfg.ckpt_path_to_resume)
    restore_model(model, payload)
    stored = payload.get("data_fingerprint")
    if stored is not None and stored != _fingerprint(data) and not cfg.eval_only:
        raise CheckpointError(
            f"{cfg.ckpt_path_to_resume}: its run read other data ({stored}) than this one "
            f"({_fingerprint(data)}); --init-from starts a new run with its weights"
        )
    return payload


def _restore_state(runner: TrainStep, payload: dict[str, Any]) -> None:
    """Everything but the weights: moments, loss scale, random state."""
    state = payload.get("optimizer_state", payload.get("optimizer_state_dict"))
    if state is None:
        raise CheckpointError(
            "the checkpoint holds no optimizer state and cannot be resumed; --init-from starts a "
            "new run with its weights"
        )
    runner.optimizer.load_state_dict(state)
    if payload.get("scaler"):
        runner.scaler.load_state_dict(payload["scaler"])
    random_state = payload.get("random_state", {})
    if "torch" in random_state:
        torch.set_rng_state(random_state["torch"])
    if "cuda" in random_state and runner.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["cuda"], runner.device)
    print(f"[resume] at step {iteration_of(payload)}")


def _state(data: Data, cfg: TrainingConfig, runner: TrainStep) -> dict[str, Any]:
    """What a checkpoint holds beside model, optimizer and step."""
    random_state = {"torch": torch.get_rng_state()}
    if runner.device.type == "cuda":
        random_state["cuda"] = torch.cuda.get_rng_state(runner.device)
    return {
        "config": asdict(cfg),
        "data_fingerprint": _fingerprint(data),
        "tokenizer": _tokenizer(data),
        "scaler": runner.scaler.state_dict(),
        "random_state": random_state,
        "fastlm_version": __version__,
    }


def _fingerprint(data: Data) -> str:
    if data.manifest is not None:
        return data.manifest.fingerprint
    return f"{len(data.train)} {data.train.dtype} tokens without a manifest"


def _tokenizer(data: Data) -> str | None:
    path = data.tokenizer_path
    return None if path is None else path.read_text(encoding="utf-8")


def _calibrated(cfg: TrainingConfig, runner: TrainStep) -> TrainingConfig:
    """`cfg` with the number of steps that take cfg.train_minutes on this machine."""
    seconds = runner.seconds_per_step()
    steps = max(10, round(cfg.train_minutes * 60 / seconds / 10) * 10)
    print(
        f"[calibrate] {seconds * 1e3:.1f} ms a step: {steps:,} steps take about "
        f"{cfg.train_minutes:g} minutes (the same run again: --total-steps {steps})"
    )
    follows = cfg.cosine_iters == cfg.total_steps
    return replace(
        cfg,
        total_steps=steps,
        cosine_iters=steps if follows else cfg.cosine_iters,
        train_minutes=None,
    )


def _describe(data: Data, cfg: TrainingConfig, model: TransformerLM, runner: TrainStep) -> None:
    """What the run does, on what, for how long."""
    compiled = "compiled" if cfg.compile else "not compiled (--compile is faster)"
    length = (
        f"as many steps as take {cfg.train_minutes:g} minutes"
        if cfg.train_minutes is not None
        else f"{cfg.total_steps:,} steps"
    )
    print(
        f"[run] model: {count_parameters(model) / 1e6:.2f} M parameters ({cfg.num_layers} layers, "
        f"d_model {cfg.d_model}, {cfg.num_heads} heads, vocabulary {cfg.vocab_size})"
    )
    print(
        f"[run] data: {len(data.train):,} training and {len(data.val):,} validation tokens, "
        f"fingerprint {_fingerprint(data)[:16]}"
    )
    print(
        f"[run] on {runner.device} ({device_name(runner.device)}), torch {torch.__version__}, "
        f"{str(runner.dtype).removeprefix('torch.')}, {compiled}"
    )
    print(
        f"[run] {length} of {runner.tokens:,} tokens, seed {cfg.seed}, into {cfg.target_dir}",
        flush=True,
    )


def _print_samples(model: TransformerLM, data: Data, cfg: TrainingConfig) -> None:
    """Five samples, the first five: none is chosen."""
    tokenizer = _tokenizer(data)
    if tokenizer is None:
        print("[sample] none: the data has no tokenizer to turn ids into text")
        return
    texts = sample_texts(model, tokenizer, num_samples=5, seed=cfg.seed)
    for index, text in enumerate(texts):
        print(f"[sample {index + 1} of {len(texts)}]\n{text.strip()}\n")


def _evaluate_only(data: Data, cfg: TrainingConfig) -> None:
    """--eval-only: the loss over all validation data."""
    device = select_device(cfg.device)
    check_dataset(data.val, "validation", context_len=cfg.context_len, vocab_size=cfg.vocab_size)
    if not (cfg.ckpt_path_to_resume or cfg.init_from):
        raise ConfigError("--eval-only needs the checkpoint to evaluate: --resume or --init-from")
    model, optimizer, _ = create_model_and_optimizer(cfg)
    _weights_to_start_from(model, data, cfg)
    loader = TrainLoader(data.val, cfg.batch_size, cfg.context_len, seed=0, device=device)
    runner = TrainStep(model, optimizer, loader, cfg)
    with evaluating(model):
        loss, targets = loss_over_all(
            runner.summed_loss, data.val, cfg.batch_size, cfg.context_len, device
        )
    known = data.val_bytes
    in_bytes = f", {bits_per_byte(loss, targets, known):.4f} bits/byte" if known else ""
    print(f"[VAL] val_loss {loss:.4f}{in_bytes} over all {targets:,} targets")


def _opened(cfg: TrainingConfig, origins: dict[str, str]) -> tuple[Data, TrainingConfig]:
    """The data that `cfg` names, and `cfg` with the vocabulary of its manifest."""
    paths = cfg.data
    if not paths:
        from fastlm.corpus import default_corpus

        paths = (str(default_corpus()),)
    data = open_data(paths, cfg.val_data, dtype=cfg.data_dtype)
    if data.manifest is None:
        return data, cfg
    vocab_size = data.manifest.vocab_size
    if origins["vocab_size"].startswith(("command line", "file")):
        if cfg.vocab_size < vocab_size:
            raise ConfigError(
                f"vocab_size={cfg.vocab_size} is less than the {vocab_size} of the data's "
                f"tokenizer; leave it out, or pad it to a larger number"
            )
        return data, cfg
    return data, replace(cfg, vocab_size=vocab_size)


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    from fastlm.cli import format_config, parse

    try:
        invocation = parse(argv)
        if invocation.print_config:
            print(format_config(invocation))
            return 0
        cfg = invocation.config
        print(f"[run] fastlm {__version__}, preset {invocation.preset}: --help lists every setting")
        for line in invocation.changed:
            print(f"[resume] changed: {line}")
        select_device(cfg.device)  # before the time that the data may take
        data, cfg = _opened(cfg, invocation.origins)
        if cfg.eval_only:
            _evaluate_only(data, cfg)
        else:
            train(data, cfg)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(
            f"error: out of memory ({str(error).splitlines()[0][:200]}); lower --batch-size (raise "
            f"--grad-accum to keep the step's tokens) or --context-len, or add "
            f"--activation-checkpointing",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
