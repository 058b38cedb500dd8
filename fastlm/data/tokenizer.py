"""Byte-level BPE by the `tokenizers` library: training one, or taking one from a file.

`tokenizers` is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.data.text import END_OF_TEXT
from fastlm.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB_SIZE = 257  # every byte, and the end of text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; `<|endoftext|>` has id 0.

    Fewer if `texts` do not repeat enough pairs. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A pair seen once would become a token that is never trained on again.
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes: no text is unknown, whatever the training documents held.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return encoding_plain_text(tokenizer)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizers` JSON file, without truncation and padding.

    Raises DataError if the file is missing, no tokenizer, or has no `<|endoftext|>`.
    """
    from tokenizers import Tokenizer

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--tokenizer {path}: cannot be read ({error})") from error
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"--tokenizer {path}: not a tokenizer in the JSON format of the tokenizers library "
            f"({error})"
        ) from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise DataError(
            f"--tokenizer {path}: has no {END_OF_TEXT} token, which ends every document; add it as "
            f"a special token, or train a tokenizer with --vocab-size"
        )
    # Published tokenizers often cut every text to the context of some model.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return encoding_plain_text(tokenizer)


def encoding_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, set to encode the text of a special token like any other text.

    The setting is not part of the tokenizer's file.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, without the special tokens of a post-processor.

    Raises DataError for a text that the tokenizer has no tokens for.
    """
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"the tokenizer cannot encode the text ({error})") from error
    return [encoding.ids for encoding in encodings]


def id_limit(tokenizer: Tokenizer) -> int:
    """The vocabulary size a model needs: above every id, also if the ids have gaps."""
    return max(tokenizer.get_vocab_size(), *(i + 1 for i in tokenizer.get_vocab().values()))
