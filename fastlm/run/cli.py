"""The trainer's command line: defaults, preset, checkpoint, TOML file and flags, in this order.

Each layer overrides the ones before it, and every value remembers which layer it came from.
"""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlm.checkpoint import checkpoint_files, newest_readable, read_checkpoint
from fastlm.config import TrainingConfig
from fastlm.errors import CheckpointError, ConfigError, DeviceError
from fastlm.presets import PRESETS

RUNS = "runs"  # where runs go unless --target-dir says otherwise
# Settings of the invocation, not of the run: a checkpoint does not bring them back.
_NOT_RESUMED = (
    "target_dir", "ckpt_dir", "log_dir", "ckpt_path_to_resume", "init_from", "eval_only",
    "overwrite", "max_minutes", "device",
)  # fmt: skip


@dataclass
class CommandLine(TrainingConfig):
    """Train a language model: python -m fastlm.train --compile"""

    preset: str = "demo"
    """Starting point of the settings: demo, demo-gpu (the default on CUDA), notebook, gpt2-124m."""
    config: str | None = None
    """TOML file of settings (what --print-config prints)."""
    resume: str | None = None
    """Continue a run: a checkpoint, a run's directory, or nothing for --target-dir's or the newest
    run's newest checkpoint."""
    print_config: bool = False
    """Print every setting and where it came from, and stop."""

    def __post_init__(self):
        """Derives and checks nothing: TrainingConfig does, when every layer has had its say."""


@dataclass
class Invocation:
    """What the command line asks for."""

    config: TrainingConfig
    preset: str
    print_config: bool
    origins: dict[str, str] = field(default_factory=dict)  # setting -> the layer it came from
    changed: list[str] = field(default_factory=list)  # settings that differ from the checkpoint's


def parse(argv: list[str] | None = None) -> Invocation:
    """Raises ConfigError or CheckpointError; flags that tyro rejects exit with code 2."""
    import tyro

    argv = _explicit_resume(list(sys.argv[1:] if argv is None else argv))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("preset", "config", "device", "target-dir", "ckpt-dir"):
        early.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    early.add_argument("--resume", "--ckpt-path-to-resume", "--ckpt_path_to_resume", dest="resume")
    try:
        first, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value, which tyro reports below
        first, _ = early.parse_known_args([])

    file_settings = read_toml(first.config) if first.config else {}
    of_file = file_settings.pop("preset", None)
    preset = first.preset or of_file or _default_preset(first.device)
    if preset not in PRESETS:
        raise ConfigError(f"preset={preset!r} is unknown{_nearest(preset, PRESETS)}")

    layers: list[tuple[str, dict[str, Any]]] = [(f"preset {preset}", PRESETS[preset])]
    resume_path, stored = None, {}
    first.resume = first.resume or file_settings.get("ckpt_path_to_resume")
    if first.resume and "--help" not in argv and "-h" not in argv:
        resume_path, payload = _find_resume(first, file_settings)
        stored = _stored_settings(payload)
        layers.append(("checkpoint", stored))
    if file_settings:
        layers.append((f"file {first.config}", file_settings))

    names = [f.name for f in dataclasses.fields(TrainingConfig)]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(names, "default")
    for origin, layer in layers:
        values.update(layer)
        origins.update(dict.fromkeys(layer, origin))

    default = CommandLine(**values, preset=preset)
    parsed = tyro.cli(CommandLine, args=argv, default=default, prog="python -m fastlm.train")
    flags = {_setting_name(token) for token in argv if token.startswith("--")} & set(names)
    origins.update(dict.fromkeys(flags, "command line"))

    settings = {name: getattr(parsed, name) for name in names}
    asked = flags | set(file_settings)  # by this invocation, not by a preset or a checkpoint
    _follow(settings, origins, flags, asked, stored)
    _place(settings, origins, asked, preset, resume_path)
    config = TrainingConfig(**settings)
    changed = [
        f"{name}: {stored[name]} -> {getattr(config, name)}"
        for name in sorted(stored)
        if getattr(config, name) != stored[name]
    ]
    return Invocation(config, preset, parsed.print_config, origins, changed)


def _follow(settings: dict, origins: dict, flags: set[str], asked: set[str], stored: dict) -> None:
    """Settings that follow another one unless they are set themselves."""
    # A resumed run keeps its schedule, unless it is told to end elsewhere.
    keeps_schedule = "cosine_iters" in stored and "total_steps" not in asked
    if "cosine_iters" not in asked and not keeps_schedule:
        settings["cosine_iters"] = settings["total_steps"]
        origins["cosine_iters"] = "follows total_steps"
    minutes_are_a_flag = "train_minutes" in flags
    if "total_steps" in stored and minutes_are_a_flag:
        raise ConfigError(
            "--train-minutes chooses the length of a new run; a resumed one ends elsewhere with "
            "--total-steps N"
        )
    steps_are_set = "total_steps" in asked and not minutes_are_a_flag
    if steps_are_set or "total_steps" in flags | stored.keys():
        settings["train_minutes"] = None
        origins["train_minutes"] = "total_steps is set"
    elif settings["train_minutes"] is not None:
        origins["total_steps"] = "follows train_minutes"
    if settings["d_ff"] is None:
        origins["d_ff"] = "follows d_model"
    if "vocab_size" not in asked:
        origins["vocab_size"] += ", until the data's manifest says"


