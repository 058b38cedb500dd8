"""Which documents are held out for validation: a rule that depends on neither order nor machine."""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastlm.data.records import read_documents
from fastlm.data.text import Piece, TextFile
from fastlm.errors import DataError

TRAIN, VAL = "train", "val"
_HASHES = 1 << 64


class SplitPiece(NamedTuple):
    split: str  # TRAIN or VAL
    text: str
    last: bool  # the document ends with this piece
    special: bool = False  # as in Piece
    ignored: bool = False


def document_hash(name: str, document: int) -> int:
    """A hash in [0, 2**64) of the name, and of the document's index if it is not the first."""
    identity = f"{name}#{document}" if document else name
    # File names are bytes: Python's str of them holds what is no UTF-8 as surrogates.
    encoded = identity.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big")


@dataclass
class Survey:
    """What one reading of the whole input finds. Documents without text are counted, no more."""

    documents: int = 0
    pieces: int = 0
    bytes: int = 0  # UTF-8, markers not counted
    characters: int = 0
    with_text: int = 0  # documents
    lowest: int = _HASHES  # hash of a document with text
    highest: int = -1


def survey(files: Sequence[TextFile], on_bytes: Callable[[int], object]) -> Survey:
    """Reads all of `files` once; DataError if one is not UTF-8 or all are empty.

    on_bytes: takes how much more of the files on disk has been read.
    """
    found = Survey()
    for file in files:
        counted = -1  # the last document seen to have text
        for piece in read_documents(file, on_bytes):
            try:
                size = len(piece.text.encode())
            except UnicodeEncodeError as error:  # JSON can write what UTF-8 cannot
                raise DataError(
                    f"{file.path}: document {piece.document} (from 0) holds half of a surrogate "
                    f"pair ({error}); mend or remove it"
                ) from error
            found.documents += piece.last
            found.pieces += 1
            found.bytes += size
            found.characters += len(piece.text)
            if piece.text and piece.document != counted:
                counted = piece.document
                found.with_text += 1
                value = document_hash(file.name, piece.document)
                found.lowest = min(found.lowest, value)
                found.highest = max(found.highest, value)
    if not found.with_text:
        raise DataError(f"the input holds no text: {len(files)} file(s), all of them empty")
    return found


@dataclass(frozen=True)
class SplitRule:
    """Validation: documents whose hash is below `threshold`, or the end of the only document."""

    threshold: int
    cut: int | None = None  # about where the only document with text is split, in characters
    near: int = 0  # how many characters from there the split may be

    @classmethod
    def choose(cls, found: Survey, val_fraction: float) -> "SplitRule":
        """The rule that holds out `val_fraction` of the documents and leaves no split without text.

        If the fraction alone would leave one empty, the threshold moves just enough for the
        document with the lowest (or the highest) hash to change sides.
        """
        threshold = int(val_fraction * _HASHES)
        if found.with_text > 1:
            return cls(min(max(threshold, found.lowest + 1), found.highest))
        if found.characters < 2:
            raise DataError(
                f"the input is one document of {found.characters} character: too short to hold "
                f"out a part for validation; give more text"
            )
        cut = round(found.characters * (1 - val_fraction))
        cut = min(max(cut, 1), found.characters - 1)
        return cls(threshold, cut, near=min(cut, found.characters - cut) // 4)


class Place(NamedTuple):
    """How far the input has been read."""

    file: int = 0  # index of the file that goes on
    pieces: int = 0  # of read_split that it has given


BEGINNING = Place()


def read_split(
    files: Sequence[TextFile], rule: SplitRule, start: Place = BEGINNING
) -> Iterator[tuple[Place, SplitPiece]]:
    """Every document of `files`, in order, with its split; and the place behind each piece.

    start: a place that an earlier call gave; the same pieces follow.
    """
    for index in range(start.file, len(files)):
        before = start.pieces if index == start.file else 0
        pieces = itertools.islice(_split_file(files[index], rule), before, None)
        for count, piece in enumerate(pieces, before + 1):
            yield Place(index, count), piece


def _split_file(file: TextFile, rule: SplitRule) -> Iterator[SplitPiece]:
    document, split = -1, TRAIN
    pieces = read_documents(file)
    for piece in pieces:
        if rule.cut is not None and piece.text:
            yield from _cut_in_two(piece, pieces, rule.cut, rule.near)
            continue
        if piece.document != document:
            document = piece.document
            split = VAL if document_hash(file.name, document) < rule.threshold else TRAIN
        yield SplitPiece(split, *piece[1:])


def _cut_in_two(
    piece: Piece, following: Iterator[Piece], cut: int, near: int
) -> Iterator[SplitPiece]:
    """The only document with text: the characters before about `cut` to TRAIN, the rest to VAL."""
    while cut >= len(piece.text) and not piece.last:
        yield SplitPiece(TRAIN, piece.text, last=False)
        cut -= len(piece.text)
        piece = next(following)
    text = piece.text
    at = _break_near(text, max(cut - near, 0), cut, min(cut + near, len(text) - piece.last))
    yield SplitPiece(TRAIN, text[:at], last=True)
    yield SplitPiece(VAL, text[at:], piece.last)
    while not piece.last:
        piece = next(following)
        yield SplitPiece(VAL, piece.text, piece.last)


def _break_near(text: str, begin: int, cut: int, end: int) -> int:
    """After the newline before `cut`, else after the next one, else so of spaces; else `cut`."""
    for separator in ("\n", " "):
        at = text.rfind(separator, begin, cut) + 1 or text.find(separator, cut, end) + 1
        if at:
            return at
    return cut
