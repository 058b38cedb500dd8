"""Text into token files: python -m fastlm.prepare INPUT... --out DIR

Reads the input three times, in bounded memory: to check and count it, to train the tokenizer on the
training documents, and to encode it. The result appears at DIR complete, or not at all.
"""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastlm.data.fingerprint import VERIFIED_NAME, data_fingerprint
from fastlm.data.manifest import Manifest, Split, readable
from fastlm.data.progress import progress
from fastlm.data.shards import ShardWriter
from fastlm.data.split import TRAIN, VAL, SplitPiece, SplitRule, read_split, survey
from fastlm.data.staging import staging_directory
from fastlm.data.text import END_OF_TEXT, TextFile, find_text_files
from fastlm.data.tokenizer import (
    MIN_VOCAB_SIZE,
    encode_batch,
    id_limit,
    load_tokenizer,
    train_tokenizer,
)
from fastlm.errors import ConfigError, DataError, run_command

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
DEFAULT_VOCAB_SIZE = 10_000
SHARD_TOKENS = 100_000_000

# The trainer keeps every distinct word, and takes 70 bytes of memory for a byte of text that has no
# spaces. An even sample of a larger text bounds that; more text hardly changes the merges.
TOKENIZER_SAMPLE_BYTES = 256 << 20
# Its time grows with the length of the words: for 15 MB of letters without a space it took 250 s,
# and 19 s with a line break after every so many of them (`tokenizers` 0.23, 2 cores).
_LONG_WORD = re.compile(r"\S{1024}(?=\S)")

# One call of the encoder: 32 pieces to spread over the cores. The encoder takes 80 bytes of memory
# for a token (`tokenizers` 0.23).
_BATCH_CHARACTERS = 2 << 20
_PIECE_OVERHEAD = 100  # characters that an (even empty) document counts for in a batch

_OWN_FILE = re.compile(
    rf"manifest\.json|tokenizer\.json|(train|val)_\d+\.bin|{re.escape(VERIFIED_NAME)}(\.\d+)?"
)


