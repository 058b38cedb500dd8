"""fastlm/data/files.py: opening token files and checking them."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from prepared_data import seal

from fastlm import DataError, TokenDataset, load_token_dataset
from fastlm.data.dataset import TOKEN_DTYPES
from fastlm.data.files import check_dataset, open_data
from fastlm.data.loader import TrainLoader, all_batches, spread_batches
from fastlm.data.manifest import MANIFEST_NAME, Manifest, Shard, Split


def bin_file(path: Path, tokens, dtype: str = "uint16") -> Path:
    np.asarray(tokens, dtype=dtype).tofile(path)
    return path


def header_file(path: Path, tokens, magic: int, dtype: str, *, count: int | None = None) -> Path:
    """As llm.c and modded-nanogpt write it: 256 int32, the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype=dtype).tobytes())
    return path


def npy_file(path: Path, array) -> Path:
    np.save(path, array)
    return path


# One file


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_formats(dtype, mmap, tmp_path, capsys):
    tokens = np.arange(100, dtype=dtype)
    npy = npy_file(tmp_path / "t.npy", tokens)
    raw = bin_file(tmp_path / "t.bin", tokens, dtype)
    for path, options in ((npy, {}), (raw, {"dtype": dtype}), (str(raw), {"dtype": dtype})):
        array = load_token_dataset(path, mmap, **options)
        assert array.dtype == dtype and np.array_equal(array, tokens)
        assert isinstance(array, np.memmap) == mmap
        if mmap:
            assert not array.flags.writeable
        line = f"[load_token_dataset] Loaded {path}, shape=(100,), dtype={dtype}\n"
        assert capsys.readouterr().out == line


def test_a_raw_file_holds_uint16_unless_it_is_said(tmp_path):
    path = bin_file(tmp_path / "t.bin", range(10))
    assert load_token_dataset(path).tolist() == list(range(10))
    assert len(load_token_dataset(path, dtype="uint8")) == 20
    assert load_token_dataset(path, dtype="uint32")[0] == 1 << 16
    assert len(load_token_dataset(path, dtype=np.uint8)) == 20
    other = bin_file(tmp_path / "tokens.u8", range(10), "uint8")
    assert load_token_dataset(other, dtype="uint8").tolist() == list(range(10))


def test_a_raw_file_of_uint32_is_told(tmp_path):
    """Read as uint16 it would train, to a lower loss: every second token would be 0."""
    path = bin_file(tmp_path / "t.bin", [0] * 10 + [150_000, 700, 7] * 30, "uint32")
    with pytest.raises(DataError, match=r"as in a file of uint32; name its dtype .*uint32"):
        load_token_dataset(path)
    path = bin_file(tmp_path / "t.bin", range(100), "uint32")
    with pytest.raises(DataError, match=r"as in a file of uint32; name its dtype .*uint32"):
        load_token_dataset(path)
    assert load_token_dataset(path, dtype="uint32").tolist() == list(range(100))
    assert len(load_token_dataset(path, dtype="uint16")) == 200
    path = bin_file(tmp_path / "t.bin", range(100), "int64")
    with pytest.raises(DataError, match=r"as in a file of int64; name its dtype"):
        load_token_dataset(path)
    for tokens in ([0] * 200, [1, 2] * 100, [20, 2] * 30, [20, 2] * 99 + [20, 20]):
        assert load_token_dataset(bin_file(tmp_path / "t.bin", tokens)).tolist() == tokens


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("magic, dtype", [(20240520, "uint16"), (20240801, "uint32")])
def test_files_with_a_header(magic, dtype, mmap, tmp_path):
    path = header_file(tmp_path / "t.bin", range(70), magic, dtype)
    for options in ({}, {"dtype": dtype}):
        array = load_token_dataset(path, mmap, **options)
        assert array.dtype == dtype and array.tolist() == list(range(70))
    # Another magic number is no header: the file holds tokens from its first byte on.
    raw = header_file(tmp_path / "raw.bin", range(70), magic + 1, "uint16")
    assert len(load_token_dataset(raw)) == 512 + 70


