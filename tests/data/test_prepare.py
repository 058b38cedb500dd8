"""python -m fastlm.prepare: what it writes is the text, the whole text, or nothing at all."""

import hashlib
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepared_data import bytes_tokenizer, decoded_documents, quiet, shard_tokens, write_files
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastlm import prepare as prepare_module
from fastlm.data import encoding
from fastlm.data.manifest import Manifest
from fastlm.data.split import SplitRule, document_hash, read_split, survey
from fastlm.data.text import END_OF_TEXT, find_text_files, read_pieces
from fastlm.data.tokenizer import encoding_plain_text, keeps_all_text, train_tokenizer
from fastlm.errors import DataError
from fastlm.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]

DOCUMENTS = {
    "ascii.txt": "The quick brown fox jumps over the lazy dog.\n" * 20,
    "unicode.txt": "naïve façade — 東京 🙂👩‍👩‍👧 e\u0301 \u202eabc\u2028\x00\x1c end\n" * 5,
    "crlf.txt": "one\r\ntwo\r\n\r\nthree\rfour",
    "empty.txt": "",
    "no_newline.txt": "no newline at the end",
    "blanks.txt": " \n\t \n\n",
    "joiner.txt": "no \ufeffbyte order mark\n",
    "code.txt": "def f(x):\n    if x:\n        return  1\n\n\n\n    return 2\n" * 10,
}


# Documents and pieces


@settings(max_examples=200)
@given(
    text=st.lists(
        st.sampled_from(
            [END_OF_TEXT, END_OF_TEXT[:5], "|>", "a", "é", "東", "🙂", " ", "\n", "\r\n"]
        )
    ).map("".join),
    chunk_bytes=st.integers(1, 40),
    piece_characters=st.integers(1, 12),
)
@example(text="", chunk_bytes=1, piece_characters=1)
@example(text=f"a{END_OF_TEXT}{END_OF_TEXT}\n", chunk_bytes=3, piece_characters=4)
def test_pieces_are_the_documents_at_every_chunk_size(text, chunk_bytes, piece_characters):
    expected = text.split(END_OF_TEXT)
    shorter_than_a_piece = len(expected[-1]) < piece_characters + len(END_OF_TEXT)
    if len(expected) > 1 and shorter_than_a_piece and not expected[-1].strip():
        expected.pop()  # the newline after the last marker
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode())
        file.flush()
        pieces, others = (
            list(read_pieces(Path(file.name), chunk_bytes=n, piece_characters=piece_characters))
            for n in (chunk_bytes, 1 << 20)
        )
    assert pieces == others
    assert all(len(piece.text) <= piece_characters for piece in pieces)
    documents = [""] * (pieces[-1].document + 1)
    for piece in pieces:
        documents[piece.document] += piece.text
    assert documents == expected
    assert sum(piece.last for piece in pieces) == len(documents)


def test_cuts_do_not_change_the_tokens(tmp_path):
    text = "".join(f"def f_{i}(x):{'  ' * (i % 5)}\r\n\n\n    y =  x + {i}\n" for i in range(3000))
    (tmp_path / "a.py").write_bytes(text.encode())
    pieces = list(read_pieces(tmp_path / "a.py", piece_characters=500))
    assert len(pieces) > 200
    tokenizer = train_tokenizer([text], 500)
    tokens = [i for piece in pieces for i in tokenizer.encode(piece.text).ids]
    assert tokens == tokenizer.encode(text).ids


@pytest.mark.parametrize("tail", [b"", b" and more\n"])
@pytest.mark.parametrize("bad, offset", [(b"\xff", 0), (b"\xe6\x9d", 0), (b"\xe6\x9dx", 0)])
@pytest.mark.parametrize("before", [0, 1, 7, 8, 9, 100])
def test_invalid_utf8_names_the_byte(tmp_path, before, bad, offset, tail):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"x" * before + bad + tail)
    with pytest.raises(DataError, match=rf"latin\.txt.*offset {before + offset};"):
        list(read_pieces(path, chunk_bytes=8))


