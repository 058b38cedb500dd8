"""What a run resumes: finding its checkpoint, and checking that the run can go on from it."""

import dataclasses
import math
import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fastlm.checkpoint import (
    CheckpointFile,
    Reader,
    checkpoint_files,
    holds_optimizer_state,
    iteration_of,
    list_checkpoints,
    load_checkpoint,
    newest_readable,
    read_checkpoint,
    read_values,
    restore_model,
)
from fastlm.checkpoint_reading import peek
from fastlm.config import TrainingConfig
from fastlm.data.files import Data
from fastlm.data.sampler import SAMPLER_VERSION
from fastlm.errors import CheckpointError, ConfigError, UserError, shown
from fastlm.foreign_state import first_line
from fastlm.huggingface import is_model_directory, read_settings
from fastlm.model_config import ModelConfig
from fastlm.model_interface import check_model_class, model_class
from fastlm.parallel.commit import is_sharded
from fastlm.parallel.world import World
from fastlm.pretrained import check_window
from fastlm.run.settings import coerce

RUNS = "runs"  # where runs go unless --target-dir says otherwise
# Settings of the invocation, not of the run: a checkpoint does not bring them back.
_NOT_RESUMED = (
    "target_dir", "ckpt_dir", "log_dir", "ckpt_path_to_resume", "init_from", "eval_only",
    "overwrite", "max_minutes", "device", "allow_data_change", "profile",
)  # fmt: skip
_MAX_SAMPLES = 2**62  # a position far below 2^63, so that what follows it is one, too
_POSITION = ("seed", "context_len")  # what decides with the data which tokens come next


