"""The tokenizer's part of a model directory of transformers, both ways.

tokenizer.json            the tokenizer
tokenizer_config.json     the tokens that begin and end a text, and the chat template
generation_config.json    the ids at which generate() of transformers stops
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlm.data.chat import TRAINED_ROLE, template_of
from fastlm.data.text import ChatTemplate
from fastlm.data.tokenizer import named_end_of_text
from fastlm.errors import CheckpointError, shown
from fastlm.huggingface import TOKENIZER, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"
BEGIN = "bos_token_id"
END = "eos_token_id"


class SpecialTokens(NamedTuple):
    begin: list[int]  # before each text; []: nothing
    end_of_text: int | None  # what stands between documents, if one token both begins and ends them
    ends: list[int]  # a text ends at any of them


def special_tokens(
    directory: str | os.PathLike, tokenizer: str | None, config: Mapping[str, Any]
) -> SpecialTokens:
    """What begins and what ends a text for the model in `directory`.

    tokenizer, config: the content of its tokenizer.json and of its config.json. A text begins with
    what the tokenizer's post-processor adds, as in transformers 5; with bos_token also if
    tokenizer_config.json says add_bos_token, as transformers 4 and other programs have it.
    Raises CheckpointError for a file that cannot be read, or names a token that there is not.
    """
    directory = Path(directory)
    generation = _read_if_there(directory / GENERATION_CONFIG)
    ends = _ids(generation.get(END, config.get(END)))
    begins = _ids(generation.get(BEGIN, config.get(BEGIN)))
    end_of_text = next((token for token in begins if token in ends), None)
    if tokenizer is None:
        return SpecialTokens([], end_of_text, ends)
    from tokenizers import Tokenizer

    known = Tokenizer.from_str(tokenizer)
    known.no_padding()
    known.no_truncation()
    begin = _added_before(known)
    settings = _read_if_there(directory / TOKENIZER_CONFIG)
    if not begin and settings.get("add_bos_token"):
        name = settings.get("bos_token")
        name = name.get("content") if isinstance(name, dict) else name
        if not isinstance(name, str) or (token := known.token_to_id(name)) is None:
            raise CheckpointError(
                f"{directory / TOKENIZER_CONFIG}: add_bos_token with bos_token={shown(name)}, "
                f"which {TOKENIZER} does not have; remove add_bos_token"
            )
        begin = [token]
    return SpecialTokens(begin, end_of_text, ends)


def _added_before(tokenizer: "Tokenizer") -> list[int]:
    """What the post-processor puts before a text."""
    text = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a", add_special_tokens=True).ids
    places = (at for at in range(len(whole)) if text and whole[at : at + len(text)] == text)
    return whole[: next(places, 0)]


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if type(v) is int]


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


class TextEnds(NamedTuple):
    """How the texts end that a model was trained on."""

    end_of_text: int | None  # the id of the token between documents
    template: ChatTemplate | None  # of conversations
    end_of_turn: int | None  # the id of the template's end

    @classmethod
    def of(cls, tokenizer: str | None, end_of_text: int | None, conversations: bool) -> "TextEnds":
        """end_of_text None: `<|endoftext|>`'s or `<|end_of_text|>`'s, if the tokenizer has it."""
        if tokenizer is None:
            return cls(end_of_text, None, None)
        from tokenizers import Tokenizer

        known = Tokenizer.from_str(tokenizer)
        if end_of_text is None:
            end_of_text = named_end_of_text(known)
        if not conversations:
            return cls(end_of_text, None, None)
        template = template_of(known, TOKENIZER)
        return cls(end_of_text, template, known.token_to_id(template.end))

    @property
    def ids(self) -> dict[str, Any]:
        """The fields of config.json and generation_config.json.

        A document begins behind the end of the one before. With conversations the end of a turn
        comes first: programs that know one end alone take it.
        """
        ends = dict.fromkeys(i for i in (self.end_of_turn, self.end_of_text) if i is not None)
        several = list(ends) if len(ends) > 1 else next(iter(ends), None)
        return {BEGIN: self.end_of_text, END: several}


def write_tokenizer(directory: Path, tokenizer: str, ends: TextEnds, max_seq_len: int) -> None:
    """tokenizer.json, and tokenizer_config.json with the chat template of conversations."""
    from tokenizers import Tokenizer

    known = Tokenizer.from_str(tokenizer)
    begin = None if ends.end_of_text is None else known.id_to_token(ends.end_of_text)
    content = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": begin,
        "eos_token": begin if ends.template is None else ends.template.end,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if ends.template is not None:
        content["chat_template"] = jinja_of(ends.template)
    known.no_padding()
    known.no_truncation()
    if len(known.encode("a").ids) > len(known.encode("a", add_special_tokens=False).ids):
        # What it adds to a text the model has never seen: prepare leaves it out.
        tokenizer = json.dumps({**json.loads(tokenizer), "post_processor": None})
    (directory / TOKENIZER).write_text(tokenizer, encoding="utf-8")
    write_json(directory / TOKENIZER_CONFIG, content)


def jinja_of(template: ChatTemplate) -> str:
    """The chat template of transformers for what prepare writes of a conversation.

    It begins with bos_token, which stands before all conversations but the first of a file.
    """
    before, behind = template.header.split("{role}")
    answer = template.header.format(role=TRAINED_ROLE)
    header = f"{_quoted(before)} + message['role'] + {_quoted(behind)}"
    return (
        "{{ bos_token }}"
        "{% for message in messages %}"
        f"{{{{ {header} + message['content'] + {_quoted(template.end + template.behind)} }}}}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        f"{{{{ {_quoted(answer)} }}}}"
        "{% endif %}"
    )


def _quoted(text: str) -> str:
    """As a string of Jinja, which knows the escapes of JSON."""
    return json.dumps(text)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
