"""The trainer's command line: defaults, preset, checkpoint, TOML file and flags, in this order.

Each layer overrides the ones before it, and every value remembers which layer it came from.
"""

import argparse
import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from fastlm.checkpoint import Reader, checkpoint_files, read_checkpoint, read_values
from fastlm.config import TrainingConfig
from fastlm.errors import ConfigError, DeviceError, shown
from fastlm.hardware import device_memory, has_fast_bfloat16, select_device
from fastlm.parallel.world import World
from fastlm.presets import PRESETS, preset_settings
from fastlm.run.resume import RUNS, Resumed, find, initial_architecture, read_unchecked
from fastlm.run.settings import nearest, read_toml, to_toml

# What --init-from leaves out of a preset that nobody named: rates of new weights ruin trained ones.
_OF_NEW_WEIGHTS = ("optimizer", "lr_max", "lr_min", "embedding_lr_scale")


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
    resumed: Resumed | None = None  # the checkpoint that --resume means
    changed: list[str] = field(default_factory=list)  # settings that differ from the checkpoint's
    ignored: list[str] = field(default_factory=list)  # the preset's that the checkpoint's go before


def parse(
    argv: list[str] | None = None,
    read: Reader = read_checkpoint,
    *,
    prog: str = "python -m fastlm.train",
    description: str | None = None,  # default: that of CommandLine
) -> Invocation:
    """Raises ConfigError or CheckpointError; flags that tyro rejects exit with code 2."""
    import tyro

    argv = _explicit_resume(list(sys.argv[1:] if argv is None else argv))
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    names = "preset config device dtype target-dir ckpt-dir ckpt-save-prefix init-from"
    for name in names.split():
        early.add_argument(f"--{name}", f"--{name.replace('-', '_')}")
    early.add_argument("--resume", "--ckpt-path-to-resume", "--ckpt_path_to_resume", dest="resume")
    try:
        first, _ = early.parse_known_args(argv)
    except argparse.ArgumentError:  # a flag without its value, which tyro reports below
        first, _ = early.parse_known_args([])

    file_settings = read_toml(first.config) if first.config is not None else {}
    of_file = file_settings.pop("preset", None)
    chosen = of_file if first.preset is None else first.preset
    preset = _default_preset(first.device) if chosen is None else chosen
    if preset not in PRESETS:
        raise ConfigError(f"preset={shown(preset)} is unknown{nearest(preset, PRESETS)}")

    dtype = first.dtype or file_settings.get("dtype", "auto")
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's
    of_preset = preset_settings(preset, _memory(first.device, dtype), processes)
    layers: list[tuple[str, dict[str, Any]]] = [(f"preset {preset}", of_preset)]
    resumed, initial = None, {}
    if not {"--help", "-h"} & set(argv):
        resumed = _find_resumed(first, file_settings, read)
        if resumed and first.init_from:
            raise ConfigError(
                "--resume continues a run and --init-from starts one: give one of them"
            )
        init_from = first.init_from or file_settings.get("init_from")
        if init_from and not resumed:
            initial = initial_architecture(init_from)
            if chosen is None:
                kept = {n: v for n, v in of_preset.items() if n not in _OF_NEW_WEIGHTS}
                layers = [(f"preset {preset}", kept)]
    stored = resumed.settings if resumed else {}
    if initial:
        layers.append(("checkpoint of --init-from", initial))
    if stored:
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
    parsed = tyro.cli(CommandLine, args=argv, default=default, prog=prog, description=description)
    flags = {_setting_name(token) for token in argv if token.startswith("--")} & set(names)
    origins.update(dict.fromkeys(flags, "command line"))

    settings = {name: getattr(parsed, name) for name in names}
    asked = flags | set(file_settings)  # by this invocation, not by a preset or a checkpoint
    _follow(settings, origins, flags, asked, {**initial, **stored})
    _place(settings, origins, asked, preset, resumed)
    config = TrainingConfig(**settings)
    changed = [
        f"{name}: {shown(stored[name])} -> {shown(getattr(config, name))}"
        for name in sorted(stored)
        if getattr(config, name) != stored[name]
    ]
    ignored = [
        name
        for name, value in of_preset.items()
        if chosen and name in stored and value != getattr(config, name) and name != "train_minutes"
    ]
    return Invocation(config, preset, parsed.print_config, origins, resumed, changed, ignored)


