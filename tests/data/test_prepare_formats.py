"""What fastlm.prepare reads: one text in every format gives the same documents; and tokenizers."""

import gzip
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prepared_data import bytes_tokenizer, decoded_documents, quiet, write_files
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from fastlm.data import tokenizer as tokenizer_module
from fastlm.data.records import read_documents
from fastlm.data.text import END_OF_TEXT, TextFile, find_text_files
from fastlm.data.tokenizer import encode_batch, end_of_text_id, load_tokenizer
from fastlm.errors import DataError
from fastlm.prepare import prepare

DOCUMENTS = [
    "The quick brown fox\n" * 3,
    "naïve — 東京 🙂\r\n",
    "",
    "x" * 70_000 + " a document of two pieces",
    *(f"document {i}\n" for i in range(30)),
]


def as_text(path: Path) -> bytes:
    return "".join(document + END_OF_TEXT for document in DOCUMENTS).encode()


def as_jsonl(path: Path) -> bytes:
    lines = [json.dumps({"id": i, "text": d}) for i, d in enumerate(DOCUMENTS)]
    return "\n\n".join(lines).encode()  # an empty line is no document


def gz(content: bytes) -> bytes:
    half = len(content) // 2
    # mtime: the same bytes every time, for they are in the names of tests.
    return gzip.compress(content[:half], mtime=0) + gzip.compress(content[half:], mtime=0)