@dataclass
class Resumed:
    """A checkpoint that a run goes on from, its plain values checked and typed."""

    path: Path
    payload: dict[str, Any]
    step: int  # completed steps
    samples_seen: int | None  # None: another program's, which did not count them
    run_id: str | None  # None likewise
    settings: dict[str, Any]  # its run's, those of the invocation left out
    beside: frozenset[str]  # the checkpoints that were in its directory when it was chosen
    data_changed: bool = False  # said by check()

    @classmethod
    def read(cls, path: str | Path, read: Reader = read_checkpoint) -> "Resumed":
        """Raises CheckpointError."""
        path = Path(path)
        try:
            beside = _names(path.parent)
            return cls.of(path, read(path), beside)
        except OSError as error:
            raise CheckpointError(
                f"{shown(str(path))}: cannot be read ({error.strerror})"
            ) from error

    @classmethod
    def of(cls, path: Path, payload: dict[str, Any], beside: frozenset[str]) -> "Resumed":
        """Raises CheckpointError for values that no run has written."""
        try:
            step = iteration_of(payload)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            step = -1
        samples_seen, run_id = payload.get("samples_seen"), payload.get("run_id")
        checks = {
            "iteration": 0 <= step < 2**63,
            "samples_seen": samples_seen is None
            or (type(samples_seen) is int and 0 <= samples_seen < _MAX_SAMPLES),
            "tokens_seen": (tokens := payload.get("tokens_seen")) is None
            or (type(tokens) is int and 0 <= tokens < 2**63),
            "run_id": run_id is None or (isinstance(run_id, str) and 0 < len(run_id) <= 100),
            "sampler_version": type(payload.get("sampler_version", 1)) is int,
            "environment": _is_plain(payload.get("environment", {})),
            "clock": _is_clock(payload.get("clock", {})),
        }
        for name, holds in checks.items():
            if not holds:
                raise CheckpointError(
                    f"{path}: its {name} cannot be a run's ({shown(payload.get(name))}); resume "
                    f"another checkpoint, or start with its weights: --init-from"
                )
        settings = _stored_settings(path, payload)
        return cls(path, payload, step, samples_seen, run_id, settings, beside)

    def position(self, cfg: TrainingConfig) -> int:
        """The number of the first sample that it has not trained on."""
        if self.samples_seen is not None:
            return self.samples_seen
        # Another program's: its batch never changed, as far as is known.
        batch_size = self.settings.get("batch_size", cfg.batch_size)
        position = self.step * batch_size * self.settings.get("grad_accum", cfg.grad_accum)
        if not 0 <= position < _MAX_SAMPLES:
            raise CheckpointError(
                f"{self.path}: its step and batch cannot be a run's ({self.step} steps of "
                f"{shown(batch_size)}); start with its weights: --init-from"
            )
        return position

    def tokens(self, cfg: TrainingConfig) -> int:
        """How many tokens it has trained on: a changed context_len changes those of a sample."""
        tokens = self.payload.get("tokens_seen")
        if tokens is None:  # another program's
            tokens = self.position(cfg) * self.settings.get("context_len", cfg.context_len)
        return tokens

    def keep_length(self, cfg: TrainingConfig) -> TrainingConfig:
        """`cfg` that ends where the checkpoint's run does: train_minutes, if it has them, have
        chosen that once. Raises ConfigError where the checkpoint does not tell."""
        if cfg.train_minutes is None:
            return cfg
        total_steps = self.settings.get("total_steps")
        if total_steps is None:
            raise ConfigError(
                f"{self.path}: does not say how long its run is, and train_minutes="
                f"{cfg.train_minutes:g} chooses the length of a new one: give --total-steps N"
            )
        cosine_iters = self.settings.get("cosine_iters")
        return dataclasses.replace(
            cfg, total_steps=total_steps, cosine_iters=cosine_iters, train_minutes=None
        )

    def other_step(self, tokens: int, micro_batch: int) -> str:
        """Says so if a step of `tokens` is not the size of the steps before. micro_batch: tokens in
        one on all processes."""
        environment = self.payload.get("environment") or {}
        factors = [self.settings.get(name) for name in ("batch_size", "grad_accum", "context_len")]
        factors.append(environment.get("processes", 1))
        before = math.prod(factors) if all(type(factor) is int for factor in factors) else tokens
        if before == tokens:
            return ""
        how = f" (--tokens-per-step {before})" if before % micro_batch == 0 else ""
        return f"a step has {tokens:,} tokens and had {before:,}{how}"

    def check(self, data: Data, cfg: TrainingConfig) -> None:
        """Raises CheckpointError if it cannot be resumed, or would read on in other data."""
        if not holds_optimizer_state(self.payload):
            raise CheckpointError(
                f"{self.path}: holds no optimizer state and cannot be resumed; --init-from starts "
                f"a new run with its weights"
            )
        optimizer = self.settings.get("optimizer", "adamw")
        if optimizer != cfg.optimizer:
            raise CheckpointError(
                f"{self.path}: its optimizer is {shown(optimizer)}, not {cfg.optimizer}: resume it "
                f"with --optimizer {optimizer}, or start with its weights: --init-from"
            )
        scale = self.settings.get("embedding_lr_scale", 1.0)
        if (scale == 1) != (cfg.embedding_lr_scale == 1):  # else its group takes the new rate
            raise CheckpointError(
                f"{self.path}: its embedding_lr_scale is {scale}, not {cfg.embedding_lr_scale}: "
                f"resume it with --embedding-lr-scale {scale}, or start with its weights: "
                f"--init-from"
            )
        stored = self.payload.get("data_fingerprint")
        changed = [
            f"{name} {shown(self.settings[name])} -> {getattr(cfg, name)}"
            for name in _POSITION
            if self.settings.get(name, getattr(cfg, name)) != getattr(cfg, name)
        ]
        order = self.payload.get("sampler_version", SAMPLER_VERSION)
        if order != SAMPLER_VERSION:
            changed.append(f"sampler_version {shown(order)} -> {SAMPLER_VERSION}")
        self.data_changed = stored not in (None, data.fingerprint)
        if self.data_changed:
            changed.append(f"data {shown(stored)} -> {data.fingerprint!r}")
        if changed and not cfg.allow_data_change:
            what = "data" if changed[-1].startswith("data ") else changed[-1].split()[0]
            raise CheckpointError(
                f"{self.path}: its run read other data or in another order ({', '.join(changed)}); "
                f"give the same {what}, or go on all the same with --allow-data-change, or start a "
                f"new run with its weights: --init-from"
            )
        for line in changed:
            print(f"[resume] --allow-data-change: {line}; goes on at the same sample number")

    def free(self) -> None:
        """Lets go of the tensors, whoever else holds this object: the run has its own now."""
        self.payload.clear()