def parse_together(argv: list[str], world: World) -> Invocation:
    """parse() by rank 0 for all ranks. A checkpoint that it names and has checked, the others read,
    but for the weights and moments, which wait until each knows its part."""
    parse_one = _parse_restartable if world.max_restarts else parse
    if world.size == 1:
        return parse_one(argv, read_checkpoint)
    mine: list[Invocation] = []

    def parse_here() -> Invocation:
        mine.append(parse_one(argv, read_values))
        return dataclasses.replace(mine[0], resumed=None)

    invocation = world.decide(parse_here)
    path = invocation.config.ckpt_path_to_resume

    def resumed() -> Resumed | None:
        if mine:
            return mine[0].resumed
        return None if path is None else Resumed.read(path, read_unchecked)

    return dataclasses.replace(invocation, resumed=world.together(resumed))


def device_asked(argv: list[str]) -> str:
    """--device alone: processes find each other on it before they read the other settings."""
    flags = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flags.add_argument("--device", default="auto")
    try:
        return flags.parse_known_args(argv)[0].device
    except argparse.ArgumentError:  # without a value, as parse() says
        return "auto"


def _parse_restartable(argv: list[str], read: Reader) -> Invocation:
    """A command that torchrun --max-restarts, or a cluster's queue, may give again: a run that has
    a checkpoint in --target-dir goes on."""
    invocation = parse(argv, read)
    if invocation.origins["target_dir"] == "time":
        raise ConfigError(
            "torchrun --max-restarts may give the command again: name the run's directory with "
            "--target-dir, so that it goes on from its checkpoints there"
        )
    cfg = invocation.config
    if cfg.overwrite:
        raise ConfigError(
            f"--overwrite with torchrun --max-restarts, which may give the command again, would "
            f"remove what the run has saved: remove {cfg.target_dir} yourself, or name another "
            f"--target-dir"
        )
    if not checkpoint_files(cfg.ckpt_dir, cfg.ckpt_save_prefix):
        return invocation
    # The attempts before may have refused to write over another run's checkpoints.
    found = find(cfg.ckpt_dir, prefix=cfg.ckpt_save_prefix, read=read_unchecked).settings
    follow = {"total_steps", "train_minutes", "cosine_iters", "vocab_size", "grad_accum"}
    resumes = cfg.ckpt_path_to_resume is not None
    if not resumes and any(found[n] != getattr(cfg, n) for n in found.keys() - follow):
        return invocation
    # What only starts a run is done.
    starts = {"--init-from", "--init_from", "--train-minutes", "--train_minutes"}
    rest, tokens = [], iter(argv)
    for token in tokens:
        if token.split("=")[0] in starts:
            if token in starts:
                next(tokens, None)
            continue
        rest.append(token)
    return parse([*rest, "--resume", cfg.ckpt_dir], read)


def _find_resumed(first: argparse.Namespace, file_settings: dict, read: Reader) -> Resumed | None:
    """The checkpoint that --resume means; a setting of the command line goes before the file's."""
    resume = first.resume
    if resume is None:
        resume = file_settings.get("ckpt_path_to_resume")
    if resume is None:
        return None
    if not resume:
        raise ConfigError(
            "--resume '' names nothing; --resume alone takes the newest run, and a run is started "
            "without it"
        )
    places = {}
    for name in ("ckpt_dir", "target_dir", "ckpt_save_prefix"):
        value = getattr(first, name)
        places[name] = file_settings.get(name) if value is None else value
    return find(resume, prefix=places.pop("ckpt_save_prefix"), read=read, **places)


