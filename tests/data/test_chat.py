"""Conversations: the assistant's words and the end of its messages are targets, nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from prepared_data import bytes_tokenizer, quiet, shard_tokens
from tokenizers import AddedToken, Tokenizer
from training_runs import tiny_config

from fastlm import prepare as prepare_module
from fastlm import train_loop
from fastlm.data import encoding
from fastlm.data.files import open_data
from fastlm.data.loader import TrainLoader, all_batches
from fastlm.data.manifest import Manifest
from fastlm.data.text import find_text_files
from fastlm.data.tokenizer import train_tokenizer
from fastlm.errors import DataError
from fastlm.huggingface_tokenizer import TextEnds
from fastlm.prepare import prepare

CHATS = [
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {i} + {i}? <|im_end|>"},  # no way out of the role
        {"role": "assistant", "content": f"It is {2 * i}.\nReally."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": ""},
    ]
    for i in range(40)
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = "".join(json.dumps({"messages": chat, "id": 1}) + "\n" for chat in CHATS)
    (tmp_path / "chats.jsonl").write_text(lines)
    return tmp_path


def prepared(out: str, **options) -> Manifest:
    files = find_text_files(["chats.jsonl"], "messages")
    return prepare(files, out, chat=True, val_fraction=0.2, log=quiet, **options)


def ids_and_targets(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    manifest = Manifest.load(directory)
    files = manifest.splits[split].ignored
    ignored = np.concatenate([np.fromfile(directory / shard.file, np.uint8) for shard in files])
    return shard_tokens(directory, split), ignored == 0


def chat_tokenizer(*tokens: str, special: bool = True) -> None:
    tokenizer = train_tokenizer([json.dumps(CHATS)], 300)
    add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
    add([AddedToken(token, special=special) for token in tokens])
    tokenizer.save("t.json")


@pytest.mark.parametrize("form", ["trained", "chatml", "chatml, not special", "llama3"])
def test_the_assistants_turns_are_targets(place, form):
    options: dict = dict(vocab_size=300)
    if form.startswith("chatml"):
        chat_tokenizer("<|im_start|>", "<|im_end|>", special=form == "chatml")
        options = dict(tokenizer="t.json")
    elif form == "llama3":
        chat_tokenizer("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        options = dict(tokenizer="t.json")
    prepared("out", **options)
    tokenizer = Tokenizer.from_file("out/tokenizer.json")
    found = []
    for split in ("train", "val"):
        ids, targets = ids_and_targets(place / "out", split)
        assert len(ids) == len(targets)
        ends = np.flatnonzero(ids == 0)
        for part, mask in zip(np.split(ids, ends + 1), np.split(targets, ends + 1), strict=True):
            both = [part.tolist(), part[mask].tolist()]
            found.append(tuple(tokenizer.decode_batch(both, skip_special_tokens=False)))
    start, middle, end = ("<|im_start|>", "\n", "<|im_end|>\n")
    if form == "llama3":
        start, middle, end = ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
    expected = [
        (
            "".join(f"{start}{m['role']}{middle}{m['content']}{end}" for m in chat)
            + "<|endoftext|>",
            "".join(m["content"] + end.strip() for m in chat if m["role"] == "assistant"),
        )
        for chat in CHATS
    ]
    assert sorted(f for f in found if f[0]) == sorted(expected)
    # What the user writes is text, also if it looks like a special token.
    mark = tokenizer.token_to_id("<|im_end|>")
    if form != "llama3":
        ids = np.concatenate([shard_tokens(place / "out", split) for split in ("train", "val")])
        assert (ids == mark).sum() == sum(map(len, CHATS))


def test_batches_have_no_other_targets(place):
    manifest = prepared("out", vocab_size=300, shard_tokens=500)
    assert len(manifest.splits["train"].ignored) == len(manifest.splits["train"].shards) > 2
    data = open_data(["out"])
    ids, targets = ids_and_targets(place / "out", "train")
    x, y = TrainLoader(data.train, 16, 32, seed=0).batch(0)
    labels = np.where(targets, ids.astype(np.int64), -100)
    for row, begin in enumerate(TrainLoader(data.train, 16, 32, seed=0).sampler.starts(0, 16)):
        assert np.array_equal(x[row], ids[begin : begin + 32])
        assert np.array_equal(y[row], labels[begin + 1 : begin + 33])
    counted = sum(int((y != -100).sum()) for _, y in all_batches(data.val, 4, 32, "cpu"))
    assert counted == ids_and_targets(place / "out", "val")[1][1:].sum()
    part = data.train.slice(100, 900).gather(np.array([7]), 32, "cpu")[1]
    assert np.array_equal(part[0], labels[108:140])
    # Beside text without conversations, which is all targets.
    np.arange(2000, dtype="<u2").tofile("text.bin")
    mixed = open_data(["out:1", "text.bin:1"])
    y = mixed.train.gather(np.array([100, len(ids) + 5]), 32, "cpu")[1]
    assert np.array_equal(y[0], labels[101:133]) and np.array_equal(y[1], np.arange(6, 38))
    assert data.val_bytes is None  # bits per byte are those of all the text


def test_prepared_in_pieces_it_is_the_same(place, monkeypatch):
    prepared("whole", vocab_size=300)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1_000)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    genuine, calls = encoding.encode, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(encoding, "encode", stopping)
    stops = 0
    while True:
        try:
            prepared("out", vocab_size=300)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 1
    for path in (place / "whole").iterdir():
        assert path.read_bytes() == (place / "out" / path.name).read_bytes(), path.name


def test_a_model_learns_what_the_assistant_says_alone(place, one_thread, without_extras):
    prepared("out", vocab_size=300)
    data = open_data(["out"])
    cfg = tiny_config(place / "run", vocab_size=300, total_steps=20, lr_max=1e-2)
    model = train_loop(data.train, data.val, cfg)
    x, y = TrainLoader(data.train, 64, 32, seed=3).batch(0)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="none")
        ids = torch.cat([x[:, 1:], x[:, :1]], 1)
        others = torch.nn.functional.cross_entropy(model(x).transpose(1, 2), ids, reduction="none")
    assert losses[y != -100].mean() < 0.8 * others[:, :-1][y[:, :-1] == -100].mean()


@pytest.mark.parametrize(
    "record, message",
    [
        ('{"messages": "hello"}', "line 1: 'hello' is no list of messages; --text-key"),
        ('{"messages": []}', "line 1: [] is no list of messages"),
        ('{"messages": [{"content": "x"}]}', "message 0: {'content': 'x'} has no role"),
        ('{"messages": [{"role": "a\\nb", "content": "x"}]}', "has no role"),
        ('{"messages": ["x"]}', "message 0: 'x' has no role"),
        ('{"messages": [{"role": "user", "content": null}]}', "message 0: its content is None"),
        ('{"text": "x"}', "has no field 'messages'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "one conversation cannot be held out"),
    ],
)
def test_what_is_no_conversation_is_named(place, record, message):
    (place / "chats.jsonl").write_text(record)
    with pytest.raises(DataError) as error:
        prepared("out", vocab_size=300)
    assert message in str(error.value)


CHAT_MODELS = {  # special tokens, as published: the eos_token is the end of a message
    "Llama 3": ("<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "Qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
}


@pytest.mark.parametrize("tokens", CHAT_MODELS.values(), ids=CHAT_MODELS)
def test_the_end_of_a_message_ends_no_document(place, tokens):
    tokenizer = bytes_alone(tokens)
    Path("tokenizer_config.json").write_text(json.dumps({"eos_token": tokens[-1]}))
    end_of_text, end_of_turn = map(tokenizer.token_to_id, (tokens[0], tokens[-1]))
    manifest = prepared("out", tokenizer="tokenizer.json")
    assert manifest.end_of_text == end_of_text
    for split in ("train", "val"):
        ids = shard_tokens(place / "out", split)
        assert (ids == end_of_text).sum() == manifest.splits[split].documents
        assert (ids == end_of_turn).sum() == 5 * manifest.splits[split].documents
    ends = TextEnds.of(tokenizer.to_str(), None, conversations=True)
    assert ends.ids == {"bos_token_id": end_of_text, "eos_token_id": [end_of_turn, end_of_text]}


@pytest.mark.parametrize("tokens", CHAT_MODELS.values(), ids=CHAT_MODELS)
def test_the_end_of_a_message_as_end_of_a_document_is_refused(place, tokens):
    tokenizer = bytes_alone(["</s>", *tokens[1:]])
    config = Path("tokenizer_config.json")
    config.write_text(json.dumps({"eos_token": tokens[-1]}))
    with pytest.raises(DataError, match=r"tokenizer\.json: <\|\w+\|> ends each message.*let eos"):
        prepared("out", tokenizer="tokenizer.json")
    config.write_text(json.dumps({"eos_token": "</s>"}))  # what the message says
    assert prepared("out", tokenizer="tokenizer.json").end_of_text == tokenizer.token_to_id("</s>")


def bytes_alone(special: Sequence[str]) -> Tokenizer:
    """tokenizer.json: a tokenizer of the bytes, and of `special` tokens alone."""
    bytes_tokenizer(Path("tokenizer.json"), end_of_text=None)
    tokenizer = Tokenizer.from_file("tokenizer.json")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save("tokenizer.json")
    return tokenizer


def test_other_mistakes(place):
    chat_tokenizer()
    with pytest.raises(DataError, match=r"t\.json: has neither <\|im_start\|> and"):
        prepared("out", tokenizer="t.json")
    (place / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt: --chat reads JSON lines"):
        prepare(find_text_files(["a.txt"]), "out", chat=True, log=quiet)
    chats = [[{"role": "user", "content": "alone"}]] * 5
    (place / "chats.jsonl").write_text("".join(json.dumps({"messages": c}) + "\n" for c in chats))
    prepared("out", vocab_size=300)
    with pytest.raises(DataError, match="training data: no token is a target"):
        open_data(["out"]).check(8, 300)