def prepare(
    files: Sequence[TextFile],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    log: Callable[[str], object] = print,
) -> Manifest:
    """Writes the documents of `files` as token shards, tokenizer.json and manifest.json to `out`.

    files: what find_text_files returns.
    vocab_size: of the byte-level BPE tokenizer to train (default 10,000); or
    tokenizer: the tokenizer to use, a JSON file of the `tokenizers` library.
    val_fraction: of the documents, or of the only document, to hold out. In (0, 1).
    shard_tokens: tokens in a shard file.
    overwrite: replace the prepared directory at `out`. Nothing else is ever replaced.
    log: takes each line that is said on the way.

    `out` is complete or, after any error, as it was. Raises DataError for unusable text or
    tokenizer, OutputError for a directory that cannot be written or may not be replaced, and
    ConfigError for settings that make no sense.
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
    if shard_tokens < 1:
        raise ConfigError(f"--shard-tokens {shard_tokens}: it must be at least 1")

    with staging_directory(out, _OWN_FILE, overwrite) as staging:
        encoder = load_tokenizer(tokenizer) if tokenizer is not None else None
        size = sum(file.path.stat().st_size for file in files if file.path.exists())
        with progress("reading", size, log) as on_bytes:
            found = survey(files, on_bytes)
        rule = SplitRule.choose(found, val_fraction)

        if encoder is None:
            wanted = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
            with progress("training the tokenizer", found.bytes, log) as on_bytes:
                texts = _training_texts(read_split(files, rule), found.bytes, on_bytes)
                encoder = train_tokenizer(texts, wanted)
            if found.bytes > TOKENIZER_SAMPLE_BYTES:
                log(f"note: from an even sample of {TOKENIZER_SAMPLE_BYTES / 1e6:,.0f} MB")
            if encoder.get_vocab_size() < wanted:
                log(
                    f"note: the vocabulary is {encoder.get_vocab_size():,} tokens, not the "
                    f"{wanted:,} asked for: the training text repeats no more pairs"
                )
        tokenizer_json = encoder.to_str(pretty=True).encode()
        (staging / TOKENIZER_NAME).write_bytes(tokenizer_json)

        limit = id_limit(encoder)
        manifest = Manifest(
            vocab_size=limit,
            dtype="uint16" if limit <= 1 << 16 else "uint32",
            splits={TRAIN: Split(), VAL: Split()},
            tokenizer=TOKENIZER_NAME,
            end_of_text=encoder.token_to_id(END_OF_TEXT),
            source={
                "files": len(files),
                "first_file": readable(files[0].name),
                "val_fraction": val_fraction,
                "tokenizer": "trained" if tokenizer is None else readable(Path(tokenizer).name),
                "tokenizers": metadata.version("tokenizers"),
            },
        )
        with progress("encoding", found.bytes, log) as on_bytes, ExitStack() as stack:
            writers = {
                name: stack.enter_context(ShardWriter(staging, name, manifest.dtype, shard_tokens))
                for name in manifest.splits
            }
            exact = _encode(read_split(files, rule), encoder, manifest, writers, on_bytes)
        if not exact:
            log(
                "note: decoding the tokens does not give the text back; the tokenizer normalizes "
                "or drops characters, and bits per byte count these as if they were predicted"
            )
        for name, split in manifest.splits.items():
            split.shards = writers[name].shards
        if sum(split.bytes for split in manifest.splits.values()) != found.bytes:
            raise DataError("the input files changed while they were read; prepare them again")
        manifest.fingerprint = data_fingerprint(tokenizer_json, manifest)
        manifest.save(staging)
    _log_summary(manifest, val_fraction, log)
    return manifest


def _training_texts(
    pieces: Iterable[SplitPiece], total_bytes: int, on_bytes: Callable[[int], object]
) -> Iterator[str]:
    fraction = min(1.0, TOKENIZER_SAMPLE_BYTES / total_bytes)
    for index, piece in enumerate(pieces):
        on_bytes(len(piece.text.encode()))
        if piece.split == TRAIN and int((index + 1) * fraction) > int(index * fraction):
            yield _LONG_WORD.sub(r"\g<0>\n", piece.text)


def _encode(
    pieces: Iterable[SplitPiece],
    encoder: "Tokenizer",
    manifest: Manifest,
    writers: dict[str, ShardWriter],
    on_bytes: Callable[[int], object],
) -> bool:
    """Writes the ids of all `pieces` and counts them in the manifest's splits.

    Returns whether decoding gave the text back, looking at one piece of each batch.
    """
    exact = True
    for batch in _batches(pieces):
        encoded = encode_batch(encoder, [piece.text for piece in batch])
        exact = exact and encoder.decode(encoded[0], skip_special_tokens=False) == batch[0].text
        for piece, ids in zip(batch, encoded, strict=True):
            if piece.last:
                ids.append(manifest.end_of_text)
            size = len(piece.text.encode())
            writers[piece.split].write(np.array(ids, dtype=np.uint32))
            split = manifest.splits[piece.split]
            split.tokens += len(ids)
            split.bytes += size
            split.documents += piece.last
            on_bytes(size)
    return exact


def _batches(pieces: Iterable[SplitPiece]) -> Iterator[list[SplitPiece]]:
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + _PIECE_OVERHEAD
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _log_summary(manifest: Manifest, val_fraction: float, log: Callable[[str], object]) -> None:
    for name, split in manifest.splits.items():
        log(
            f"{name}: {split.documents:,} documents, {split.bytes:,} bytes, {split.tokens:,} "
            f"tokens ({split.tokens / split.bytes:.3f} tokens per byte), {len(split.shards)} shards"
        )
    share = manifest.splits[VAL].bytes / sum(split.bytes for split in manifest.splits.values())
    if not val_fraction / 3 < share < val_fraction * 3:
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
    tokenizer: Path | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
) -> None:
    """Turn UTF-8 text into token files for python -m fastlm.train.

    A document is a file, or a part of one that <|endoftext|> ends.

    Args:
        inputs: Text files, globs in quotes ('books/**/*.txt'), directories (all *.txt below).
        out: The directory to write.
        vocab_size: Size of the byte-level BPE tokenizer to train. Default: 10000.
        tokenizer: Use this tokenizer (JSON of the tokenizers library), train none.
        val_fraction: Fraction of the documents to hold out for validation.
        shard_tokens: Tokens in one shard file.
        overwrite: Replace a prepared directory.
    """
    prepare(
        find_text_files(inputs),
        out,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        overwrite=overwrite,
    )
    print(f"next: python -m fastlm.train --data {shlex.quote(str(out))}")


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    import tyro

    # A scheduler's SIGTERM must remove the partial directory as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    code = run_command(lambda: tyro.cli(_command, args=argv, prog="python -m fastlm.prepare"))
    if code == 130:
        print("interrupted: nothing was written", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