@pytest.mark.parametrize("chunk_bytes", [1, 2, 1 << 20])
def test_a_byte_order_mark_is_no_text(tmp_path, chunk_bytes):
    path = tmp_path / "windows.txt"
    path.write_bytes("\ufeffa \ufeff b\r\n".encode())
    assert [p.text for p in read_pieces(path, chunk_bytes=chunk_bytes)] == ["a \ufeff b\r\n"]


def test_a_directory_of_links(tmp_path):
    write_files(tmp_path, {"far/b.txt": "b", "far/sub/c.jsonl": '{"text": "c"}', "d/a.txt": "a"})
    (tmp_path / "d/link").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "d")  # a circle
    names = [file.name for file in find_text_files([tmp_path / "d"])]
    assert names == ["a.txt", "link/b.txt", "link/sub/c.jsonl"]
    # What is there without a link goes by its own name, in whatever order a directory is listed.
    write_files(tmp_path / "both", {"m.txt": "m", "z/x.txt": "x", ".store/y.txt": "y"})
    (tmp_path / "both/a").symlink_to(tmp_path / "both/z")
    (tmp_path / "both/train").symlink_to(".store")
    names = [file.name for file in find_text_files([tmp_path / "both"])]
    assert names == ["m.txt", "train/y.txt", "z/x.txt"]


def test_a_directory_that_cannot_be_read(tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": "a", "b/b.txt": "b", ".trash/c.txt": "c"})
    scandir, closed = os.scandir, [".trash"]

    def refused(path):
        if Path(path).name in closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert [file.name for file in find_text_files([tmp_path])] == ["a.txt", "b/b.txt"]
    closed.append("b")
    with pytest.raises(DataError, match="cannot be read"):
        find_text_files([tmp_path])


def test_inputs(tmp_path):
    write_files(tmp_path, {"d/a.txt": "a", "d/sub/b.txt": "b", "d/c.md": "c"})
    names = lambda *inputs: [f.name for f in find_text_files([tmp_path / i for i in inputs])]  # noqa: E731
    assert names("d") == ["a.txt", "sub/b.txt"]
    assert names("d/**/*") == ["a.txt", "c.md", "sub/b.txt"]
    assert names("d/*.md") == ["c.md"]
    assert names("d/sub", "d/c.md") == ["c.md", "sub/b.txt"]
    # However often and by whatever name: a file in both splits would spoil the validation.
    (tmp_path / "link.txt").symlink_to(tmp_path / "d/a.txt")
    assert (
        len(find_text_files([tmp_path / "d/a.txt", tmp_path / "d/*.txt", tmp_path / "link.txt"]))
        == 1
    )


# What is written


@pytest.mark.parametrize("in_one_file", [False, True])
def test_round_trip(tmp_path, in_one_file):
    texts = DOCUMENTS
    if in_one_file:
        texts = {"all.txt": "".join(text + END_OF_TEXT for text in DOCUMENTS.values())}
    files = find_text_files([write_files(tmp_path / "in", texts)])
    manifest = prepare(files, tmp_path / "out", vocab_size=400, val_fraction=0.3, log=quiet)
    found = {name: decoded_documents(tmp_path / "out", name) for name in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(DOCUMENTS.values())
    assert manifest == Manifest.load(tmp_path / "out")
    assert manifest.end_of_text == 0
    for name, split in manifest.splits.items():
        assert split.documents == len(found[name]) > 0
        assert split.bytes == sum(len(text.encode()) for text in found[name]) > 0
        assert split.tokens == len(shard_tokens(tmp_path / "out", name))


def test_documents_of_many_pieces_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 100_000)
    texts = {f"{i}.txt": f"line {i} of 🙂 text\r\n" * 9_000 for i in range(4)}
    files = find_text_files([write_files(tmp_path / "in", texts)])
    prepare(files, tmp_path / "out", vocab_size=300, log=quiet)
    documents = [d for name in ("train", "val") for d in decoded_documents(tmp_path / "out", name)]
    assert sorted(documents) == sorted(texts.values())


def test_shards(tmp_path):
    files = find_text_files([write_files(tmp_path / "in", DOCUMENTS)])
    whole = prepare(files, tmp_path / "whole", vocab_size=300, log=quiet)
    parts = prepare(files, tmp_path / "parts", vocab_size=300, shard_tokens=100, log=quiet)
    for name, split in parts.splits.items():
        assert np.array_equal(
            shard_tokens(tmp_path / "parts", name), shard_tokens(tmp_path / "whole", name)
        )
        assert [shard.tokens for shard in split.shards[:-1]] == [100] * (len(split.shards) - 1)
        assert sum(shard.tokens for shard in split.shards) == split.tokens
        for shard in split.shards:
            content = (tmp_path / "parts" / shard.file).read_bytes()
            assert len(content) == 2 * shard.tokens
            assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert len(parts.splits["train"].shards) > 3
    # Exactly full: no empty shard follows.
    total = whole.splits["val"].tokens
    exact = prepare(files, tmp_path / "exact", vocab_size=300, shard_tokens=total, log=quiet)
    assert [shard.tokens for shard in exact.splits["val"].shards] == [total]


@pytest.mark.parametrize("end_of_text, dtype", [(65_535, "uint16"), (65_536, "uint32")])
def test_width_of_ids(tmp_path, end_of_text, dtype):
    """A gap in the ids: the dtype and the vocabulary follow the highest one, not their number."""
    files = find_text_files([write_files(tmp_path / "in", DOCUMENTS)])
    tokenizer = bytes_tokenizer(tmp_path / "t.json", end_of_text=end_of_text)
    manifest = prepare(files, tmp_path / "out", tokenizer=tokenizer, log=quiet)
    assert (manifest.dtype, manifest.vocab_size) == (dtype, end_of_text + 1)
    assert manifest.end_of_text == end_of_text
    documents = [d for name in ("train", "val") for d in decoded_documents(tmp_path / "out", name)]
    assert sorted(documents) == sorted(DOCUMENTS.values())


def test_only_plain_text_is_encoded(tmp_path):
    """Special tokens in the text are text; truncation, padding and templates do not apply."""
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer(tmp_path / "t.json")))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "t.json"))
    texts = {"a.txt": "before <|im_start|> after", "b.txt": "b" * 1000}
    files = find_text_files([write_files(tmp_path / "in", texts)])
    lines = []
    prepare(files, tmp_path / "out", tokenizer=tmp_path / "t.json", log=lines.append)
    found = {name: decoded_documents(tmp_path / "out", name) for name in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(texts.values())
    special = tokenizer.token_to_id("<|im_start|>")
    assert not any((shard_tokens(tmp_path / "out", name) == special).any() for name in found)
    assert not any("does not give the text back" in line for line in lines)


def test_a_tokenizer_that_loses_text_is_reported(tmp_path):
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer(tmp_path / "t.json")))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(tmp_path / "t.json"))
    files = find_text_files([write_files(tmp_path / "in", DOCUMENTS)])
    lines = []
    prepare(files, tmp_path / "out", tokenizer=tmp_path / "t.json", log=lines.append)
    assert any("does not give the text back" in line for line in lines)