def _place(
    settings: dict, origins: dict, asked: set[str], preset: str, resume_path: Path | None
) -> None:
    """Where the run's files go: a resumed run's own place, or runs/<preset>-<time>."""
    if resume_path is not None:
        settings["ckpt_path_to_resume"] = str(resume_path)
        if "ckpt_path_to_resume" not in asked:
            origins["ckpt_path_to_resume"] = "command line"
    if "target_dir" not in asked:
        if resume_path is None:
            name = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
            settings["target_dir"], origins["target_dir"] = os.path.join(RUNS, name), "time"
        else:
            parent = resume_path.parent
            in_run = parent.name == "checkpoints"
            settings["target_dir"] = str(parent.parent if in_run else parent)
            origins["target_dir"] = "where the checkpoint is"
    for name in ("ckpt_dir", "log_dir"):
        if name not in asked:
            origins[name] = "follows target_dir"


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file: names and types checked. Raises ConfigError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: is no TOML ({error})") from error
    hints = {**typing.get_type_hints(TrainingConfig), "preset": str}
    settings = {}
    for raw_name, value in values.items():
        name = raw_name.replace("-", "_")
        if name not in hints:
            raise ConfigError(f"{path}: {raw_name!r} is no setting{_nearest(name, hints)}")
        settings[name] = _coerce(f"{path}: {raw_name}", value, hints[name])
    return settings


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, if TOML's type is one that a person would write for it."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None; TOML has no None
        return _coerce(name, value, next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        repeated = arguments[1:] == (Ellipsis,)
        if repeated or len(arguments) == len(value):
            kinds = [arguments[0]] * len(value) if repeated else arguments
            return tuple(_coerce(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if origin is typing.Literal:
        expected = f"one of {', '.join(map(repr, arguments))}"
    else:
        expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{name} = {value!r}: it must be {expected}")


def format_config(invocation: Invocation) -> str:
    """Every setting as TOML, with its origin behind it: it can be kept and passed to --config."""
    lines = [f"preset = {_toml(invocation.preset)}"]
    for f in dataclasses.fields(TrainingConfig):
        value, origin = getattr(invocation.config, f.name), invocation.origins[f.name]
        setting = f"{f.name} is not set" if value is None else f"{f.name} = {_toml(value)}"
        # What follows from something else stays a comment, so that it follows in the next run too.
        computed = origin.startswith(("follows", "time", "where")) or "manifest" in origin
        if value is None or computed:
            setting = f"# {setting}"
        lines.append(f"{setting:<48} # {origin}")
    return "\n".join(lines)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # its escapes are TOML's too
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _default_preset(device: str | None) -> str:
    """demo-gpu if the run will be on CUDA."""
    from fastlm.hardware import select_device

    try:
        return "demo-gpu" if select_device(device or "auto").type == "cuda" else "demo"
    except DeviceError:  # reported when the run selects its device
        return "demo"


def _explicit_resume(argv: list[str]) -> list[str]:
    """A bare `--resume` becomes `--resume auto`: option values are not optional in tyro."""
    result = []
    for index, token in enumerate(argv):
        result.append(token)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if token == "--resume" and following.startswith("--"):
            result.append("auto")
    return result


def _find_resume(first: argparse.Namespace, file_settings: dict) -> tuple[Path, dict[str, Any]]:
    """(file, content) of the checkpoint that --resume means."""
    if first.resume != "auto":
        path = Path(first.resume)
        if not path.exists():
            raise CheckpointError(f"--resume {path}: no such checkpoint or directory")
        if path.is_file():
            return path, read_checkpoint(path)
        directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        return newest_readable(directory)
    ckpt_dir = first.ckpt_dir or file_settings.get("ckpt_dir")
    target_dir = first.target_dir or file_settings.get("target_dir")
    if ckpt_dir or target_dir:
        return newest_readable(ckpt_dir or Path(target_dir) / "checkpoints")
    runs = Path(RUNS).glob("*/checkpoints")
    newest = [(files[0].stat().st_mtime, run) for run in runs if (files := checkpoint_files(run))]
    if not newest:
        raise CheckpointError(
            f"--resume: no run under {RUNS}/ has a checkpoint; name one: --resume PATH"
        )
    return newest_readable(max(newest)[1])


def _stored_settings(payload: dict[str, Any]) -> dict[str, Any]:
    """The settings that the checkpoint's run had."""
    config = payload.get("config")
    if not isinstance(config, dict):
        return {}  # another program's: the model's size must come from flags
    known = {f.name for f in dataclasses.fields(TrainingConfig)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in config.items()
        if name in known and name not in _NOT_RESUMED
    }


def _setting_name(token: str) -> str:
    name = token[2:].split("=", 1)[0].replace("-", "_")
    return name.removeprefix("no_")


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
