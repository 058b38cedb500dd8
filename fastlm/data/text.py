"""Documents out of UTF-8 text files, as a stream of bounded pieces; and which files to read.

A document is a file, or a part of a file that `<|endoftext|>` ends (the convention of TinyStories).
A file or a document may be larger than memory: files are read in chunks, and a long document comes
as several pieces, which concatenate to exactly the document.
"""

import codecs
import glob
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastlm.data.compression import inner_suffix, opened
from fastlm.errors import DataError

END_OF_TEXT = "<|endoftext|>"

CHUNK_BYTES = 4 << 20
# Of 64 Ki, 256 Ki and 1 Mi characters the smallest was the fastest to encode and took the least
# memory (4 MiB of Python source, `tokenizers` 0.23, 2 cores: 0.81, 0.86, 0.94 s; 91, 161, 316 MB).
PIECE_CHARACTERS = 1 << 16

# One document as large as a file (COCO, SQuAD) is no line of records.
_LONGEST_RECORD = 64 << 20
# JSON lines, and what is known to be some only when its first line has been read (C4's files).
JSON_LINES, JSON = (".jsonl", ".ndjson"), ".json"
# What a directory is searched for; a file that is named itself may have any suffix, and is text
# unless it holds records. Each may be compressed: .jsonl.zst.
_SEARCHED = (".txt", *JSON_LINES, ".parquet")
_SAVED_DATASET, _SAVED_SPLITS = "state.json", "dataset_dict.json"  # of datasets.save_to_disk


class ChatTemplate(NamedTuple):
    """The text around a message. Special tokens in it are encoded as such."""

    header: str  # {role} stands for the role
    end: str  # of the message: the assistant's is a target
    behind: str  # what separates the message from the next
    special: tuple[str, ...]  # tokens


@dataclass(frozen=True)
class TextFile:
    path: Path
    name: str  # what identifies the file on every machine: its path below the common root, with "/"
    text_key: str = "text"  # where a record of it has its text
    template: ChatTemplate | None = None  # of the messages, if its records are conversations


class Piece(NamedTuple):
    document: int  # index of the document within its file
    text: str  # at most PIECE_CHARACTERS characters; "" only if the document is empty
    last: bool  # the document ends with this piece
    special: bool = False  # the text of special tokens in it is meant as these tokens
    ignored: bool = False  # its tokens are no targets of the loss


def find_text_files(
    inputs: Iterable[str | Path],
    text_key: str = "text",
    log: Callable[[str], object] = print,
) -> list[TextFile]:
    """The files that `inputs` (files, globs with `**`, directories) name.

    A directory stands for all *.txt, *.jsonl, *.ndjson and *.parquet below it, and for each *.json
    whose first line is a record with the field `text_key`, .gz and .zst ones, too; one that
    `datasets` saved, for its records. Hidden files, and what is in hidden directories below it, are
    left out. Sorted by name; a file that is named twice comes once.

    text_key: the field of a JSON line, or the column, that holds a record's text.
    log: takes a line for each directory of which files are left out; of hidden ones only those
        are counted that have an ending which a directory is searched for.

    Raises DataError if an input names no readable file.
    """
    inputs = [str(argument) for argument in inputs]
    if not inputs:
        raise DataError("no input is given; name at least one text file, glob or directory")
    # Keyed by the real path: a file reached twice would be in both splits.
    found = {}
    for argument in inputs:
        try:
            found.update((os.path.realpath(p), p) for p in _expand(argument, text_key, log))
        except OSError as error:
            raise DataError(f"{argument}: cannot be read ({error.strerror})") from error
    paths = [os.path.abspath(path) for path in found.values()]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    files = [
        TextFile(Path(path), Path(path).relative_to(root).as_posix(), text_key) for path in paths
    ]
    return sorted(files, key=lambda file: file.name)


def _expand(argument: str, text_key: str, log: Callable[[str], object]) -> list[str]:
    if not argument:
        raise DataError("an input is the empty string; is a shell variable unset?")
    path = Path(argument).expanduser()
    if path.is_file():
        return [str(path)]
    if path.is_dir():
        return _files_below(path, argument, text_key, log)
    if path.exists():
        raise DataError(f"{argument}: not a regular file; the input is read several times, save it")
    if not glob.has_magic(argument):
        raise DataError(f"{argument}: no such file or directory")
    matches = sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True)))
    if not matches:
        raise DataError(f"{argument}: no file matches this glob")
    return matches


def _files_below(
    path: Path, argument: str, text_key: str, log: Callable[[str], object]
) -> list[str]:
    if (path / _SAVED_SPLITS).is_file():
        splits = sorted(state.parent.name for state in path.glob(f"*/{_SAVED_DATASET}")) or [""]
        raise DataError(
            f"{argument}: a saved dataset of the splits {', '.join(splits)}; name those to read, "
            f"such as {path / ('train' if 'train' in splits else splits[0])}"
        )
    if (path / _SAVED_DATASET).is_file():
        try:
            state = json.loads((path / _SAVED_DATASET).read_text(encoding="utf-8"))
            return [str(path / os.path.basename(f["filename"])) for f in state["_data_files"]]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(
                f"{path / _SAVED_DATASET}: not a dataset of datasets.save_to_disk ({error}); save "
                f"it again"
            ) from error
    matches, others = [], Counter[str]()
    for match in sorted(_everything_below(path)):
        suffix = inner_suffix(match)
        hidden = any(part[0] == "." for part in match.relative_to(path).parts)
        if (hidden and suffix not in _SEARCHED) or not match.is_file():
            continue
        holds_text = suffix in _SEARCHED or (suffix == JSON and _has_field(match, text_key))
        if holds_text and not hidden:
            matches.append(str(match))
        else:
            compressed = suffix if match.suffix.lower() != suffix else ""
            kind = f"{compressed}{match.suffix.lower()}" or "no ending"
            others[f"hidden {kind}" if hidden else kind] += 1
    if not matches:
        raise DataError(
            f"{argument}: hidden ones aside, no *.txt, *.jsonl, *.ndjson or *.parquet file in this "
            f"directory, and no *.json of lines with the field {text_key!r}; name other files by a "
            f"glob in quotes, such as '{path / '**' / '*.md'}'"
        )
    if others:
        count = others.total()
        kinds = ", ".join(kind for kind, _ in others.most_common(5))
        log(
            f"{argument}: left out: {count:,} file{'s' * (count > 1)} "
            f"({kinds}{', …' * (len(others) > 5)})"
        )
    return matches