def test_a_tokenizer_that_loses_the_text_of_one_document_is_reported(tmp_path):
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate("plain")}, []))
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    tokenizer.save(str(tmp_path / "t.json"))
    texts = {f"{i}.txt": "plain" for i in range(9)} | {"5.txt": "東京"}
    files = find_text_files([write_files(tmp_path / "in", texts)])
    lines = []
    prepare(files, tmp_path / "out", tokenizer=tmp_path / "t.json", log=lines.append)
    assert any("does not give the text back" in line for line in lines)


def byte_level(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split_first(behavior: str):
    split = pre_tokenizers.Split(Regex(r"\s+"), behavior)
    return pre_tokenizers.Sequence([split, byte_level(use_regex=False)])  # as Llama 3's


LOSSLESS = {  # and what makes it lossy
    "bytes": lambda t: None,
    "split": lambda t: setattr(t, "pre_tokenizer", split_first("isolated")),
    "special": lambda t: t.add_special_tokens([AddedToken("def", rstrip=True)]),
}
LOSSY = {
    "normalizer": lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
    "removed": lambda t: setattr(t, "pre_tokenizer", split_first("removed")),
    "blanks": lambda t: t.add_tokens([AddedToken("def", rstrip=True)]),
    "prefix": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel()),
    "words": lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()),
    "nothing": lambda t: setattr(t, "pre_tokenizer", None),
    "decoder": lambda t: setattr(t, "decoder", decoders.Metaspace()),
    "model": lambda t: setattr(t, "model", models.WordLevel({"a": 0}, "a")),
    "byte": lambda t: setattr(
        t, "model", models.BPE({c: i for c, i in t.get_vocab().items() if c != "a"}, [])
    ),
}


