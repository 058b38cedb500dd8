"""Byte-level BPE by the `tokenizers` library: training one, or taking one from files.

`tokenizers` is imported where it is used. Nothing here downloads anything.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastlm.data.chat import CHATML, LLAMA_3
from fastlm.data.text import END_OF_TEXT
from fastlm.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB_SIZE = 257  # every byte, and the end of text
# Llama 3's, too: of its chat models the eos_token is the end of a turn.
_ENDS_OF_TEXT = (END_OF_TEXT, "<|end_of_text|>")
_MARKS = (*_ENDS_OF_TEXT, *CHATML.special, *LLAMA_3.special)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special: Iterable[str] = ()
) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; `<|endoftext|>` has id 0, and the
    `special` tokens those that follow.

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
        special_tokens=[END_OF_TEXT, *special],
        # All 256 bytes: no text is unknown, whatever the training documents held.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(iter(texts), trainer)
    return encoding_plain_text(tokenizer)


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer in a `tokenizers` JSON file, or in a directory; "gpt2": GPT-2's.

    A directory holds tokenizer.json, or GPT-2's vocab.json and merges.txt. GPT-2's files are those
    that `tiktoken` or `huggingface_hub` have left in their caches. Truncation and padding are off.

    Raises DataError if a file is missing or no tokenizer.
    """
    if str(name) == "gpt2":
        return _load_gpt2()
    path = Path(name)
    if path.is_dir():
        if (path / "tokenizer.json").exists():
            path = path / "tokenizer.json"
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _from_vocab_and_merges(path / "vocab.json", path / "merges.txt")
        else:
            raise DataError(
                f"--tokenizer {name}: this directory holds neither tokenizer.json nor vocab.json "
                f"and merges.txt; name one that does"
            )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--tokenizer {name}: cannot be read ({reason})") from error
    try:
        return parse_tokenizer(text)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"--tokenizer {name}: not a tokenizer in the JSON format of the tokenizers library "
            f"({error})"
        ) from error


def parse_tokenizer(text: str) -> Tokenizer:
    """The tokenizer in the text of a `tokenizers` JSON file, set to encode plain text in full."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    # Published tokenizers often cut every text to the context of some model.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return encoding_plain_text(tokenizer)


def named_end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id of the token whose name says that it ends a text, if there is one."""
    ids = map(tokenizer.token_to_id, _ENDS_OF_TEXT)
    return next((found for found in ids if found is not None), None)


def end_of_text_id(tokenizer: Tokenizer, name: str | Path | None = None) -> int:
    """The id of the token that ends a document.

    `<|endoftext|>`'s, else `<|end_of_text|>`'s; else, of a tokenizer that was loaded by `name`,
    that of the eos_token in the tokenizer_config.json beside it. DataError if there is none.
    """
    found = named_end_of_text(tokenizer)
    if found is not None:
        return found
    path = Path(name or ".")
    config = (path if path.is_dir() else path.parent) / "tokenizer_config.json"
    try:
        token = json.loads(config.read_text(encoding="utf-8"))["eos_token"]
        token = token["content"] if isinstance(token, dict) else token
        found = tokenizer.token_to_id(token)
    except (OSError, ValueError, LookupError, TypeError):
        pass
    if found is None:
        raise DataError(
            f"--tokenizer {name}: has no {END_OF_TEXT} token, which ends every document, and no "
            f"{config.name} beside it names its eos_token; add one of them, or train a tokenizer "
            f"with --vocab-size"
        )
    return found


# GPT-2's merges and vocabulary: SHA-256, and the name that tiktoken's cache has for them.
_GPT2_FILES = {
    "merges": (
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
    ),
    "vocab": (
        "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
        "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6",
    ),
}


def _load_gpt2() -> Tokenizer:
    looked = []
    for vocab, merges in _gpt2_places():
        looked.append(str(merges.parent))
        try:
            found = {"vocab": vocab.read_bytes(), "merges": merges.read_bytes()}
        except OSError:
            continue
        if all(hashlib.sha256(found[n]).hexdigest() == _GPT2_FILES[n][0] for n in found):
            return _from_vocab_and_merges(vocab, merges)
    for vocab, _ in _gpt2_places():  # of a newer transformers there is this alone
        if (path := vocab.with_name("tokenizer.json")).exists():
            return load_tokenizer(path)
    raise DataError(
        f"--tokenizer gpt2: GPT-2's files are not in {', '.join(looked)}, and are not downloaded "
        f'unasked; where there is a network, python -c "import tiktoken; '
        f"tiktoken.get_encoding('gpt2')\" puts them there; or name a tokenizer.json"
    )


def _gpt2_places() -> Iterator[tuple[Path, Path]]:
    """Where (vocabulary, merges) may be."""
    environ = os.environ
    tiktoken = environ.get("TIKTOKEN_CACHE_DIR") or environ.get("DATA_GYM_CACHE_DIR")
    cache = Path(tiktoken or Path(tempfile.gettempdir(), "data-gym-cache"))
    yield cache / _GPT2_FILES["vocab"][1], cache / _GPT2_FILES["merges"][1]
    home = Path(environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(environ.get("HF_HUB_CACHE") or home / "hub")
    for name in ("models--openai-community--gpt2", "models--gpt2"):
        snapshots = sorted(hub.glob(f"{name}/snapshots/*"))
        for path in snapshots or [hub / name]:
            yield path / "vocab.json", path / "merges.txt"


def _from_vocab_and_merges(vocab: Path, merges: Path) -> Tokenizer:
    """GPT-2's kind of tokenizer: byte-level BPE, its end of text if the vocabulary has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(vocab), str(merges))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f"--tokenizer: {vocab} and {merges} are no byte-level BPE ({error})"
        ) from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return encoding_plain_text(tokenizer)


def encoding_plain_text(tokenizer: Tokenizer, *marks: str) -> Tokenizer:
    """`tokenizer`, set to encode the text of a special token like any other text.

    The setting is not part of the tokenizer's file. So that it holds for the tokens that end a
    document or are around a message, and for `marks`, those that are not special become it; their
    ids stay.
    """
    from tokenizers import AddedToken

    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    for mark in (*_MARKS, *marks):
        if mark not in special and tokenizer.token_to_id(mark) is not None:
            tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False)])
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


def keeps_all_text(tokenizer: Tokenizer) -> bool:
    """Is any text sure to be what its ids decode to? So it is of byte-level BPE with all 256 bytes.

    False where that is not known from the tokenizer's parts.
    """
    from tokenizers import pre_tokenizers

    parts = json.loads(tokenizer.to_str())
    model, first, decoder = parts["model"], parts["pre_tokenizer"], parts["decoder"]
    *splits, last = (first or {}).get("pretokenizers") or [first or {}]
    return (
        parts["normalizer"] is None
        and all(token["special"] for token in parts["added_tokens"])  # others may take blanks along
        and all(s["type"] == "Split" and s["behavior"] != "Removed" for s in splits)
        and last.get("type") == "ByteLevel"
        and not last["add_prefix_space"]
        and model["type"] == "BPE"
        and not (model["continuing_subword_prefix"] or model["end_of_word_suffix"])
        and set(pre_tokenizers.ByteLevel.alphabet()) <= model["vocab"].keys()
        and (decoder or {}).get("type") == "ByteLevel"
    )


def id_limit(tokenizer: Tokenizer) -> int:
    """The vocabulary size a model needs: above every id, also if the ids have gaps."""
    return max(tokenizer.get_vocab_size(), *(i + 1 for i in tokenizer.get_vocab().values()))
