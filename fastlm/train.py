"""The trainer: python -m fastlm.train --compile

main() is the command; train_loop() is the same run for data and settings of one's own. Here a run
is set up and checked; fastlm/loop.py runs it, fastlm/step.py is the step.

Exit codes
    0    the run is complete, or was stopped by --max-minutes or SIGUSR1
    1    it came there and something is missing: lines of a log, a checkpoint, a model that learnt
         anything; the last line says what
    2    a setting, a file or the training itself must be changed first; the error says which
    129, 130, 143
         SIGHUP, SIGINT (Ctrl-C), SIGTERM: a checkpoint is saved, if the steps had begun
    128 + its number
         a second signal, which ends the process at once
"""

import sys
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from torch import nn

from fastlm import __version__
from fastlm.checkpoint import checkpoint_payload
from fastlm.config import TrainingConfig
from fastlm.data.files import Data, open_data
from fastlm.data.loader import TrainLoader
from fastlm.errors import CheckpointError, ConfigError, UserError, run_command, shown
from fastlm.evaluate import (
    bits_per_byte,
    describe_sets,
    evaluating,
    loss_over_sets,
    mean_of_sets,
)
from fastlm.hardware import (
    back_heap_with_huge_pages,
    is_out_of_memory,
    keep_freed_memory,
    select_device,
)
from fastlm.loop import Run
from fastlm.model_interface import blocks_of, prepare_model
from fastlm.model_loss import ModelLoss
from fastlm.parallel.world import ALONE, World, end_process
from fastlm.parallel.wrap import wrap
from fastlm.run.backends import backends
from fastlm.run.directory import RunDirectory
from fastlm.run.environment import differences, environment
from fastlm.run.log import has_ended
from fastlm.run.output import (
    fill_closed_descriptors,
    rank_0_tells,
    silence_broken_streams,
    surviving_output,
)
from fastlm.run.resume import Resumed, load_weights, read_for
from fastlm.run.signals import StopSignals
from fastlm.run.summary import Clock, describe, note_on_warmup
from fastlm.run.track import check_trackers
from fastlm.schedule import rate_jump
from fastlm.step import (
    TrainStep,
    create_model,
    create_optimizer,
    restart_at_documents,
    set_seed,
)


def train_loop(
    train_data: Any, val_data: Any, cfg: TrainingConfig, *, model: nn.Module | None = None
) -> nn.Module:
    """Trains a TransformerLM under `cfg` and returns it; writes checkpoints, log and loss curve.

    train_data, val_data: (n,) token ids, NumPy arrays or memory maps (load_token_dataset); val_data
    may be a dict of several sets by name, each logged.
    model: trained instead, and returned: any nn.Module from (B, T) ids to (B, T, V) logits. With a
    method hidden(x), (B, T, D), and an nn.Linear lm_head, the head and the loss are one op, which
    saves the memory for the logits. It is moved to cfg.device; vocab_size and context_len are
    cfg's, the other sizes there do not count. Continued with the same call and
    cfg.ckpt_path_to_resume; the commands know TransformerLM alone and say so. Buffers that its
    forward changes, as BatchNorm does, are stored; in them alone a step leaves a trace that a
    signal drops behind its first micro-batch. Of several processes each has its own, and rank 0's
    are stored: use nn.SyncBatchNorm there. TypeError, before the first step, for a model whose
    state (get_extra_state) no checkpoint can hold.
    With cfg.eval_only it evaluates, and returns, the model of cfg.ckpt_path_to_resume or
    cfg.init_from. Ctrl-C saves a checkpoint at the micro-batch's end, then raises
    KeyboardInterrupt. Where a file cannot be written the run goes on; the last line says what is
    missing.

    The same call gives the same model bit for bit, however often it was interrupted and resumed:
    on a CPU always (but for such buffers of several processes), on CUDA with cfg.deterministic
    (fastlm/run/environment.py says what it takes).
    Under torchrun every process calls it with the same arguments. Sharded (cfg.parallel "fsdp") the
    model that is returned answers no longer by itself: load its weights from …_model.pt.
    """
    with surviving_output(), World.start(cfg.device) as world, rank_0_tells(world):
        data = Data.of(train_data, val_data)
        _check_alike(data, cfg, world)
        return train(data, cfg, world=world, model=model)


