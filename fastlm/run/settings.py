"""Settings as TOML: read and typed, and written again."""

import contextlib
import difflib
import json
import sys
import types
import typing
from typing import Any

from fastlm.config import TrainingConfig
from fastlm.errors import ConfigError, shown

_MAX_TOML_BYTES = 1 << 20


def read_toml(path: str) -> dict[str, Any]:
    """The settings in a TOML file: names and types checked. Raises ConfigError."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            text = file.read(_MAX_TOML_BYTES + 1)
        if len(text) > _MAX_TOML_BYTES:
            raise ConfigError(f"--config {shown(path)}: is longer than any file of settings")
        values = tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise ConfigError(f"--config {path}: is nested too deep to be settings") from error
    except ValueError as error:  # its syntax, its encoding, its numbers, or a path that cannot be
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"--config {path}: is no TOML ({error})") from error
    hints = {**typing.get_type_hints(TrainingConfig), "preset": str}
    settings = {}
    for raw_name, value in values.items():
        name = raw_name.replace("-", "_")
        if name not in hints:
            raise ConfigError(f"{path}: {shown(raw_name)} is no setting{nearest(name, hints)}")
        settings[name] = coerce(f"{path}: {raw_name}", value, hints[name])
    return settings


def coerce(name: str, value: Any, hint: Any) -> Any:
    """`value` as the annotated type, if TOML's type is one that a person would write for it.

    name: what the error calls it. Raises ConfigError.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # X | None; TOML has no None
        return coerce(name, value, next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list):
        repeated = arguments[1:] == (Ellipsis,)
        if repeated or len(arguments) == len(value):
            kinds = [arguments[0]] * len(value) if repeated else arguments
            return tuple(coerce(name, v, kind) for v, kind in zip(value, kinds, strict=True))
    if hint is float and type(value) in (int, float):
        with contextlib.suppress(OverflowError):
            return float(value)
    if hint in (int, bool, str) and type(value) is hint:
        return value
    if origin is typing.Literal:
        expected = f"one of {', '.join(map(repr, arguments))}"
    else:
        expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"{name} = {shown(value)}: it must be {expected}")


def to_toml(value: Any) -> str:
    """A setting's value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # its escapes are TOML's too
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(to_toml, value))}]"
    return repr(value)


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What a message adds about an unknown name: the one that was meant, or all."""
    known = list(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"
