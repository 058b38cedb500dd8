"""Conversations as documents: roles, and which tokens are targets.

A record holds a list of messages, {"role": ..., "content": ...}. A message becomes a header, its
content and an end, in the form that the tokenizer's special tokens are of. The content and the end
of the assistant's messages are targets of the loss; all else is only read.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastlm.data.text import ChatTemplate, Piece, cut_document
from fastlm.errors import DataError, shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINED_ROLE = "assistant"


CHATML = ChatTemplate("<|im_start|>{role}\n", "<|im_end|>", "\n", ("<|im_start|>", "<|im_end|>"))
LLAMA_3 = ChatTemplate(
    "<|start_header_id|>{role}<|end_header_id|>\n\n",
    "<|eot_id|>",
    "",
    ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)


def template_of(tokenizer: "Tokenizer", name: Any, end_of_text: int | None = None) -> ChatTemplate:
    """ChatML or Llama 3's, whichever special tokens there are.

    end_of_text: the id that is to end each document. DataError if it ends a message, too, or if the
    tokenizer has the tokens of neither.
    """
    for template in (CHATML, LLAMA_3):
        if all(tokenizer.token_to_id(token) is not None for token in template.special):
            if end_of_text is not None and end_of_text == tokenizer.token_to_id(template.end):
                raise DataError(
                    f"--tokenizer {name}: {template.end} ends each message and, as its eos_token, "
                    f"would end each document; let eos_token in its tokenizer_config.json be the "
                    f"token that ends a whole text"
                )
            return template
    raise DataError(
        f"--tokenizer {name}: has neither {' and '.join(CHATML.special)} nor "
        f"{', '.join(LLAMA_3.special)}, which --chat marks the messages with; take a chat model's "
        f"tokenizer, or train one with --vocab-size"
    )


def conversation(
    document: int, messages: Any, where: str, template: ChatTemplate
) -> Iterator[Piece]:
    """The pieces of one record. Raises DataError, naming `where`, for what is no conversation."""
    if not isinstance(messages, list) or not messages:
        raise DataError(
            f"{where}: {shown(messages)} is no list of messages; --text-key names another field"
        )
    for index, message in enumerate(messages):
        role, content = _role_and_content(message, f"{where}, message {index}")
        trained = role == TRAINED_ROLE
        yield Piece(document, template.header.format(role=role), False, special=True, ignored=True)
        for piece in cut_document(document, content):
            if piece.text:
                yield piece._replace(last=False, ignored=not trained)
        is_last = index == len(messages) - 1
        yield Piece(document, template.end, is_last and not template.behind, special=True,
                    ignored=not trained)  # fmt: skip
        if template.behind:
            yield Piece(document, template.behind, is_last, ignored=True)


def _role_and_content(message: Any, where: str) -> tuple[str, str]:
    role, content = (
        (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    )
    if not isinstance(role, str) or not role.isidentifier():
        raise DataError(f"{where}: {shown(message)} has no role; a message is {_MESSAGE}")
    if not isinstance(content, str):
        raise DataError(
            f"{where}: its content is {shown(content)}, no text; a message is {_MESSAGE}"
        )
    return role, content


_MESSAGE = '{"role": "user", "content": "text"}, role: system, user, assistant or another name'