@pytest.mark.parametrize("change", [*LOSSLESS, *LOSSY])
def test_what_needs_no_decoding_loses_nothing(tmp_path, change):
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer(tmp_path / "t.json")))
    {**LOSSLESS, **LOSSY}[change](tokenizer)
    encoding_plain_text(tokenizer)
    texts = [*DOCUMENTS.values(), END_OF_TEXT]
    is_exact = encoding.encode(tokenizer, texts, [], True).exact
    assert keeps_all_text(tokenizer) == is_exact == (change in LOSSLESS)


def test_fingerprint_names_the_data(tmp_path):
    write_files(tmp_path / "in", DOCUMENTS)

    def fingerprint(name, **options):
        files = find_text_files([tmp_path / "in"])
        return prepare(files, tmp_path / name, log=quiet, **options).fingerprint

    first = fingerprint("a", vocab_size=300)
    assert first == fingerprint("b", vocab_size=300)
    assert first != fingerprint("c", vocab_size=301)
    with open(tmp_path / "in" / "ascii.txt", "a") as file:
        file.write("!")
    assert first != fingerprint("d", vocab_size=300)


# Training and validation


def many_documents(directory: Path, count: int = 60) -> Path:
    return write_files(directory, {f"{i}.txt": f"document {i} " * 20 for i in range(count)})


def test_split_depends_on_neither_order_nor_place(tmp_path):
    many_documents(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "else" / "where")
    files = find_text_files([tmp_path / "here"])
    moved = find_text_files(sorted((tmp_path / "else" / "where").iterdir(), reverse=True))
    first, second = (
        prepare(f, tmp_path / out, vocab_size=300, val_fraction=0.25, log=quiet)
        for f, out in ((files, "a"), (moved, "b"))
    )
    assert first == second
    train, val = (set(decoded_documents(tmp_path / "a", name)) for name in ("train", "val"))
    assert not train & val
    assert len(train) + len(val) == 60
    assert 5 <= len(val) <= 25  # 15 expected
    # The rule is the hash of each document alone: more documents leave the others where they are.
    more = prepare_more(tmp_path)
    assert val <= set(decoded_documents(more, "val"))
    assert train <= set(decoded_documents(more, "train"))


def prepare_more(tmp_path: Path) -> Path:
    files = find_text_files([many_documents(tmp_path / "here", 90)])
    prepare(files, tmp_path / "more", vocab_size=300, val_fraction=0.25, log=quiet)
    return tmp_path / "more"


@pytest.mark.parametrize("val_fraction", [1e-6, 0.05, 0.5, 1 - 1e-6])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_no_split_is_empty(tmp_path, count, val_fraction):
    # Documents without text do not count as a split's content.
    text = END_OF_TEXT.join(["", *(f"document {i} " for i in range(count)), "", ""])
    (tmp_path / "in.txt").write_text(text)
    files = find_text_files([tmp_path / "in.txt"])
    rule = SplitRule.choose(survey(files, quiet), val_fraction)
    splits = {"train": [], "val": []}
    for _, piece in read_split(files, rule):
        splits[piece.split].append(piece.text)
    assert all("".join(texts) for texts in splits.values())
    assert sorted(splits["train"] + splits["val"]) == sorted(text.split(END_OF_TEXT)[: count + 2])
    by_hash = sorted(range(1, count + 1), key=lambda document: document_hash("in.txt", document))
    if val_fraction == 1e-6:
        assert [f"document {by_hash[0] - 1} "] == [t for t in splits["val"] if t]
    if val_fraction == 1 - 1e-6:
        assert [f"document {by_hash[-1] - 1} "] == [t for t in splits["train"] if t]