def test_a_damaged_header_file(tmp_path):
    # Read as raw tokens, the header would be trained on.
    for count in (69, 71, 0, -1):
        path = header_file(tmp_path / f"{count}.bin", range(70), 20240520, "uint16", count=count)
        message = rf"{path}: its header says {count} tokens of uint16, .* file has 1164; .*copy it"
        with pytest.raises(DataError, match=message):
            load_token_dataset(path)
    path = header_file(tmp_path / "empty.bin", [], 20240520, "uint16")
    with pytest.raises(DataError, match="is empty"):
        load_token_dataset(path)
    path = header_file(tmp_path / "other.bin", range(70), 20240520, "uint16")
    with pytest.raises(DataError, match="its header says uint16, not uint32"):
        load_token_dataset(path, dtype="uint32")


def bad_files(tmp_path):
    """(path, options, what the error says) of files that are no token files."""
    whole = npy_file(tmp_path / "whole.npy", np.arange(100, dtype=np.uint16)).read_bytes()

    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    np.savez(tmp_path / "archive.npz", a=np.arange(5))
    (tmp_path / "archive.npz").rename(tmp_path / "archive.npy")
    no_npy = "not a readable .npy file"
    return [
        (tmp_path / "missing.bin", {}, "no such token file"),
        (tmp_path / "missing.npy", {}, "no such token file"),
        (tmp_path / "whole.npy" / "below.bin", {}, "no such token file"),
        (tmp_path, {}, "is a directory; give a .npy or .bin token file"),
        (write("empty.bin", b""), {}, "is empty"),
        (write("empty.npy", b""), {}, "is empty"),
        (npy_file(tmp_path / "none.npy", np.empty(0, dtype=np.uint16)), {}, "is empty"),
        (write("odd.bin", b"abc"), {}, "3 bytes are no multiple of 2, the size of uint16; .*dtype"),
        (write("odd4.bin", b"abcdef"), {"dtype": "uint32"}, "6 bytes are no multiple of 4"),
        (write("good.bin", b"abcd"), {"dtype": "float32"}, "dtype='float32': token files hold"),
        (write("good.bin", b"abcd"), {"dtype": "uint9"}, "dtype='uint9': token files hold"),
        (write("text.txt", b"two letters are a token"), {}, "not a .npy or .bin .*fastlm.prepare"),
        (write("text.json", b"{'a': 'b'}"), {"dtype": "uint8"}, "not a .npy or .bin"),
        (write("tokens.u16", b"abcd"), {}, "raw tokens under another name give the dtype"),
        (write("text.npy", b"hello world, this is text"), {}, no_npy),
        (write("short.npy", whole[:3]), {}, no_npy),
        (write("header.npy", whole[:40]), {}, no_npy),
        (write("data.npy", whole[:-1]), {}, no_npy),
        (write("zip.npy", b"PK\x03\x04 and no more"), {}, no_npy),
        (tmp_path / "archive.npy", {}, no_npy),
        (npy_file(tmp_path / "object.npy", np.array([{}])), {}, "1-D array of object"),
        (npy_file(tmp_path / "float.npy", np.ones(3)), {}, "1-D array of float64; .*uint16"),
        (npy_file(tmp_path / "int16.npy", np.ones(3, dtype=np.int16)), {}, "1-D array of int16"),
        (npy_file(tmp_path / "big.npy", np.ones(3, dtype=">u2")), {}, "holds >u2; .*byte order"),
        (npy_file(tmp_path / "2d.npy", np.ones((2, 3), dtype=np.int64)), {}, "2-D array of int64"),
        (npy_file(tmp_path / "0d.npy", np.uint16(3)), {}, "0-D array of uint16"),
    ]  # fmt: skip