def find(
    name: str,
    *,
    ckpt_dir: str | None = None,
    target_dir: str | None = None,
    prefix: str | None = None,
    read: Reader = read_checkpoint,
) -> Resumed:
    """The checkpoint that `--resume name` means: that one, or the newest one of a directory.

    name "auto": the newest one of ckpt_dir or target_dir if they are given, else of the newest run
    under runs/, by the time that its checkpoints have stored. prefix None: any.
    """
    try:
        path = None if name == "auto" else Path(name)
        if path is not None and not path.exists():
            raise CheckpointError(f"--resume {path}: no such checkpoint or directory")
        if path is not None and (path.is_file() or is_sharded(path)):
            return Resumed.read(path, read)
        directory = _directory(path, ckpt_dir, target_dir)
        beside = _names(directory)
        return Resumed.of(*newest_readable(directory, prefix, read), beside)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"--resume {shown(name)}: cannot be read ({reason})") from error


def _directory(path: Path | None, ckpt_dir: str | None, target_dir: str | None) -> Path:
    if path is not None:
        return path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if ckpt_dir or target_dir:
        return Path(ckpt_dir or Path(target_dir) / "checkpoints")
    runs = [  # with the time of each one's newest checkpoint
        (max(file.saved_at for file in files), run)
        for run in Path(RUNS).glob("*/checkpoints")
        if (files := list_checkpoints(run))
    ]
    if not runs:
        raise CheckpointError(
            f"--resume: no run under {RUNS}/ has a checkpoint; name one: --resume PATH"
        )
    return max(runs)[1]


def _names(directory: Path) -> frozenset[str]:
    return frozenset(file.name for file in checkpoint_files(directory))


def belongs(file: CheckpointFile, resumed: Resumed, directory: str | os.PathLike) -> bool:
    """Is `file`, in `directory`, of the run that `resumed` goes on with?

    Where one of them has no run id they are, if they are in one directory.
    """
    if None in (file.run_id, resumed.run_id):
        return os.path.realpath(directory) == os.path.realpath(resumed.path.parent)
    return file.run_id == resumed.run_id