@pytest.mark.parametrize(
    "text",
    [
        "".join(f"line {i}\n" for i in range(1000)),
        "".join(f"line {i}\n" for i in range(50_000)),  # several pieces
        "x" * 1000,  # no newline to cut at
        "x" * 200_000,
        "x" * 999 + "\n",  # only newline at the very end
        "🙂\n" * 1000 + END_OF_TEXT + "\n",
        "ab",
        "My Title\n" + "words in one line, " * 3000,
        "words in one line, " * 3000 + "\nThe end",
    ],
    ids=["lines", "many", "unbroken", "unbroken many", "one line", "marker", "two characters",
         "title", "last line"],
)  # fmt: skip
@pytest.mark.parametrize("val_fraction", [1e-9, 0.1, 0.9])
def test_one_document_is_cut_in_two(tmp_path, text, val_fraction):
    (tmp_path / "in.txt").write_bytes(text.encode())
    files = find_text_files([tmp_path / "in.txt"])
    tokenizer = bytes_tokenizer(tmp_path / "t.json")
    lines = []
    manifest = prepare(
        files, tmp_path / "out", tokenizer=tokenizer, val_fraction=val_fraction, log=lines.append
    )
    assert not any("whole documents" in line for line in lines)
    (train,), (val,) = (decoded_documents(tmp_path / "out", name) for name in ("train", "val"))
    document = text.removesuffix(END_OF_TEXT + "\n")
    assert train and val and train + val == document
    assert abs(len(val) - val_fraction * len(document)) <= 15  # a line
    if val_fraction > 0.01 and (separator := next((c for c in "\n " if c in document[1:-1]), "")):
        assert train.endswith(" " if "words" in text else separator)
    assert [split.documents for split in manifest.splits.values()] == [1, 1]


def test_tokenizer_is_trained_on_the_training_documents_alone(tmp_path):
    def vocabulary(secret_in: str) -> set[str]:
        texts = {f"{i}.txt": "some ordinary words here\n" * 50 for i in range(40)}
        for name in texts:
            is_val = document_hash(name, 0) < 0.2 * 2**64
            if is_val == (secret_in == "val"):
                texts[name] += "zyzzyva zyzzyva\n" * 50
        files = find_text_files([write_files(tmp_path / secret_in, texts)])
        out = tmp_path / f"out_{secret_in}"
        prepare(files, out, vocab_size=500, val_fraction=0.2, log=quiet)
        documents = decoded_documents(out, secret_in)
        assert documents and all("zyzzyva" in text for text in documents)
        return set(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab())

    assert "zyzzyva" in vocabulary("train")
    assert not any("zy" in token or "yv" in token for token in vocabulary("val"))


def test_tokenizer_is_trained_on_an_even_sample_of_much_text(tmp_path, monkeypatch):
    texts = {f"{i:02}.txt": f"word{chr(97 + i // 10)} " * 200 for i in range(100)}
    files = find_text_files([write_files(tmp_path / "in", texts)])
    size = sum(map(len, texts.values()))
    monkeypatch.setattr(prepare_module, "TOKENIZER_SAMPLE_BYTES", size // 5)
    rule = SplitRule.choose(survey(files, quiet), 0.05)
    pieces = (piece for _, piece in read_split(files, rule))
    sample = list(prepare_module._training_texts(pieces, size, quiet))
    assert 15 <= len(sample) <= 20
    assert len(set(sample)) == 10  # some of every tenth of the input
    manifest = prepare(files, tmp_path / "out", vocab_size=300, log=quiet)
    assert sum(split.bytes for split in manifest.splits.values()) == size


def test_long_words_do_not_stall_the_tokenizer(tmp_path):
    """Without the breaks of _LONG_WORD this takes minutes."""
    random = np.random.default_rng(0)
    (tmp_path / "dna.txt").write_bytes(
        random.choice(list(b"ACGT"), 1_000_000).astype("u1").tobytes()
    )
    started = time.monotonic()
    prepare(find_text_files([tmp_path / "dna.txt"]), tmp_path / "out", vocab_size=700, log=quiet)
    assert time.monotonic() - started < 20
