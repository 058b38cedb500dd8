"""Text into token files: python -m fastlm.prepare INPUT... --out DIR

Reads the input three times, in bounded memory: to check and count it, to train the tokenizer on the
training documents, and to encode it. The result appears at DIR complete, or not at all; a process
that was stopped has left beside it what the next one goes on with.
"""

import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastlm.data.chat import CHATML, template_of
from fastlm.data.encoding import batches, encode_all, useful_processes
from fastlm.data.fingerprint import VERIFIED_NAME, data_fingerprint
from fastlm.data.manifest import Manifest, Split, readable
from fastlm.data.progress import progress
from fastlm.data.shards import ShardWriter
from fastlm.data.split import TRAIN, VAL, Place, SplitPiece, SplitRule, Survey, read_split, survey
from fastlm.data.staging import read_progress, save_progress, staging_directory
from fastlm.data.text import END_OF_TEXT, TextFile, find_text_files
from fastlm.data.tokenizer import (
    MIN_VOCAB_SIZE,
    encoding_plain_text,
    end_of_text_id,
    id_limit,
    load_tokenizer,
    parse_tokenizer,
    train_tokenizer,
)
from fastlm.errors import ConfigError, DataError, run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
DEFAULT_VOCAB_SIZE = 10_000
SHARD_TOKENS = 100_000_000
SAVE_SECONDS = 10.0  # of work that a process which is stopped may lose

# The trainer keeps every distinct word, and takes 70 bytes of memory for a byte of text that has no
# spaces. An even sample of a larger text bounds that; more text hardly changes the merges.
TOKENIZER_SAMPLE_BYTES = 256 << 20
# Its time grows with the length of the words: for 15 MB of letters without a space it took 250 s,
# and 19 s with a line break after every so many of them (`tokenizers` 0.23, 2 cores).
_LONG_WORD = re.compile(r"\S{1024}(?=\S)")

_OWN_FILE = re.compile(
    rf"manifest\.json|tokenizer\.json|(train|val)(_ignored)?_\d+\.bin|{re.escape(VERIFIED_NAME)}(\.\d+)?"
)


