"""manifest.json: what `python -m fastlm.prepare` writes and the trainer reads back.

A prepared directory holds

    manifest.json         this description
    tokenizer.json        the tokenizer, in the format of the `tokenizers` library
    train_00000.bin ...   raw little-endian token ids, `dtype` each, no header
    val_00000.bin ...
"""

import json
import os
import re
import stat
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastlm.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT = "fastlm-tokens"
VERSION = 1

_MAX_BYTES = 64 << 20  # of the file: 300,000 shards
_MAX_COUNT = 1 << 62
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass
class Shard:
    file: str  # relative to the manifest's directory
    tokens: int
    sha256: str


@dataclass
class Split:
    tokens: int = 0
    bytes: int = (
        0  # UTF-8 bytes of the text, end-of-text markers not counted: the base of bits per byte
    )
    documents: int = 0
    shards: list[Shard] = field(default_factory=list)
    # uint8, 1 where the token is no target of the loss; a file for each shard, or none at all
    ignored: list[Shard] = field(default_factory=list)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Split":
        """What asdict made a dict of."""
        files = {
            name: [Shard(**shard) for shard in stored.get(name, ())]
            for name in ("shards", "ignored")
        }
        return cls(**{**stored, **files})


@dataclass
class Manifest:
    vocab_size: int
    dtype: str  # numpy name: "uint16" or "uint32"
    splits: dict[str, Split]  # "train" and "val"
    tokenizer: str | None = None  # file name, relative to the manifest's directory
    end_of_text: int | None = None  # token id that ends every document
    fingerprint: str = (
        ""  # sha256 over the tokenizer and every shard: identifies the exact data of a run
    )
    source: dict[str, str | int | float] = field(
        default_factory=dict
    )  # how it was made, for people

    def save(self, directory: str | Path) -> None:
        payload = {"format": FORMAT, "version": VERSION, **asdict(self)}
        for split in payload["splits"].values():
            if not split["ignored"]:  # which an older fastlm does not know
                del split["ignored"]
        text = json.dumps(payload, indent=2) + "\n"
        (Path(directory) / MANIFEST_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        """Raises DataError if the file cannot be read or holds anything that save() never writes.

        A manifest may come from anywhere: the names in it are base names, numbers have bounds.
        """
        path = Path(directory) / MANIFEST_NAME
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{path}: not a regular file")
            if path.stat().st_size > _MAX_BYTES:
                raise DataError(f"{path}: is larger than any manifest ({_MAX_BYTES >> 20} MiB)")
            payload = json.loads(path.read_text(encoding="utf-8"))
            if (found := (payload.pop("format"), payload.pop("version"))) != (FORMAT, VERSION):
                raise DataError(
                    f"{path}: format {found!r:.80}, this fastlm reads {(FORMAT, VERSION)}; "
                    f"prepare again"
                )
            splits = {name: Split.of(split) for name, split in payload.pop("splits").items()}
            if missing := {"train", "val"} - set(splits):
                raise DataError(f"{path}: has no {min(missing)} split; prepare the data again")
            manifest = cls(splits=splits, **payload)
            if wrong := manifest._first_wrong_value():
                raise DataError(f"{path}: {wrong}; prepare the data again")
            return manifest
        except DataError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise DataError(
                f"{path}: not a readable manifest ({error}); prepare the data again"
            ) from error

    def _first_wrong_value(self) -> str | None:
        def number(what: str, value: Any, least: int, most: int = _MAX_COUNT) -> str | None:
            if type(value) is int and least <= value <= most:  # True is an int, too
                return None
            return f"{what}={value!r:.80}: it must be an integer from {least} to {most}"

        def base_name(what: str, value: Any) -> str | None:
            if is_base_name(value):
                return None
            return f"{what}={value!r:.80}: it must be the name of a file beside the manifest"

        def checks():
            yield number("vocab_size", self.vocab_size, 1, 1 << 32)
            if self.dtype not in ("uint16", "uint32"):
                yield f"dtype={self.dtype!r:.80}: it must be uint16 or uint32"
            if self.tokenizer is not None:
                yield base_name("tokenizer", self.tokenizer)
            if self.end_of_text is not None:
                yield number("end_of_text", self.end_of_text, 0, self.vocab_size - 1)
            if not (isinstance(self.fingerprint, str) and _SHA256.fullmatch(self.fingerprint)):
                yield f"fingerprint={self.fingerprint!r:.80}: it must be a SHA-256"
            if not isinstance(self.source, dict):
                yield f"source={self.source!r:.80}: it must be an object"
            for name, split in self.splits.items():
                for field_name in ("tokens", "bytes", "documents"):
                    yield number(f"{name}.{field_name}", getattr(split, field_name), 0)
                if not split.shards:
                    yield f"it lists no {name} shards"
                if split.ignored and len(split.ignored) != len(split.shards):
                    yield f"{name}.ignored has not one file for each shard"
                for index, shard in enumerate([*split.shards, *split.ignored]):
                    what = f"{name}.shards[{index}]"
                    yield base_name(f"{what}.file", shard.file)
                    yield number(f"{what}.tokens", shard.tokens, 1)
                    if not (isinstance(shard.sha256, str) and _SHA256.fullmatch(shard.sha256)):
                        yield f"{what}.sha256={shard.sha256!r:.80}: it must be a SHA-256"
                if (held := sum(shard.tokens for shard in split.shards)) != split.tokens:
                    yield f"the {name} shards hold {held} tokens, {name}.tokens says {split.tokens}"

        return next(filter(None, checks()), None)


def is_base_name(name: Any) -> bool:
    """Can `name` only be that of an entry of the directory that it is joined to?"""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        return False
    try:
        return len(os.fsencode(name)) <= 255
    except UnicodeError:  # half a surrogate pair
        return False


def readable(path: str | Path) -> str:
    """A file name that any stream and any JSON reader takes: bytes that are no UTF-8 are U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")