def _follow(settings: dict, origins: dict, flags: set[str], asked: set[str], stored: dict) -> None:
    """Settings that follow another one unless they are set themselves."""
    # A resumed run keeps its schedule, unless it is told to end elsewhere.
    keeps_schedule = "cosine_iters" in stored and "total_steps" not in asked
    if "cosine_iters" not in asked and not keeps_schedule:
        settings["cosine_iters"] = None
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
    if "max_epochs" in flags and settings["train_minutes"] is None:
        raise ConfigError(
            "--max-epochs limits what --train-minutes chooses, and the run's length is set: give "
            "--train-minutes, or leave --max-epochs out"
        )
    if {"tokens_per_step", "grad_accum"} <= asked:
        raise ConfigError("--tokens-per-step sets grad_accum: give one of them")
    if "grad_accum" in asked and settings["tokens_per_step"] is not None:
        settings["tokens_per_step"] = None  # a resumed run's
        origins["tokens_per_step"] = "grad_accum is set"
    if settings["tokens_per_step"] is not None:
        origins["grad_accum"] = "follows tokens_per_step"
    if settings["d_ff"] is None:
        origins["d_ff"] = "follows d_model"
    if "vocab_size" not in asked | stored.keys():
        origins["vocab_size"] += ", until the data's manifest says"


def _place(
    settings: dict, origins: dict, asked: set[str], preset: str, resumed: Resumed | None
) -> None:
    """Where the run's files go: a resumed run's own place, or runs/<preset>-<time>."""
    if resumed is not None:
        settings["init_from"] = None  # a file's, with which the run began
        origins["init_from"] = "default"
        settings["ckpt_path_to_resume"] = str(resumed.path)
        if "ckpt_path_to_resume" not in asked:
            origins["ckpt_path_to_resume"] = "command line"
    if "target_dir" not in asked:
        if resumed is None:
            name = f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
            settings["target_dir"], origins["target_dir"] = os.path.join(RUNS, name), "time"
        else:
            parent = resumed.path.parent
            in_run = parent.name == "checkpoints"
            settings["target_dir"] = str(parent.parent if in_run else parent)
            origins["target_dir"] = "where the checkpoint is"
    for name in ("ckpt_dir", "log_dir"):
        if name not in asked:
            origins[name] = "follows target_dir"


def format_config(invocation: Invocation) -> str:
    """Every setting as TOML, with its origin behind it: it can be kept and passed to --config."""
    lines = [f"preset = {to_toml(invocation.preset)}"]
    for f in dataclasses.fields(TrainingConfig):
        value, origin = getattr(invocation.config, f.name), invocation.origins[f.name]
        setting = f"{f.name} is not set" if value is None else f"{f.name} = {to_toml(value)}"
        # What follows from something else stays a comment, so that it follows in the next run too.
        computed = origin.startswith(("follows", "time", "where")) or "manifest" in origin
        if value is None or computed:
            setting = f"# {setting}"
        lines.append(f"{setting:<48} # {origin}")
    return "\n".join(lines)


def _default_preset(device: str | None) -> str:
    """demo-gpu if the run will be on CUDA."""
    try:
        return "demo-gpu" if select_device(device or "auto").type == "cuda" else "demo"
    except DeviceError:  # reported when the run selects its device
        return "demo"


def _memory(device: str | None, dtype: str) -> int:
    """Bytes that a GPU has, half of them for a run in fp32; 0 for other devices, and those that are
    not there."""
    try:
        found = select_device(device or "auto")
    except DeviceError:
        return 0
    memory = device_memory(found)
    is_wide = dtype == "float32" or (dtype == "auto" and memory and not has_fast_bfloat16(found))
    return memory // 2 if is_wide else memory


def _explicit_resume(argv: list[str]) -> list[str]:
    """A bare `--resume` becomes `--resume auto`: option values are not optional in tyro."""
    result = []
    for index, token in enumerate(argv):
        result.append(token)
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if token == "--resume" and following.startswith("--"):
            result.append("auto")
    return result


def _setting_name(token: str) -> str:
    name = token[2:].split("=", 1)[0].replace("-", "_")
    return name.removeprefix("no_")