@pytest.mark.parametrize("mmap", [True, False])
def test_files_that_are_none(mmap, tmp_path, capsys):
    for path, options, message in bad_files(tmp_path):
        with pytest.raises(DataError) as caught:
            load_token_dataset(path, mmap, **options)
        text = str(caught.value)
        assert text.startswith(f"{path}: "), text
        assert re.search(message, text), text
        assert "\n" not in text and "unsafely" not in text
        with pytest.raises(DataError, match=re.escape(str(path))):
            open_data([str(path)], dtype=options.get("dtype"))
    assert "Loaded" not in capsys.readouterr().out


def refused(path: str) -> bool:
    """Does every way to open `path` say that it may not be read?"""
    for attempt in (load_token_dataset, lambda path: open_data([path])):
        try:
            attempt(path)
        except DataError as error:
            if f"{path}: cannot be read (Permission denied)" not in str(error):
                return False
        else:
            return False
    return True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_files_that_may_not_be_read(tmp_path):
    # Root may read everything, so a child becomes somebody else first. It works from within
    # tmp_path, whose parents are closed to others.
    tmp_path.chmod(0o755)
    bin_file(tmp_path / "locked.bin", range(10)).chmod(0o000)
    secret = tmp_path / "secret"
    secret.mkdir()
    bin_file(secret / "train.bin", range(10))
    secret.chmod(0o000)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.chdir(tmp_path)
            if os.getuid() == 0:
                os.setuid(65534)
            if refused("locked.bin") and refused("secret/train.bin"):
                try:
                    open_data(["secret"])
                except DataError as error:
                    code = "secret: cannot be read (Permission denied)" not in str(error)
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    secret.chmod(0o700)
    assert os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs mkfifo()")
def test_a_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "t.bin")  # to open it would wait for a writer
    with pytest.raises(DataError, match=r"t\.bin: not a regular file"):
        load_token_dataset(tmp_path / "t.bin")


@pytest.mark.parametrize("suffix", ["npy", "bin"])
def test_a_file_cut_while_it_is_mapped(suffix, tmp_path):
    """Named before it is read: where the file no longer is, reading ends the process (SIGBUS)."""
    tokens = np.zeros(100_000, dtype=np.uint16)
    path = tmp_path / f"t.{suffix}"
    npy_file(path, tokens) if suffix == "npy" else bin_file(path, tokens)
    other = bin_file(tmp_path / "other.bin", tokens)
    data = open_data([str(other), str(path)])
    loader = TrainLoader(data.train, 4, 16, seed=0)
    loader.batch(0)
    size = path.stat().st_size
    with open(path, "ab") as file:  # to grow does no harm
        file.write(b"\0" * 64)
    loader.batch(4)
    os.truncate(path, 5000)
    message = rf"^{path}: was cut from {size} to 5000 bytes while it was in use"
    for read in (
        lambda: loader.batch(8),
        lambda: list(spread_batches(data.val, 4, 16, 2, "cpu")),
        lambda: list(all_batches(data.val, 4, 16, "cpu")),
        lambda: check_dataset(data.train, "training", context_len=16, vocab_size=1),
        lambda: data.fingerprint,
    ):
        with pytest.raises(DataError, match=message):
            read()
    copied = TokenDataset([np.array(tokens)])
    copied.check_files()  # nothing is mapped: nothing to lose


# The scan of the token ids


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_id_outside_the_vocabulary(split, tmp_path):
    first = bin_file(tmp_path / "a.bin", np.zeros(70_000))
    tokens = np.zeros(80_000, dtype=np.uint16)
    position = 66_000 if split == "train" else 79_990
    tokens[position] = 1000
    second = bin_file(tmp_path / "b.bin", tokens)
    data = open_data([str(first), str(second)])  # the last 5 % are held out
    assert len(data.train) == 142_500 and len(data.val) == 7_500
    wrong, right = (data.train, data.val) if split == "train" else (data.val, data.train)
    check_dataset(right, "the other", context_len=8, vocab_size=1000)
    check_dataset(wrong, split, context_len=8, vocab_size=1001)
    message = rf"^{second}: token id 1000 at offset {position} is outside .* 1000; .*--vocab-size"
    with pytest.raises(DataError, match=message):
        check_dataset(wrong, split, context_len=8, vocab_size=1000)


