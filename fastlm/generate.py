"""Sampling text from a checkpoint: python -m fastlm.generate --ckpt F --prompt "..."

B samples at once, T prompt tokens, V vocabulary.
"""

import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlm.data.chat import CHATML, LLAMA_3
from fastlm.data.text import END_OF_TEXT
from fastlm.data.tokenizer import encode_batch, encoding_plain_text, named_end_of_text
from fastlm.errors import ConfigError, DivergedError, run_command
from fastlm.evaluate import evaluating
from fastlm.hardware import select_device
from fastlm.huggingface_tokenizer import special_tokens
from fastlm.model import KVCache, TransformerLM
from fastlm.model_interface import model_class
from fastlm.pretrained import load_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Tensor,  # (B, T) token ids
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    context_len: int | None = None,
) -> Tensor:
    """(B, T + max_new_tokens) ids: `prompt` continued token by token, with a key-value cache.

    temperature 0 takes the likeliest token; top_k keeps the k likeliest, top_p the fewest whose
    probabilities reach p (nucleus sampling, arXiv:1904.09751). `generator` lives on the model's
    device. Where the text outgrows the model's context, the window moves on by half of it.

    Another model than TransformerLM, (B, T) ids to (B, T, V) logits, has no cache: for each token
    it sees the last `context_len` again (default: its max_seq_len, or all of them).
    """
    check_sampling(temperature, top_k, top_p)
    if prompt.dim() != 2 or prompt.shape[1] < 1:
        raise ValueError(f"prompt has shape {tuple(prompt.shape)}: it must be (B, T), T at least 1")
    if model_class(model) is None:
        follow = _cached(model, prompt.shape[1] + max_new_tokens)
    else:
        follow = _uncached(model, context_len)
    tokens = prompt
    # What was compiled for training windows would be compiled again for every length.
    with evaluating(model), torch.compiler.set_stance("force_eager"):
        for _ in range(max_new_tokens):
            following = sample(follow(tokens).float(), temperature, top_k, top_p, generator)
            tokens = torch.cat((tokens, following), dim=1)
    return tokens