def _stored_settings(path: Path, payload: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the checkpoint's run had, typed like those of a TOML file."""
    config = payload.get("config")
    if not isinstance(config, Mapping):
        return {}  # another program's: the model's size must come from flags
    hints = typing.get_type_hints(TrainingConfig)
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(TrainingConfig):
        name = field.name
        if name in _NOT_RESUMED:
            continue
        if name not in config:
            # A setting that came after that run had its default there, whatever presets say.
            if "fastlm_version" in payload:
                settings[name] = field.default
            continue
        value, hint = config[name], hints[name]
        if value is None and type(None) in typing.get_args(hint):
            settings[name] = None
            continue
        try:
            value = list(value) if isinstance(value, tuple) else value
            settings[name] = coerce(f"{path}: its setting {name}", value, hint)
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
    return settings


def _is_plain(environment: Any) -> bool:
    return isinstance(environment, Mapping) and all(
        value is None or type(value) in (str, int, float, bool) for value in environment.values()
    )


def _is_clock(clock: Any) -> bool:
    """Seconds by name, as Clock.state_dict has them."""
    names = {"step_seconds", "run_seconds"}
    return (
        isinstance(clock, Mapping)
        and clock.keys() in (set(), names)
        and all(type(seconds) in (int, float) and 0 <= seconds < 1e12 for seconds in clock.values())
    )


def initial_architecture(init_from: str) -> dict[str, Any]:
    """The settings of the model that --init-from names; {} where another program has stored none.

    What cannot be read is for load_weights to say. Raises CheckpointError for a directory of
    transformers whose model is no TransformerLM.
    """
    if is_model_directory(init_from):
        settings = read_settings(init_from)[0].settings()
    else:
        try:
            payload = read_unchecked(init_from)
        except CheckpointError:
            return {}
        if not isinstance(payload, Mapping) or "model_class" in payload:
            return {}
        settings = _stored_settings(Path(init_from), payload)
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    names -= {"dropout", "activation_checkpointing"}  # how it is trained; so is context_len
    return {name: value for name, value in settings.items() if name in names}


def load_weights(
    model: nn.Module,
    cfg: TrainingConfig,
    resumed: Resumed | None,
    world: World,
    *,
    restored_later: bool = False,
    tokenizer: str | None = None,
) -> None:
    """Loads the weights that --resume or --init-from names, if they name any.

    tokenizer: the data's, which must not give other meanings to the ids that --init-from's has.
    restored_later: several processes read a resumed run's weights with its moments, once.
    With a model on the meta device it only checks whether it could, and reads no tensor.
    """
    if resumed is not None:
        print(f"[resume] Loading checkpoint from {resumed.path}")
        path, payload = str(resumed.path), resumed.payload
    elif cfg.init_from is not None:
        tensors = not any(p.is_meta for p in model.parameters())
        path = cfg.init_from
        payload = world.together(lambda: read_for(path, world, tensors=tensors))
    else:
        return
    check_model_class(payload, path, model)
    if resumed is None:
        check_window(payload, path, cfg.context_len)
        _check_tokenizers(path, payload.get("tokenizer"), tokenizer)
    try:
        if world.size == 1:
            restore_model(model, payload)
        elif resumed is None or not restored_later:  # each rank its part, if they have parts
            load_checkpoint(model, None, path, group=world.cpu_group)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    stored = payload.get("config")
    if model_class(model) is None:
        # Files without settings, those of other programs, have no QK norm.
        stored = {"qk_norm": False, **(stored if isinstance(stored, dict) else {})}
        for name in ("num_heads", "qk_norm"):  # the weights' shapes do not tell
            if stored.get(name) not in (None, getattr(cfg, name)):
                raise CheckpointError(
                    f"{path}: the checkpoint is of another architecture: {name}="
                    f"{shown(stored[name])}, not {getattr(cfg, name)}; give "
                    f"{_flag(name, stored[name])}, as the checkpoint's run did"
                )
    if resumed is None:
        print(f"[init] weights of {cfg.init_from}")
        if model_class(model) is None:
            for name in stored.keys() & {"rope_theta", "rope_scaling", "norm_eps"}:
                if stored[name] != getattr(cfg, name):  # which a longer context may want
                    print(
                        f"[init] changed: {name}: {shown(stored[name])} -> "
                        f"{shown(getattr(cfg, name))}"
                    )


def _check_tokenizers(path: str, theirs: Any, ours: str | None) -> None:
    """Raises CheckpointError if an id is one token in the tokenizer beside the weights and another
    in the data's. Either may have tokens that the other lacks."""
    if not isinstance(theirs, str) or ours is None or theirs == ours:
        return
    from tokenizers import Tokenizer

    try:
        known = {i: token for token, i in Tokenizer.from_str(theirs).get_vocab().items()}
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: its tokenizer cannot be read ({error})") from error
    vocabulary = Tokenizer.from_str(ours).get_vocab().items()
    other = [i for token, i in vocabulary if known.get(i, token) != token]
    if other:
        i = min(other)
        token = next(token for token, number in vocabulary if number == i)
        raise CheckpointError(
            f"{path}: its tokenizer is not the data's: id {i} is {shown(known[i])} there and "
            f"{shown(token)} in the data; prepare the data with it (--tokenizer)"
        )


def _flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    return f"--{flag}" if value is True else f"--no-{flag}" if not value else f"--{flag} {value}"


def read_unchecked(path: str | os.PathLike) -> dict[str, Any]:
    """The content of a checkpoint that another process has checked; its tensors are not read."""
    try:
        return peek(Path(path))
    except Exception as error:  # gone, or not there on this machine
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"{shown(str(path))}: cannot be read ({reason})") from error


def read_for(path: str | os.PathLike, world: World, *, tensors: bool = True) -> dict[str, Any]:
    """The content; in a world of several without the weights, which each rank reads in parts."""
    try:
        return read_checkpoint(path) if tensors and world.size == 1 else read_values(path)
    except OSError as error:
        raise CheckpointError(f"{shown(str(path))}: cannot be read ({error.strerror})") from error