def test_a_negative_id(tmp_path):
    path = npy_file(tmp_path / "t.npy", np.array([1, 2, -3, 4], dtype=np.int64))
    dataset = TokenDataset([load_token_dataset(path)], [path])
    with pytest.raises(DataError, match="token id -3 at offset 2 is outside"):
        check_dataset(dataset, "train", context_len=2, vocab_size=50304)


def test_too_short_for_a_window(tmp_path):
    path = bin_file(tmp_path / "t.bin", range(9))
    dataset = TokenDataset([load_token_dataset(path)], [path])
    check_dataset(dataset, "train", context_len=8, vocab_size=9)
    message = rf"train data \({path}\) holds 9 tokens; context_len=9 needs at least 10"
    with pytest.raises(DataError, match=message):
        check_dataset(dataset, "train", context_len=9, vocab_size=9)


# What --data may name


def test_one_file_is_split(tmp_path, capsys):
    path = bin_file(tmp_path / "t.bin", range(1000))
    data = open_data([str(path)])
    assert data.train.segments[0].tolist() == list(range(950))
    assert data.val.segments[0].tolist() == list(range(950, 1000))
    assert data.manifest is None and data.val_bytes is None and data.tokenizer_json is None
    assert "the last 50 of 1,000 tokens are held out" in capsys.readouterr().out
    assert len(open_data([str(path)], val_fraction=0.5).val) == 500


def test_files_of_ones_own_for_validation(tmp_path):
    files = [str(bin_file(tmp_path / f"{name}.bin", range(10))) for name in "abc"]
    data = open_data(files[:2], files[2:])
    assert len(data.train) == 20 and len(data.val) == 10
    assert data.train.paths == files[:2] and data.val.paths == files[2:]


def test_files_of_two_dtypes(tmp_path):
    first = bin_file(tmp_path / "a.bin", range(10))
    second = npy_file(tmp_path / "b.npy", np.arange(10, dtype=np.uint32))
    with pytest.raises(DataError, match="one dtype, got uint16 and uint32"):
        open_data([str(first), str(second)])


def test_a_directory_of_train_and_val_files(tmp_path):
    for index in (7, 2, 9, 0, 3, 8, 5, 1, 6, 4):  # no order that a file system lists them in
        bin_file(tmp_path / f"fineweb_train_00000{index}.bin", [index])
    (tmp_path / "train.txt").write_text("no token file")
    data = open_data([str(tmp_path)], val_fraction=0.5)  # without val files, the end is held out
    assert np.concatenate(data.train.segments).tolist() == [0, 1, 2, 3, 4]
    assert np.concatenate(data.val.segments).tolist() == [5, 6, 7, 8, 9]
    bin_file(tmp_path / "fineweb_val_000000.bin", [9])
    data = open_data([str(tmp_path)])
    assert np.concatenate(data.train.segments).tolist() == list(range(10))
    assert np.concatenate(data.val.segments).tolist() == [9]
    other = bin_file(tmp_path / "mine.bin", [7, 7])
    assert open_data([str(tmp_path)], [str(other)]).val.segments[0].tolist() == [7, 7]