def _cached(model: TransformerLM, length: int) -> Callable[[Tensor], Tensor]:
    """(B, T) ids, those of the call before and one more, to the logits of what follows: (B, V).

    length: T at the end.
    """
    longest, cache = model.max_seq_len, KVCache(length)

    def follow(tokens: Tensor) -> Tensor:
        nonlocal cache
        unseen = tokens[:, -1:] if cache.length else tokens[:, -longest:]
        if cache.length + unseen.shape[1] > longest:
            cache, unseen = KVCache(length), tokens[:, -(longest // 2 or 1) :]
        return model(unseen, cache)[:, -1]

    return follow


def _uncached(model: nn.Module, context_len: int | None) -> Callable[[Tensor], Tensor]:
    """(B, T) ids to the logits of what follows: (B, V)."""
    longest = context_len or getattr(model, "max_seq_len", None) or 0  # 0: [-0:] takes all
    return lambda tokens: model(tokens[:, -longest:])[:, -1]


def sample(
    logits: Tensor,  # (B, V)
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None = None,
) -> Tensor:  # (B, 1)
    """One token id a row. Raises DivergedError for NaN or infinite logits; -inf is no token's."""
    largest = logits.amax(dim=-1, keepdim=True)  # NaN if one is
    if not largest.isfinite().all():
        raise DivergedError(
            "the model's logits are not finite (NaN or infinite): its weights are damaged, or its "
            "training has diverged; take an earlier checkpoint"
        )
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    # The largest is 0 for any temperature, and none is too small for fp32.
    logits = (logits - largest) / max(temperature, torch.finfo(logits.dtype).tiny)
    if top_k is not None:
        smallest_kept = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, float("-inf"))
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ordered, indices = probabilities.sort(dim=-1, descending=True)
        # Dropped: tokens before which p is reached already. The likeliest always stays.
        ordered = ordered.masked_fill(ordered.cumsum(dim=-1) - ordered >= top_p, 0.0)
        probabilities = torch.zeros_like(ordered).scatter(-1, indices, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not temperature >= 0:  # NaN too
        raise ConfigError(f"temperature={temperature}: it must not be negative")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p}: it must lie in (0, 1]")


def sample_texts(
    model: nn.Module,
    tokenizer_json: str | None,
    *,
    prompt: str = "",
    num_samples: int = 5,
    max_new_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = 0.95,
    seed: int = 0,
    context_len: int | None = None,
    end_of_text: int | None = None,
    begin: Sequence[int] = (),
    ends: Iterable[int] = (),
) -> list[str]:
    """`num_samples` continuations of `prompt`, each cut at the end of its document, or of a turn in
    a conversation.

    An empty prompt starts a new document. Without a tokenizer the texts are token ids.
    context_len: of a model that does not tell its own (see generate). end_of_text: the token that
    stands between documents; by default `<|endoftext|>`, if the tokenizer has it. begin: ids in its
    place before the prompt. ends: ids that end a text, too.
    """
    tokenizer = None
    ids = list(begin) or [0 if end_of_text is None else end_of_text]
    stops = {end_of_text, *ends}
    if tokenizer_json is not None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(tokenizer_json)
        tokenizer.no_padding()  # published ones may cut or fill every text
        tokenizer.no_truncation()
        if end_of_text is None:
            end_of_text = named_end_of_text(tokenizer)
        stops |= {end_of_text, *(tokenizer.token_to_id(t.end) for t in (CHATML, LLAMA_3))}
        start = list(begin) or ([] if end_of_text is None else [end_of_text])
        prompt_ids = encode_prompt(tokenizer, prompt)
        ids = start + prompt_ids
        if not ids:
            raise ConfigError("prompt is empty and the tokenizer has no end-of-text token")
    elif prompt:
        try:
            ids = [int(word) for word in prompt.split()]
        except ValueError as error:
            raise ConfigError(
                f"prompt={prompt!r}: this checkpoint has no tokenizer; give token ids, as in '5 17'"
            ) from error
    if model_class(model) is None:
        vocab_size = model.token_embeddings.num_embeddings
    else:  # known to have ids for all of the tokenizer, if it was trained with it
        vocab_size = math.inf if tokenizer is None else tokenizer.get_vocab_size()
    if not all(0 <= i < vocab_size for i in ids):
        raise ConfigError(f"prompt holds token ids outside the vocabulary of {vocab_size}")
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    rows = generate(
        model,
        torch.tensor([ids] * num_samples, device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=generator,
        context_len=context_len,
    ).tolist()
    texts = []
    for row in rows:
        new = list(itertools.takewhile(lambda token: token not in stops, row[len(ids) :]))
        if tokenizer is None:
            texts.append(" ".join(map(str, ids + new)))
            continue
        # The prompt as it was given: decoded, it lacks `<|endoftext|>` and what has no token.
        # Decoded together with it, what follows keeps a space that begins it.
        text, head = (tokenizer.decode(part) for part in (prompt_ids + new, prompt_ids))
        following = text[len(head) :] if text.startswith(head) else tokenizer.decode(new)
        texts.append(prompt + following)
    return texts


def encode_prompt(tokenizer: "Tokenizer", prompt: str) -> list[int]:
    """The ids of `prompt`, encoded as prepare encodes a training text.

    `<|endoftext|>` is its token; the names of other special tokens are plain text, and none is
    added, whatever the tokenizer does by default: the model has never seen them.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    parts = [prompt] if end_of_text is None else prompt.split(END_OF_TEXT)
    first, *others = encode_batch(encoding_plain_text(tokenizer), parts)
    for ids in others:
        first += [end_of_text, *ids]
    return first


@dataclass
class GenerateArguments:
    """Sample text from a checkpoint of fastlm.train."""

    ckpt: str
    """A checkpoint, a run's directory (its newest checkpoint), or a directory of transformers."""
    prompt: str = ""
    """Text to continue. Empty: a new document."""
    max_new_tokens: int = 200
    num_samples: int = 1
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int | None = None
    """Sample among the k likeliest tokens."""
    top_p: float | None = 0.95
    """Sample among the fewest tokens whose probabilities reach p. None: among all."""
    seed: int = 0
    device: str = "auto"


def main(argv: list[str] | None = None) -> int:
    """The command. Returns its exit code."""
    import tyro

    arguments = tyro.cli(GenerateArguments, args=argv, prog="python -m fastlm.generate")
    return run_command(lambda: _print_samples(arguments))


def _print_samples(arguments: GenerateArguments) -> None:
    for name in ("max_new_tokens", "num_samples"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"{name}={getattr(arguments, name)}: it must be at least 1")
    check_sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    model, payload = load_model(arguments.ckpt, select_device(arguments.device))
    marks: dict[str, Any] = {"end_of_text": payload.get("end_of_text")}
    if "huggingface_config" in payload:
        config = payload["huggingface_config"]
        marks = special_tokens(arguments.ckpt, payload.get("tokenizer"), config)._asdict()
    texts = sample_texts(
        model,
        payload.get("tokenizer"),
        prompt=arguments.prompt,
        num_samples=arguments.num_samples,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        **marks,
    )
    for index, text in enumerate(texts):
        if len(texts) > 1:
            print(f"--- sample {index + 1} of {len(texts)} ---")
        print(text)


if __name__ == "__main__":
    sys.exit(main())