def _has_field(path: Path, text_key: str) -> bool:
    """Is the first record's field a text, null, or a conversation's list?"""
    try:
        record = first_record(path) or {}
        # A tokenizer's vocab.json on one line has a number there.
        return isinstance(record.get(text_key, 0), str | list | None)
    except (DataError, OSError):  # damaged, and nobody has named it: left out
        return False


def first_record(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file's first line, {} of an empty file; None for anything else."""
    with opened(path) as content:
        lines = io.BufferedReader(content, 1 << 16)
        if not (begin := lines.peek(1)):
            return {}
        if not begin.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None  # an array on one line may be as large as the file
        line = b"\n"
        while line and not line.strip():
            line = lines.readline(_LONGEST_RECORD)
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def read_pieces(
    path: Path,
    on_bytes: Callable[[int], object] | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    piece_characters: int = PIECE_CHARACTERS,
) -> Iterator[Piece]:
    """The documents of one text file, in pieces that do not depend on `chunk_bytes`.

    `<|endoftext|>` ends a document and belongs to none. An empty file, or nothing between two
    markers, is an empty document. Blanks after the last marker are no document: they are the
    newline that closes the file (a piece of blanks and more is one).

    on_bytes: takes how much more of the file on disk has been read. Raises DataError if the file
    cannot be read or is not UTF-8.
    """
    document = 0
    start_of_document = True  # no piece of the current document is out yet
    rest = ""  # text that is read but not out
    for text in _decoded_chunks(path, chunk_bytes, on_bytes):
        *complete, rest = (rest + text).split(END_OF_TEXT)
        for text in complete:
            yield from cut_document(document, text, piece_characters)
            document += 1
            start_of_document = True
        # What is kept is longer than a marker, whose beginning may be the end of this chunk.
        start = 0
        while len(rest) - start >= piece_characters + len(END_OF_TEXT):
            end = _cut(rest, start, piece_characters)
            yield Piece(document, rest[start:end], last=False)
            start = end
            start_of_document = False
        rest = rest[start:]
    if document and start_of_document and not rest.strip():
        return
    yield from cut_document(document, rest, piece_characters)


def _everything_below(path: Path) -> Iterator[Path]:
    """Without directories. Links to directories are followed where nothing else leads there, the
    first by name. Raises OSError for what cannot be read and is not hidden."""
    seen, links = set(), [path]

    def is_hidden(folder: str | Path) -> bool:
        return any(part[0] == "." for part in Path(folder).relative_to(path).parts)

    def note(error: OSError) -> None:
        if not is_hidden(error.filename):
            raise error

    while links:
        start = links.pop(0)
        if os.path.realpath(start) in seen:
            continue
        for folder, folders, files in os.walk(start, onerror=note):
            if not is_hidden(folder):
                seen.add(os.path.realpath(folder))
                links += sorted(p for name in folders if (p := Path(folder, name)).is_symlink())
            yield from (Path(folder, name) for name in files)


def cut_document(
    document: int, text: str, piece_characters: int = PIECE_CHARACTERS
) -> Iterator[Piece]:
    """The pieces of a document, or of what is left of one."""
    start = 0
    while len(text) - start > piece_characters:
        end = _cut(text, start, piece_characters)
        yield Piece(document, text[start:end], last=False)
        start = end
    yield Piece(document, text[start:] if start else text, last=True)


def _cut(text: str, start: int, piece_characters: int) -> int:
    """Where the piece that begins at `start` ends: at most `piece_characters` on.

    The cut is before the whitespace that holds the last newline (else the last space). GPT-2's
    pre-tokenizer, which the tokenizers trained here have, splits there anyway, so the tokens are
    those of the uncut text. Other tokenizers, and text without any space, may come out with other
    tokens around a cut; they decode to the same text.
    """
    end = start + piece_characters
    for separator in ("\n", " "):
        at = text.rfind(separator, start, end)
        if at >= 0:
            before = len(text[start:at].rstrip())
            return start + before if before else at + 1
    return end


def _decoded_chunks(
    path: Path, chunk_bytes: int, on_bytes: Callable[[int], object] | None
) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # keeps a character that a chunk cuts
    read = 0
    with opened(path, on_bytes) as file:
        while True:
            chunk = file.read(chunk_bytes)
            read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                # error.object is what the decoder had kept, and the chunk: its end is byte `read`.
                offset = read - len(error.object) + error.start
                raise DataError(
                    f"{path}: not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset "
                    f"{offset}; convert the file (iconv -f ENCODING -t UTF-8) or leave it out"
                ) from error
            yield text
            if not chunk:
                return