def test_directories_that_hold_no_data(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: holds neither manifest.json nor train\*"):
        open_data([str(tmp_path)])
    path = bin_file(tmp_path / "val.bin", range(10))
    with pytest.raises(DataError, match="nor train"):
        open_data([str(tmp_path)])
    with pytest.raises(DataError, match="give one directory, or files"):
        open_data([str(tmp_path), str(path)])
    with pytest.raises(DataError, match="is a directory"):
        open_data([str(path), str(tmp_path)])
    with pytest.raises(DataError, match="no data is given"):
        open_data([])


def prepared(directory: Path, dtype: str = "uint16") -> Manifest:
    """A directory as fastlm.prepare leaves it: two train shards, one val shard."""
    shards = {}
    for name, content in (("train_00000", [1, 2, 3]), ("train_00001", [4]), ("val_00000", [5, 6])):
        bin_file(directory / f"{name}.bin", content, dtype)
        shards[name] = Shard(f"{name}.bin", len(content), sha256="")
    manifest = Manifest(
        vocab_size=300,
        dtype=dtype,
        splits={
            "train": Split(4, 40, 1, [shards["train_00000"], shards["train_00001"]]),
            "val": Split(2, 17, 1, [shards["val_00000"]]),
        },
        tokenizer="tokenizer.json",
    )
    (directory / "tokenizer.json").write_text("{}")
    return seal(directory, manifest)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_prepared_directory(dtype, tmp_path):
    manifest = prepared(tmp_path, dtype)
    bin_file(tmp_path / "train_00002.bin", [99])  # not listed, not read
    # The manifest knows the dtype; --data-dtype is for files without one.
    for options in ({}, {"dtype": "uint8"}):
        data = open_data([str(tmp_path)], **options)
        assert data.train.dtype == dtype
        assert np.concatenate(data.train.segments).tolist() == [1, 2, 3, 4]
        assert data.val.segments[0].tolist() == [5, 6]
        assert data.manifest == manifest and data.val_bytes == 17
        assert data.tokenizer_json == "{}" and data.fingerprint == manifest.fingerprint


@pytest.mark.parametrize("name", ["", "news="])
@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_prepared_directory_with_other_validation_files(dtype, name, tmp_path):
    # The tokenizer and the vocabulary stay; the number of bytes is not that of these files.
    prepared(tmp_path, dtype)
    other = bin_file(tmp_path / "other.bin", [7, 7, 7], dtype)
    for paths in ([str(tmp_path)], [f"{tmp_path}:1"]):
        data = open_data(paths, [f"{name}{other}"])
        assert data.val.segments[0].tolist() == [7, 7, 7]
        assert [part.dtype for part in data.val_sets.values()] == [dtype] * bool(name)
        assert data.manifest.vocab_size == 300 and data.tokenizer_json == "{}"
        assert data.val_bytes is None
    wide = bin_file(tmp_path / "wide.bin", [7], "int64")
    data = open_data([str(tmp_path)], [f"{name}{wide}"], dtype="int64")  # what one says comes first
    assert data.val.segments[0].tolist() == [7]


def edited(directory: Path, old: str, new: str) -> None:
    path = directory / MANIFEST_NAME
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: (d / "val_00000.bin").unlink(), "val_00000.bin: no such token file"),
        (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: is missing"),
        (lambda d: bin_file(d / "val_00000.bin", [1]), "val_00000.bin: holds 1 tok.* says 2"),
        (
            lambda d: bin_file(d / "train_00001.bin", [4, 4]),
            "_00001.bin: holds 2 tok.* says 1",
        ),
        (lambda d: (d / MANIFEST_NAME).write_text("{"), "not a readable manifest"),
        (lambda d: (d / MANIFEST_NAME).write_text("[]"), "not a readable manifest"),
        (lambda d: (d / MANIFEST_NAME).write_bytes(b"\xff\xfe"), "not a readable manifest"),
        (lambda d: edited(d, '"version": 1', '"version": 2'), "this fastlm reads"),
        (lambda d: edited(d, '"fastlm-tokens"', '"others"'), "this fastlm reads"),
        (lambda d: edited(d, '"vocab_size"', '"vocabulary"'), "not a readable manifest"),
        (lambda d: edited(d, '"val": {', '"test": {'), "has no val split"),
        (lambda d: edited(d, '"train": {', '"test": {'), "has no train split"),
        (lambda d: edited(d, '"uint16"', '"float32"'), "dtype='float32'"),
    ],
)
def test_a_damaged_prepared_directory(damage, message, tmp_path):
    prepared(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        open_data([str(tmp_path)])
    assert str(tmp_path) in str(caught.value)