def prepare(
    files: Sequence[TextFile],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    chat: bool = False,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = 1,
    overwrite: bool = False,
    log: Callable[[str], object] = print,
) -> Manifest:
    """Writes the documents of `files` as token shards, tokenizer.json and manifest.json to `out`.

    files: what find_text_files returns.
    vocab_size: of the byte-level BPE tokenizer to train (default 10,000); or
    tokenizer: the tokenizer to use: "gpt2", a JSON file of the `tokenizers` library, or a directory
        that holds one (load_tokenizer).
    chat: the records are conversations, in which the assistant's messages alone are targets of the
        loss (fastlm/data/chat.py).
    val_fraction: of the documents, or of the only document, to hold out. In (0, 1).
    shard_tokens: tokens in a shard file.
    processes: that encode. None: one for each core, if the text is large. They are spawned: a
        script needs its `if __name__ == "__main__":`.
    overwrite: replace the prepared directory at `out`. Nothing else is ever replaced.
    log: takes each line that is said on the way.

    `out` is complete or, after any error, as it was. A process that was killed or interrupted
    leaves what it has done beside `out`, and the same call goes on from there. Raises DataError for
    unusable text or tokenizer, OutputError for a directory that cannot be written or may not be
    replaced, and ConfigError for settings that make no sense.
    """
    if vocab_size is not None and tokenizer is not None:
        raise ConfigError("--vocab-size and --tokenizer exclude each other; give one")
    if vocab_size is not None and vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"--vocab-size {vocab_size}: it must be at least {MIN_VOCAB_SIZE} (256 bytes and "
            f"{END_OF_TEXT})"
        )
    if not 0 < val_fraction < 1:
        raise ConfigError(f"--val-fraction {val_fraction}: it must be between 0 and 1")
    for name, value in (("--shard-tokens", shard_tokens), ("--processes", processes)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: it must be at least 1")

    encoder = load_tokenizer(tokenizer) if tokenizer is not None else None
    asked: Any = vocab_size
    template = CHATML
    if encoder is not None:  # its mistakes before any reading
        end_of_text = end_of_text_id(encoder, tokenizer)
        encoding_plain_text(encoder, encoder.id_to_token(end_of_text))
        asked = [encoder.to_str(), end_of_text]
        template = template_of(encoder, tokenizer, end_of_text) if chat else template
    if chat:
        files = [replace(file, template=template) for file in files]
    key = _key(files, [asked, val_fraction, shard_tokens])
    with staging_directory(out, _OWN_FILE, overwrite, key) as staging:
        journal = _Journal(staging, key)
        try:
            found = journal.survey
            if found is None:
                size = sum(file.path.stat().st_size for file in files if file.path.exists())
                with progress("reading", size, log) as on_bytes:
                    found = journal.survey = survey(files, on_bytes)
            journal.save_if_due()
            if chat and found.with_text < 2:
                raise DataError("one conversation cannot be held out from itself; give more")
            rule = SplitRule.choose(found, val_fraction)
            path = staging / TOKENIZER_NAME
            if encoder is None and journal.has_tokenizer:
                encoder = parse_tokenizer(path.read_text(encoding="utf-8"))
            elif encoder is None:
                encoder = _trained(files, rule, found, vocab_size or DEFAULT_VOCAB_SIZE, log)
            if tokenizer is None:
                end_of_text = end_of_text_id(encoder)
            tokenizer_json = encoder.to_str(pretty=True).encode()
            path.write_bytes(tokenizer_json)
            journal.has_tokenizer = True
            journal.save_if_due()

            limit = id_limit(encoder)
            manifest = Manifest(
                vocab_size=limit,
                dtype="uint16" if limit <= 1 << 16 else "uint32",
                splits=journal.splits,
                tokenizer=TOKENIZER_NAME,
                end_of_text=end_of_text,
                source={
                    "files": len(files),
                    "first_file": readable(files[0].name),
                    "val_fraction": val_fraction,
                    "tokenizer": "trained" if tokenizer is None else readable(Path(tokenizer).name),
                    "tokenizers": metadata.version("tokenizers"),
                },
            )
            if processes is None:
                processes = useful_processes(found.bytes - journal.bytes)
            _encode(read_split(files, rule, journal.place), encoder, manifest, journal,
                    processes, shard_tokens, found.bytes, log, chat=chat)  # fmt: skip
        except (KeyboardInterrupt, SystemExit):
            if read_progress(staging):
                log("stopped; the same command goes on from here")
            raise
        if not journal.exact:
            log(
                "note: decoding the tokens does not give the text back; the tokenizer normalizes "
                "or drops characters, and bits per byte count these as if they were predicted"
            )
        if journal.bytes != found.bytes:
            raise DataError("the input files changed while they were read; prepare them again")
        manifest.fingerprint = data_fingerprint(tokenizer_json, manifest)
        manifest.save(staging)
    _log_summary(manifest, val_fraction, log, whole_documents=rule.cut is None)
    return manifest


def _key(files: Sequence[TextFile], settings: list[Any]) -> str:
    """Of what `out` is made: the same key, the same result."""
    read = []
    for file in files:
        try:
            status = file.path.stat()
        except OSError:  # reported when it is read
            continue
        path = os.path.realpath(file.path)
        how = [file.text_key, file.template]
        read.append([file.name, path, how, status.st_size, status.st_mtime_ns])
    what = json.dumps([4, metadata.version("tokenizers"), read, settings])
    return hashlib.sha256(what.encode()).hexdigest()


class _Journal:
    """How far the work in a staging directory is: saved now and then, read by the next process."""

    def __init__(self, staging: Path, key: str):
        self._staging, self._key, self._saved = staging, key, time.monotonic()
        found = read_progress(staging) or {}
        self.survey = Survey(**found["survey"]) if found.get("survey") else None
        self.has_tokenizer: bool = found.get("has_tokenizer", False)
        self.exact: bool = found.get("exact", True)
        self.place = Place(*found.get("place", ()))
        self.splits = {TRAIN: Split(), VAL: Split()}
        for name, split in found.get("splits", {}).items():
            self.splits[name] = Split.of(split)
        self.writers: dict[str, ShardWriter] = {}
        self.ignored: dict[str, ShardWriter] = {}  # of conversations, which tokens are no targets

    @property
    def bytes(self) -> int:
        """Of the text that has been encoded."""
        return sum(split.bytes for split in self.splits.values())

    def save_if_due(self) -> None:
        if time.monotonic() - self._saved < SAVE_SECONDS:
            return
        for name, writer in self.writers.items():
            self.splits[name].shards = writer.state()
        for name, writer in self.ignored.items():
            self.splits[name].ignored = writer.state()
        said = {
            "survey": asdict(self.survey) if self.survey else None,
            "has_tokenizer": self.has_tokenizer,
            "exact": self.exact,
            "place": self.place,
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        save_progress(self._staging, self._key, said)
        self._saved = time.monotonic()

    def open_writers(self, stack: ExitStack, dtype: str, shard_tokens: int, *, chat: bool) -> None:
        for name, split in self.splits.items():
            writer = ShardWriter(self._staging, name, dtype, shard_tokens, split.shards)
            self.writers[name] = stack.enter_context(writer)
            if chat:
                writer = ShardWriter(
                    self._staging, f"{name}_ignored", "uint8", shard_tokens, split.ignored
                )
                self.ignored[name] = stack.enter_context(writer)

    def write(self, piece: SplitPiece, ids: np.ndarray) -> None:
        """ids: (n,) uint32, of the piece, and the end of the text behind the last."""
        split = self.splits[piece.split]
        self.writers[piece.split].write(ids)
        if self.ignored:
            ignored = np.full(len(ids), piece.ignored, dtype=np.uint8)
            if piece.last:
                ignored[-1] = 1  # the end of the text is nobody's to say
            self.ignored[piece.split].write(ignored)
        split.tokens += len(ids)

    def take_shards(self) -> None:
        """When the writers are closed: the splits get what they have written."""
        for name, split in self.splits.items():
            split.shards = self.writers[name].shards
            split.ignored = self.ignored[name].shards if self.ignored else []


def _trained(
    files: Sequence[TextFile],
    rule: SplitRule,
    found: Survey,
    vocab_size: int,
    log: Callable[[str], object],
) -> "Tokenizer":
    with progress("training the tokenizer", found.bytes, log) as on_bytes:
        pieces = (piece for _, piece in read_split(files, rule))
        texts = _training_texts(pieces, found.bytes, on_bytes)
        template = files[0].template
        encoder = train_tokenizer(texts, vocab_size, template.special if template else ())
    if found.bytes > TOKENIZER_SAMPLE_BYTES:
        log(f"note: from an even sample of {TOKENIZER_SAMPLE_BYTES / 1e6:,.0f} MB")
    if encoder.get_vocab_size() < vocab_size:
        log(
            f"note: the vocabulary is {encoder.get_vocab_size():,} tokens, not the "
            f"{vocab_size:,} asked for: the training text repeats no more pairs"
        )
    return encoder


def _training_texts(
    pieces: Iterable[SplitPiece], total_bytes: int, on_bytes: Callable[[int], object]
) -> Iterator[str]:
    fraction = min(1.0, TOKENIZER_SAMPLE_BYTES / total_bytes)
    for index, piece in enumerate(pieces):
        on_bytes(len(piece.text.encode()))
        is_sampled = int((index + 1) * fraction) > int(index * fraction)
        if is_sampled and piece.split == TRAIN and not piece.special:
            yield _LONG_WORD.sub(r"\g<0>\n", piece.text)


def _encode(
    pieces: Iterable[tuple[Place, SplitPiece]],
    encoder: "Tokenizer",
    manifest: Manifest,
    journal: _Journal,
    processes: int,
    shard_tokens: int,
    total_bytes: int,
    log: Callable[[str], object],
    *,
    chat: bool,
) -> None:
    """Writes the ids of all `pieces`, those behind the journal's place, and counts them there."""
    end_of_text = np.array([manifest.end_of_text], dtype=np.uint32)
    with progress("encoding", total_bytes, log) as on_bytes, ExitStack() as stack:
        if journal.bytes:
            log(f"going on: {journal.bytes / total_bytes:.0%} is encoded already")
            on_bytes(journal.bytes)
        journal.open_writers(stack, manifest.dtype, shard_tokens, chat=chat)
        for batch, encoded in encode_all(encoder, batches(pieces), processes):
            for piece, ids in zip(batch.pieces, encoded.ids, strict=True):
                size, split = len(piece.text.encode()), journal.splits[piece.split]
                journal.write(piece, np.append(ids, end_of_text) if piece.last else ids)
                split.bytes += size
                split.documents += piece.last
                on_bytes(size)
            journal.exact = journal.exact and encoded.exact
            journal.place = batch.place
            journal.save_if_due()
    journal.take_shards()


def _log_summary(
    manifest: Manifest,
    val_fraction: float,
    log: Callable[[str], object],
    *,
    whole_documents: bool,
) -> None:
    for name, split in manifest.splits.items():
        log(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} "
            f"tokens ({split.tokens / split.bytes:.3f} tokens per byte), {len(split.shards)} shards"
        )
    share = manifest.splits[VAL].bytes / sum(split.bytes for split in manifest.splits.values())
    if whole_documents and not val_fraction / 3 < share < val_fraction * 3:
        log(
            f"note: validation holds {share:.1%} of the text, not {val_fraction:.1%}: whole "
            f"documents are held out, and these are few or of very different sizes"
        )
    log(f"fingerprint: {manifest.fingerprint}")


def _command(
    inputs: tuple[str, ...],
    /,
    out: Path,
    vocab_size: int | None = None,
    tokenizer: str | None = None,
    chat: bool = False,
    text_key: str | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    processes: int | None = None,
    overwrite: bool = False,
) -> None:
    """Turn UTF-8 text into token files for python -m fastlm.train.

    A document is a file, or a part of one that <|endoftext|> ends; of JSON lines and .parquet
    files, a record. Stopped by Ctrl-C or a kill, the same command goes on where it was.

    Args:
        inputs: Files (text, .jsonl, .ndjson, .json of lines, also as .gz or .zst; .parquet), globs
            in quotes ('books/**/*.txt'), directories (all of these below, or what datasets saved).
        out: The directory to write.
        vocab_size: Size of the byte-level BPE tokenizer to train. Default: 10000.
        tokenizer: Use this tokenizer, train none: gpt2, a tokenizer.json, or a directory with one.
        chat: Records are conversations: lists of {"role": ..., "content": ...}. The assistant's
            messages alone are targets of the loss.
        text_key: Field of a record, or column, that holds the text. Default: text; with --chat,
            messages.
        val_fraction: Fraction of the documents to hold out for validation.
        shard_tokens: Tokens in one shard file.
        processes: Processes that encode. Default: one for each core, if the text is large.
        overwrite: Replace a prepared directory.
    """
    prepare(
        find_text_files(inputs, text_key or ("messages" if chat else "text")),
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        chat=chat,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        processes=processes,
        overwrite=overwrite,
    )
    print(f"next: python -m fastlm.train --data {shlex.quote(str(out))}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    import tyro

    # A scheduler's SIGTERM must tidy up as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = run_command(lambda: tyro.cli(_command, args=argv, prog="python -m fastlm.prepare"))
    if code == 130:
        print("interrupted: the data is not complete, and --out is as it was", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