def _check_alike(data: Data, cfg: TrainingConfig, world: World) -> None:
    """Raises ConfigError if this rank was called with other settings or data than rank 0: it would
    wait for what the others never do, or train on with them to no sense."""
    if world.size == 1:
        return
    mine = {**asdict(cfg), "data": data.fingerprint}
    theirs = world.decide(lambda: mine)

    def check() -> None:
        for name, value in mine.items():
            if value != theirs[name]:
                raise ConfigError(
                    f"{name}={shown(value)} on rank {world.rank} and {shown(theirs[name])} on rank "
                    f"0: all processes must be given the same"
                )

    world.together(check)


def train(
    data: Data,
    cfg: TrainingConfig,
    resumed: Resumed | None = None,
    *,
    new_name: bool = False,
    world: World = ALONE,
    model: nn.Module | None = None,
) -> nn.Module:
    """train_loop for opened data. Every check that can fail comes before anything is written.

    resumed: what cfg.ckpt_path_to_resume names, if it has been read already; it is freed.
    new_name: cfg.target_dir is a new run's, and gets a counter if it is there already.
    """
    cfg = cfg.accumulated(world.size)
    if world.device is not None and select_device(cfg.device).type != world.device.type:
        raise ConfigError(
            f"device={cfg.device!r}: several processes find each other on {world.device.type} "
            f"before they read a file of settings; give --device on the command line"
        )
    with backends(cfg, own_model=model is not None):
        if resumed is None and cfg.ckpt_path_to_resume:
            path = cfg.ckpt_path_to_resume
            resumed = world.together(lambda: Resumed.read(path, partial(read_for, world=world)))
        if cfg.eval_only:
            return _evaluate_only(data, cfg, resumed, world, model)
        return _train(data, cfg, resumed, new_name, world, model)


