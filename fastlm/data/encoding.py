"""Text into token ids, in batches, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fastlm.data.split import Place, SplitPiece
from fastlm.data.tokenizer import encode_batch, keeps_all_text, parse_tokenizer
from fastlm.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# One call of the encoder: 32 pieces to spread over the cores. The encoder takes 80 bytes of memory
# for a token (`tokenizers` 0.23).
BATCH_CHARACTERS = 2 << 20
_PIECE_OVERHEAD = 100  # characters that an (even empty) document counts for in a batch
_PROCESS_BYTES = 64 << 20  # of text: for less, a process takes longer to start than it saves


class Encoded(NamedTuple):
    ids: list[np.ndarray]  # (n,) uint32, of each piece
    exact: bool  # decoding gives the text of each one back


class Batch(NamedTuple):
    place: Place  # behind it
    pieces: list[SplitPiece]


def batches(pieces: Iterable[tuple[Place, SplitPiece]]) -> Iterator[Batch]:
    batch, characters, place = [], 0, Place()
    for place, piece in pieces:
        batch.append(piece)
        characters += len(piece.text) + _PIECE_OVERHEAD
        if characters >= BATCH_CHARACTERS:
            yield Batch(place, batch)
            batch, characters = [], 0
    if batch:
        yield Batch(place, batch)


def encode(encoder: "Tokenizer", texts: list[str], special: list[int], check: bool) -> Encoded:
    """special: which of the texts may hold special tokens; in others their text is plain text.
    check: decode all of them, to say whether that is exact (a fifth of the time of encoding).

    Raises DataError for a text that the tokenizer has no tokens for.
    """
    encoded = encode_batch(encoder, texts)
    exact = not check or encoder.decode_batch(encoded, skip_special_tokens=False) == texts
    if special:
        encoder.encode_special_tokens = False
        marks = encode_batch(encoder, [texts[index] for index in special])
        encoder.encode_special_tokens = True
        for index, ids in zip(special, marks, strict=True):
            encoded[index] = ids
    return Encoded([np.array(ids, dtype=np.uint32) for ids in encoded], exact)


def useful_processes(text_bytes: int) -> int:
    """How many processes to encode so much text in: one for each core, if there is enough."""
    return max(1, min(_cores(), text_bytes // _PROCESS_BYTES))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_all(
    encoder: "Tokenizer", todo: Iterable[Batch], processes: int
) -> Iterator[tuple[Batch, Encoded]]:
    """Each batch with its ids, in order.

    One process encodes with the threads of `tokenizers`, which share the conversion of ids to
    Python's integers; several have a core each. No more than two batches a process are in memory.
    """
    check = not keeps_all_text(encoder)
    if processes == 1:
        for batch in todo:
            yield batch, encode(encoder, *_texts(batch.pieces), check)
        return
    # Not forked: the threads that this process has run are not there in a copy of it.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (encoder.to_str(),))
    try:
        waiting: deque[tuple[Batch, Future]] = deque()
        for batch in todo:
            waiting.append((batch, pool.submit(_encode_in_worker, *_texts(batch.pieces), check)))
            if len(waiting) == 2 * processes:
                batch, future = waiting.popleft()
                yield batch, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {processes} encoding processes was killed, perhaps for lack of memory; give "
            f"fewer: --processes {max(1, processes // 2)}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _texts(pieces: Sequence[SplitPiece]) -> tuple[list[str], list[int]]:
    special = [index for index, piece in enumerate(pieces) if piece.special]
    return [piece.text for piece in pieces], special


_worker_encoder: "Tokenizer | None" = None


def _begin_worker(tokenizer_json: str) -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C: it ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the other processes have the other cores
    _worker_encoder = parse_tokenizer(tokenizer_json)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot end its workers, which wait for its next batch for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode_in_worker(texts: list[str], special: list[int], check: bool) -> Encoded:
    assert _worker_encoder is not None
    return encode(_worker_encoder, texts, special, check)