def zst(content: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(content) // 2
    return b"".join(
        zstandard.ZstdCompressor().compress(c) for c in (content[:half], content[half:])
    )


def write_table(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows = [document or None for document in DOCUMENTS]  # null: an empty document
    table = pyarrow.table({"id": range(len(rows)), "text": rows})
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)
        return
    new = pyarrow.ipc.new_stream if "stream" in path.name else pyarrow.ipc.new_file
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_saved_dataset(path: Path) -> None:
    """As datasets.save_to_disk does."""
    path.mkdir()
    write_table(path / "data-00000-of-00001.stream.arrow")
    state = {"_data_files": [{"filename": "data-00000-of-00001.stream.arrow"}]}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


FORMATS: dict[str, Callable[[Path], bytes | None]] = {
    "a.txt": as_text,
    "a.txt.gz": lambda path: gz(as_text(path)),
    "a.md.zst": lambda path: zst(as_text(path)),
    "a.jsonl": as_jsonl,
    "a.ndjson": as_jsonl,
    "a.json": as_jsonl,
    "c4.00000-of-00001.json.gz": lambda path: gz(as_jsonl(path)),
    "a.jsonl.gz": lambda path: gz(as_jsonl(path)),
    "A.JSONL.ZST": lambda path: zst(as_jsonl(path)),
    "a.parquet": write_table,
    "a.stream.arrow": write_table,
    "a.arrow": write_table,
    "saved": write_saved_dataset,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents(tmp_path, name):
    path = tmp_path / name
    if (content := FORMATS[name](path)) is not None:
        path.write_bytes(content)
    tokenizer = bytes_tokenizer(tmp_path / "t.json")
    files = find_text_files([path])
    prepare(files, tmp_path / "out", tokenizer=tokenizer, val_fraction=0.2, log=quiet)
    found = [decoded_documents(tmp_path / "out", split) for split in ("train", "val")]
    assert all(found) and sorted([*found[0], *found[1]]) == sorted(DOCUMENTS)
    # The progress of reading ends at the size on the disk.
    counted: list[int] = []
    for _ in read_documents(files[0], counted.append):
        pass
    assert sum(counted) == files[0].path.stat().st_size


def test_directories_are_searched_for_all_of_them(tmp_path):
    names = ["a.txt", "b.txt.gz", "c/d.jsonl", "c/e.JSONL.zst", "f.parquet", "k.ndjson"]
    hidden = ["._a.txt", ".git/HEAD", ".ipynb_checkpoints/a.txt", "c/.d/e.jsonl.gz", ".DS_Store"]
    place = tmp_path / ".hidden" / "place"  # what is above the directory does not count
    write_files(place, {name: "x" for name in [*names, *hidden, "g.md", "h.arrow", "i.gz"]})
    lines: list[str] = []
    assert [file.name for file in find_text_files([place], log=lines.append)] == names
    kinds = "hidden .txt, hidden .jsonl.gz, .md, .arrow, .gz"
    assert lines == [f"{place}: left out: 6 files ({kinds})"]
    with pytest.raises(DataError, match=r"only: hidden ones aside, no \*\.txt"):
        find_text_files([write_files(tmp_path / "only", {".a.txt": "x"})])
    assert len(find_text_files([tmp_path / "only" / ".a.txt"])) == 1  # named itself


def test_a_damaged_json_that_nobody_named_is_left_out(tmp_path):
    write_files(tmp_path, {"a.txt": "x"})
    (tmp_path / "meta.json.gz").write_bytes(b"no gzip")
    lines: list[str] = []
    assert [f.name for f in find_text_files([tmp_path], log=lines.append)] == ["a.txt"]
    assert lines == [f"{tmp_path}: left out: 1 file (.json.gz)"]


def test_a_directory_takes_json_that_holds_records(tmp_path):
    record = '{"text": "x"}\n{"text": "y"}\n'
    write_files(tmp_path, {"a.json": record, "about.json": '{"name": "x"}', "list.json": "[1]"})
    write_files(tmp_path, {"empty.json": "", ".cache/a.json": record, ".cache/b.lock": ""})
    write_files(tmp_path, {"vocab.json": '{"text": 5239, "the": 1}', "null.json": '{"text": null}'})
    (tmp_path / "b.json.gz").write_bytes(gz(record.encode()))
    (tmp_path / "c.csv.gz").write_bytes(b"")
    (tmp_path / "README").write_bytes(b"")
    lines: list[str] = []
    found = find_text_files([tmp_path], log=lines.append)
    assert [file.name for file in found] == ["a.json", "b.json.gz", "null.json"]
    assert lines == [f"{tmp_path}: left out: 6 files (.json, no ending, .csv.gz)"]
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.json").write_text(record)
    assert find_text_files([tmp_path / "only"], log=lines.append) and len(lines) == 1
    with pytest.raises(DataError, match=r"no \*\.json of lines with the field 'body'; name"):
        find_text_files([tmp_path / "only"], text_key="body")


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y"}\n',
            "a.jsonl, line 2: has no field 'text', only",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", b'["x"]\n', "a.jsonl, line 1: holds ['x'], no JSON object"),
        ("a.json", b'[{"text": "x"}]', "a.json: its first line is no JSON object; of a list of"),
        ("a.json", b'{\n "text": "x"\n}', "jq -c '.[]' FILE > a.jsonl makes JSON lines"),
        ("a.json", b'{"text": "x"}\n[]\n', "a.json, line 2: holds [], no JSON object"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: 'text' is 3, no text; --text-key"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', "document 1 (from 0) holds half"),
        ("a.txt.gz", gz(b"text\n" * 999)[:-9], "a.txt.gz: damaged or incomplete .gz file"),
        ("a.txt.gz", b"text\n" * 999, "a.txt.gz: damaged or incomplete .gz file"),
        ("a.zst", b"text\n" * 999, "a.zst: damaged or incomplete .zst file"),
        ("a.jsonl.bz2", b"BZh91AY&SY\xe5", "a.jsonl.bz2: .bz2 is not read, only .gz and .zst; de"),
        ("a.txt.xz", b"\xfd7zXZ\x00", "a.txt.xz: .xz is not read, only .gz and .zst; decompress"),
        ("a.parquet", b"text\n" * 999, "a.parquet: cannot be read"),
        ("a.arrow", b"text\n" * 999, "a.arrow: cannot be read"),
        ("a.parquet.gz", b"x", "a.parquet.gz: a table is read at many places; decompress"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    for suffix, package in ((".zst", "zstandard"), (".parquet", "pyarrow"), (".arrow", "pyarrow")):
        if suffix in name:
            pytest.importorskip(package)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        prepare(find_text_files([tmp_path / name]), tmp_path / "out", vocab_size=300, log=quiet)
    assert message in str(error.value)


def test_a_cut_zst_file_is_not_taken_for_a_short_one(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(zst("".join(DOCUMENTS).encode())[:-5])
    with pytest.raises(DataError, match=r"a\.txt\.zst: damaged or incomplete"):
        list(read_documents(TextFile(tmp_path / "a.txt.zst", "a")))


@pytest.mark.parametrize("window_log", [28, 31])
def test_a_zst_file_of_a_long_window_is_read(tmp_path, window_log):
    """zstd --long=31: the library refuses windows over 128 MiB unless it is told otherwise."""
    zstandard = pytest.importorskip("zstandard")
    # Bytes, not the compressor, which takes as much memory: magic number, a frame header of the
    # window alone, one raw and last block.
    block = b"text"
    size = (len(block) << 3 | 1).to_bytes(3, "little")
    frame = b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + size + block
    assert zstandard.get_frame_parameters(frame).window_size == 1 << window_log
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert [p.text for p in read_documents(TextFile(tmp_path / "a.txt.zst", "a"))] == ["text"]


@pytest.mark.parametrize("name, content", [("a.json", b""), ("a.json.gz", gz(b""))])
def test_an_empty_json_file_has_no_document(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert list(read_documents(TextFile(tmp_path / name, name))) == []


def test_text_key(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["one", "two"]}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"body": "three", "text": "no"}\n')
    files = find_text_files([tmp_path], text_key="body")
    texts = [piece.text for file in files for piece in read_documents(file)]
    assert texts == ["one", "two", "three"]
    with pytest.raises(DataError, match=r"a\.parquet: has no field 'text', only 'body'"):
        list(read_documents(TextFile(tmp_path / "a.parquet", "a")))


def test_a_saved_dataset_of_several_splits_is_not_mixed(tmp_path):
    write_files(tmp_path, {f"d/{name}/state.json": "{}" for name in ("train", "test")})
    write_files(tmp_path, {"d/dataset_dict.json": '{"splits": ["train", "test"]}'})
    with pytest.raises(DataError, match=r"of the splits test, train; .* such as .*train$"):
        find_text_files([tmp_path / "d"])
    with pytest.raises(DataError, match=r"state\.json: not a dataset of datasets\.save_to_disk"):
        find_text_files([tmp_path / "d" / "train"])


@pytest.mark.parametrize("name, package", [("a.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs {package}; install it: pip install 'fastlm\[data"):
        list(read_documents(TextFile(tmp_path / name, "a")))


# Tokenizers


def gpt2_files(monkeypatch) -> dict[str, bytes]:
    """A small tokenizer of GPT-2's kind, in the place of its files."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "th", "the", "Ġthe", END_OF_TEXT])}
    files = {
        "vocab": json.dumps(vocab).encode(),
        "merges": "#version: 0.2\nt h\nth e\nĠ the\n".encode(),
    }
    known = {
        name: (hashlib.sha256(content).hexdigest(), tokenizer_module._GPT2_FILES[name][1])
        for name, content in files.items()
    }
    monkeypatch.setattr(tokenizer_module, "_GPT2_FILES", known)
    return files


@pytest.mark.parametrize("place", ["tiktoken", "hub", "directory"])
def test_gpt2_from_what_is_there(tmp_path, monkeypatch, place):
    files = gpt2_files(monkeypatch)
    empty = tmp_path / "empty"
    environ = {"TIKTOKEN_CACHE_DIR": empty, "HF_HOME": empty}
    name: str | Path = "gpt2"
    if place == "tiktoken":
        environ["TIKTOKEN_CACHE_DIR"] = tmp_path
        names = {key: name for key, (_, name) in tokenizer_module._GPT2_FILES.items()}
    else:
        names = {"vocab": "vocab.json", "merges": "merges.txt"}
        folder = "hub/models--openai-community--gpt2/snapshots/0"
        if place == "hub":
            environ["HF_HOME"] = tmp_path
            names = {key: f"{folder}/{name}" for key, name in names.items()}
        else:
            name = tmp_path
    for variable, value in environ.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    for key, content in files.items():
        (tmp_path / names[key]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / names[key]).write_bytes(content)
    tokenizer = load_tokenizer(name)
    assert end_of_text_id(tokenizer, name) == 259
    assert encode_batch(tokenizer, ["the the"]) == [[257, 258]]
    marker = encode_batch(tokenizer, [END_OF_TEXT])[0]
    assert 259 not in marker and tokenizer.decode(marker) == END_OF_TEXT

    if place == "tiktoken":  # a cache that was damaged is not taken
        (tmp_path / names["vocab"]).write_bytes(files["vocab"] + b" ")
        with pytest.raises(DataError, match=r"gpt2: GPT-2's files are not in .*not downloaded"):
            load_tokenizer("gpt2")


def test_gpt2_is_tiktokens():
    """With GPT-2's real files, where they are."""
    tiktoken = pytest.importorskip("tiktoken")
    try:
        tokenizer = load_tokenizer("gpt2")
    except DataError as error:
        pytest.skip(str(error))
    text = Path(__file__).read_text() + "naïve — 東京 🙂 <|endoftext|> \r\n  \t x   "
    expected = tiktoken.get_encoding("gpt2").encode(text, disallowed_special=())
    assert encode_batch(tokenizer, [text]) == [expected]


@pytest.mark.parametrize("as_object", [False, True])
def test_the_end_of_text_of_a_published_tokenizer(tmp_path, as_object):
    """Llama's and others' directories name it in tokenizer_config.json."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(DataError, match=r"has no <\|endoftext\|> token, which ends every"):
            end_of_text_id(load_tokenizer(name), name)
    eos = {"content": "</s>"} if as_object else "</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    (tmp_path / "a.txt").write_text("a a a a")
    out = tmp_path / "out"
    manifest = prepare(find_text_files([tmp_path / "a.txt"]), out, tokenizer=tmp_path, log=quiet)
    assert manifest.end_of_text == 1


@pytest.mark.parametrize("token", [END_OF_TEXT, "</s>"])
def test_the_end_of_a_document_in_a_text_is_text(tmp_path, token):
    """Also that of a tokenizer which does not say that it is special."""
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer(tmp_path / "t.json", end_of_text=None)))
    tokenizer.add_tokens([AddedToken(token, special=False, rstrip=True)])
    tokenizer.save(str(tmp_path / "t.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    texts = [f"{i} {token} not the end" for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    files = find_text_files([tmp_path / "a.jsonl"])
    manifest = prepare(files, tmp_path / "out", tokenizer=tmp_path / "t.json", log=quiet)
    assert manifest.end_of_text == tokenizer.token_to_id(token)
    found = [decoded_documents(tmp_path / "out", split) for split in ("train", "val")]
    assert sorted([*found[0], *found[1]]) == texts


def test_a_directory_without_a_tokenizer_says_what_it_lacks(tmp_path):
    with pytest.raises(DataError, match=r"holds neither tokenizer\.json nor vocab\.json"):
        load_tokenizer(tmp_path)