def _train(
    data: Data,
    cfg: TrainingConfig,
    resumed: Resumed | None,
    new_name: bool,
    world: World,
    model: nn.Module | None,
) -> nn.Module:
    begin = time.perf_counter()
    device = select_device(cfg.device)
    check_trackers(cfg.track)
    if resumed:
        cfg = world.together(lambda: resumed.keep_length(cfg))
    if device.type == "cpu":
        keep_freed_memory()
    world.decide(partial(data.check, cfg.context_len, cfg.vocab_size))  # it reads all ids, once

    set_seed(cfg.seed)
    is_own = model is not None
    is_sharded = cfg.parallel == "fsdp" and world.size > 1
    if is_own:
        prepare_model(model, cfg)
    else:  # a sharded one gets memory when each rank knows its part
        model = create_model(cfg, meta=is_sharded)
    restart_at_documents(model, data, cfg)
    if world.size == 1:
        load_weights(model, cfg, resumed, world, tokenizer=data.tokenizer_json)
    start_step = resumed.step if resumed else 0
    if resumed:
        world.together(lambda: resumed.check(data, cfg))
        # Killed behind its last step, a run still lacks its end: weights, samples, summary.
        ended = world.decide(lambda: has_ended(cfg.log_dir, cfg.log_save_prefix))
        lacks_its_end = start_step == cfg.total_steps and not ended
        if start_step >= cfg.total_steps and not lacks_its_end:
            print(
                f"[resume] the run is complete: {start_step} of {cfg.total_steps} steps; "
                f"--total-steps N continues it up to N"
            )
            return model

    with (
        surviving_output() as missing,
        RunDirectory(cfg, resumed, new_name=new_name, world=world) as directory,
        StopSignals(managed=world.is_managed, tells=world.is_main) as stop,
    ):
        cfg = directory.cfg
        loader = TrainLoader(
            data.train, cfg.batch_size, cfg.context_len, seed=cfg.seed, device=device
        )
        loss = ModelLoss(model, device, _with_scope(cfg, model, by_block=world.size > 1))
        wrapped = wrap(
            loss,
            world,
            parallel=cfg.parallel,
            dtype=loss.dtype,
            reshard=cfg.fsdp_reshard,
            find_unused=is_own,
        )
        if is_sharded and not is_own:
            loads = resumed or cfg.init_from
            model.init_rope() if loads else model.init_weights()
        if world.size > 1:
            load_weights(
                model, cfg, resumed, world, restored_later=True, tokenizer=data.tokenizer_json
            )
        runner = TrainStep(loss, create_optimizer(model, cfg), loader, cfg, world, wrapped)
        describe(data, cfg, model, runner)
        checkpoint_payload(model, None, 0)  # a state that none can hold is told now
        if cfg.compile:
            print("[compile] compiling the training and the evaluation step ...", flush=True)
        runner.warm_up()
        stop.leave_together(world)
        if device.type == "cpu":
            back_heap_with_huge_pages()  # now that the heap has grown to what a step needs
        if cfg.compile:
            print(f"[compile] done in {runner.compile_seconds:.1f} s, not counted in tokens/s")
        if cfg.train_minutes is not None:
            cfg = _calibrated(cfg, runner, len(data.train), stop, world)
        samples_seen, tokens_seen = 0, 0
        clock = Clock(device, begin, resumed and resumed.payload)
        if resumed:
            _restore_state(runner, resumed, compiled=cfg.compile)
            if resumed.data_changed:
                runner.guard.forget_level()
            samples_seen, tokens_seen = resumed.position(cfg), resumed.tokens(cfg)
            if note := resumed.other_step(runner.tokens, runner.tokens // runner.grad_accum):
                print(f"[resume] {note}")
            if note := rate_jump(start_step, resumed.settings, cfg):
                print(f"[resume] {note}")
            resumed.free()
        directory.begin()
        Run(
            data,
            cfg,
            runner,
            directory,
            start_step,
            samples_seen,
            tokens_seen,
            clock,
            stop,
            missing,
        ).train()
    return model


def _with_scope(cfg: TrainingConfig, model: nn.Module, *, by_block: bool) -> TrainingConfig:
    """cfg.compile_scope, chosen where it is not set. by_block, for a model that has blocks: several
    processes exchange the gradients of a block while others are computed, and FSDP2 gathers weights
    block by block; an evaluation alone is over before a whole graph has been compiled."""
    if cfg.compile_scope is not None:
        if cfg.compile and cfg.parallel == "fsdp" and cfg.compile_scope == "model":
            raise ConfigError("--compile-scope model: fsdp gathers block by block; use block")
        return cfg
    by_block = by_block and bool(blocks_of(model))
    return replace(cfg, compile_scope="block" if by_block else "model")


def _restore_state(runner: TrainStep, resumed: Resumed, *, compiled: bool) -> None:
    """What load_weights has left: of several processes the weights, too. Says what differs now."""
    try:
        runner.restore(resumed.payload, resumed.path)
    except CheckpointError as error:
        raise CheckpointError(
            f"{resumed.path}: {error}; --init-from starts a new run with its weights"
        ) from error
    now = environment(runner.device, runner.dtype, compiled=compiled, processes=runner.world.size)
    for line in differences(resumed.payload.get("environment"), now):
        print(f"[resume] differs: {line}; the results may, in their last bits")
    print(f"[resume] at step {resumed.step}")


def _calibrated(
    cfg: TrainingConfig, runner: TrainStep, data_tokens: int, stop: StopSignals, world: World
) -> TrainingConfig:
    """`cfg` with the number of steps that take cfg.train_minutes on this machine, or fewer, that
    are cfg.max_epochs of the data."""
    mine = runner.seconds_per_step(stop=lambda: stop.requested)
    seconds = world.decide(lambda: mine)
    stop.leave_together(world)
    steps = max(10, round(cfg.train_minutes * 60 / seconds / 10) * 10)
    minutes, why = f"{cfg.train_minutes:g}", ""
    if cfg.max_epochs is not None:
        most = max(10, round(cfg.max_epochs * data_tokens / runner.tokens))
        if most < steps:
            steps, minutes = most, f"{most * seconds / 60:.2g}"
            why = f" and are {cfg.max_epochs:g} passes over the data, --max-epochs"
    print(
        f"[calibrate] {seconds * 1e3:.1f} ms a step: {steps:,} steps take about {minutes} "
        f"minutes{why} (the same run again: --total-steps {steps})"
    )
    cfg = replace(cfg, total_steps=steps, train_minutes=None)
    note_on_warmup(cfg)
    return cfg


def _evaluate_only(
    data: Data,
    cfg: TrainingConfig,
    resumed: Resumed | None,
    world: World,
    model: nn.Module | None,
) -> nn.Module:
    """--eval-only: the loss over the validation data. Returns the model."""
    device = select_device(cfg.device)
    world.decide(partial(data.check, cfg.context_len, cfg.vocab_size, training=False))
    if not (resumed or cfg.init_from):
        raise ConfigError("--eval-only needs the checkpoint to evaluate: --resume or --init-from")
    model = create_model(cfg) if model is None else prepare_model(model, cfg)
    restart_at_documents(model, data, cfg)
    load_weights(model, cfg, resumed, world, tokenizer=data.tokenizer_json)
    if resumed:
        resumed.free()
    loss_of = ModelLoss(model, device, _with_scope(cfg, model, by_block=True))
    with evaluating(model):
        sets = loss_over_sets(loss_of.summed, data, cfg, device, world)
    for name, said in describe_sets(sets, data).items():
        print(f"[VAL] {name}: {said}")
    found, known = mean_of_sets(sets), data.val_bytes
    bpb = f", {bits_per_byte(found.loss, found.of_targets, known):.4f} bits/byte" if known else ""
    print(f"[VAL] val_loss {found.loss:.4f}{bpb} {found.extent}")
    return model


def _opened(
    cfg: TrainingConfig, origins: dict[str, str], world: World
) -> tuple[Data, TrainingConfig]:
    """The data that `cfg` names, and `cfg` with the vocabulary of its manifest."""
    paths = cfg.data
    if not paths:
        from fastlm.corpus import default_corpus

        paths = world.decide(lambda: (str(default_corpus()),))
    mine: list[Data] = []

    def open_here() -> None:
        if not mine:
            mine.append(open_data(paths, cfg.val_data, dtype=cfg.data_dtype))

    world.decide(open_here)  # what it has verified, the others find verified
    world.together(open_here)
    data = mine[0]
    if data.manifest is None:
        return data, cfg
    return data, cfg.with_vocabulary(data.manifest.vocab_size, origins["vocab_size"])


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    fill_closed_descriptors()
    StopSignals.is_command = True
    try:
        with surviving_output() as missing:
            code = run_command(lambda: _command(argv))
        return code or int(bool(missing))
    finally:
        StopSignals.is_command = False  # a caller's own train_loop may follow
        silence_broken_streams()


def _command(argv: list[str] | None) -> None:
    from fastlm.run.cli import device_asked, parse_together

    argv = sys.argv[1:] if argv is None else argv
    with World.start(device_asked(argv)) as world, rank_0_tells(world):
        _run(parse_together(argv, world), world)


def _run(invocation: Any, world: World) -> None:
    from fastlm.run.cli import format_config

    if invocation.print_config:
        print(format_config(invocation))
        return
    cfg = invocation.config
    print(f"[run] fastlm {__version__}, preset {invocation.preset}: --help lists every setting")
    for line in invocation.changed:
        print(f"[resume] changed: {line}")
    if invocation.ignored:
        print(
            f"[resume] --preset {invocation.preset}: the checkpoint's settings go before its "
            f"{', '.join(invocation.ignored)}; flags go before both"
        )
    asked = invocation.origins["final_eval_tokens"].startswith(("command line", "file"))
    if cfg.eval_only and not asked:
        cfg = replace(cfg, final_eval_tokens=0)
    select_device(cfg.device)  # before the time that the data may take
    data, cfg = _opened(cfg, invocation.origins, world)
    new_name = invocation.origins["target_dir"] == "time"
    try:
        train(data, cfg, invocation.resumed, new_name=new_name, world=world)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory ({str(error).splitlines()[0][:200]}); lower --batch-size (raise "
            f"--grad-accum to keep the step's tokens) or --context-len, or add "
            f"--activation-checkpointing"
        ) from error


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as ending:  # a signal's, or a parser's
        code = ending.code or 0
    end_process(code)
