"""manifest.json: what `python -m fastlm.prepare` writes and the trainer reads back.

A prepared directory holds

    manifest.json         this description
    tokenizer.json        the tokenizer, in the format of the `tokenizers` library
    train_00000.bin ...   raw little-endian token ids, `dtype` each, no header
    val_00000.bin ...
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastlm.errors import DataError

MANIFEST_NAME = "manifest.json"
FORMAT = "fastlm-tokens"
VERSION = 1


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
        text = json.dumps(payload, indent=2) + "\n"
        (Path(directory) / MANIFEST_NAME).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Manifest":
        path = Path(directory) / MANIFEST_NAME
        try:
            payload = json.loads(path.read_text(encoding="utf-8"))
            if (found := (payload.pop("format"), payload.pop("version"))) != (FORMAT, VERSION):
                raise DataError(
                    f"{path}: format {found}, this fastlm reads {(FORMAT, VERSION)}; prepare again"
                )
            splits = {
                name: Split(**{**split, "shards": [Shard(**shard) for shard in split["shards"]]})
                for name, split in payload.pop("splits").items()
            }
            if missing := {"train", "val"} - set(splits):
                raise DataError(f"{path}: has no {min(missing)} split; prepare the data again")
            return cls(splits=splits, **payload)
        except DataError:
            raise
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise DataError(
                f"{path}: not a readable manifest ({error}); prepare the data again"
            ) from error
