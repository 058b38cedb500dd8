"""fastlm/data/fingerprint.py: which data this is, and whether shards hold what was prepared."""

import hashlib
import json
import os
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from training_runs import write_prepared

from fastlm import DataError, TokenDataset
from fastlm.data import fingerprint as module
from fastlm.data.dataset import as_dataset
from fastlm.data.files import Data, open_data
from fastlm.data.fingerprint import VERIFIED_NAME, sampled_sha256
from fastlm.data.manifest import Manifest


@pytest.fixture
def directory(tmp_path, monkeypatch) -> Path:
    """A prepared directory, and a cache of the user's that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_prepared(tmp_path / "data")


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files whose content is hashed."""
    names, genuine = [], module._file_sha256

    def counted(path, on_bytes):
        names.append(path.name)
        return genuine(path, on_bytes)

    monkeypatch.setattr(module, "_file_sha256", counted)
    return names


def flip(path: Path, offset: int) -> None:
    """One bit, at equal size; the modification time moves as it does for every write."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    stamp = path.stat().st_mtime_ns + 1_000_000
    path.write_bytes(content)
    os.utime(path, ns=(stamp, stamp))


# Raw tokens


def test_every_small_difference_shows():
    tokens = np.arange(1000, dtype=np.uint16)
    first = sampled_sha256(as_dataset(tokens))
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert first == sampled_sha256(as_dataset(tokens.copy()))
    for position in (0, 1, 499, 998, 999):
        other = tokens.copy()
        other[position] ^= 1
        assert sampled_sha256(as_dataset(other)) != first
    assert sampled_sha256(as_dataset(tokens[:-1])) != first
    assert sampled_sha256(as_dataset(tokens.view(np.uint8))) != first  # the same bytes
    assert sampled_sha256(as_dataset(tokens.astype(np.int64))) != first


def test_large_data_is_sampled(monkeypatch):
    """Both ends of every file always count, the rest where the samples fall: the same places for
    the same size."""
    unit = 1 << 12
    monkeypatch.setattr(module, "_MIB", unit)
    size = 200 * unit
    tokens = np.zeros(size, dtype=np.uint8)
    files = [tokens[: 70 * unit], tokens[70 * unit :]]
    first = sampled_sha256(TokenDataset(files))
    assert first == sampled_sha256(TokenDataset(files))

    def differs(place):
        tokens[place] = 1
        changed = sampled_sha256(TokenDataset(files)) != first
        tokens[place] = 0
        return changed

    assert all(map(differs, (0, 70 * unit - 1, 70 * unit, size - 1)))
    anywhere = np.random.default_rng(0).integers(0, size, 100).tolist()
    assert 20 <= sum(map(differs, anywhere)) <= 40  # 68 of 200 units, with some of them overlapping


def raw(tmp_path: Path, name: str, tokens) -> str:
    np.asarray(tokens, dtype=np.uint16).tofile(tmp_path / name)
    return str(tmp_path / name)


def test_a_raw_files_fingerprint_is_that_of_its_content(tmp_path):
    tokens = np.arange(1000) % 50
    train, val = raw(tmp_path, "train.bin", tokens), raw(tmp_path, "val.bin", tokens[:100])
    first = open_data([train], [val]).fingerprint
    assert open_data([train], [val]).fingerprint == first
    changed = tokens.copy()
    changed[500] = 7
    # Swapped at equal length and dtype: training, or validation.
    other = open_data([raw(tmp_path, "t2.bin", changed)], [val]).fingerprint
    assert other != first and other.split("-")[1] == first.split("-")[1]
    other = open_data([train], [raw(tmp_path, "v2.bin", tokens[1:101])]).fingerprint
    assert other != first and other.split("-")[0] == first.split("-")[0]
    # A file's name is not its content, and arrays in memory are told by theirs.
    assert open_data([raw(tmp_path, "t3.bin", tokens)], [val]).fingerprint == first
    arrays = [as_dataset(part.astype(np.uint16)) for part in (tokens, tokens[:100])]
    assert Data(*arrays).fingerprint == first


# Prepared data


def test_other_validation_files_have_another_fingerprint(directory, tmp_path):
    own = open_data([str(directory)])
    assert own.fingerprint == Manifest.load(directory).fingerprint
    val = raw(tmp_path, "v.bin", range(100))
    other = open_data([str(directory)], [val])
    assert other.fingerprint.startswith(own.fingerprint + "-")


def test_shards_are_read_once(directory, read):
    for _ in range(3):
        open_data([str(directory)])
    assert sorted(read) == ["train_00000.bin", "val_00000.bin"]
    read.clear()
    os.utime(directory / "val_00000.bin")  # copied, or written with the same
    open_data([str(directory)])
    assert read == ["val_00000.bin"]
    open_data([str(directory)])
    assert len(read) == 1


@pytest.mark.parametrize("name", ["train_00000.bin", "val_00000.bin"])
@pytest.mark.parametrize("seen_before", [False, True])
def test_a_shard_that_contradicts_its_manifest_is_named(directory, name, seen_before):
    if seen_before:
        open_data([str(directory)])
    flip(directory / name, 20)
    message = rf"^{directory}/{name}: its content is not what was prepared \(SHA-256 \w{{16}}…"
    for _ in range(2):  # the bad verdict is not kept for a good one
        with pytest.raises(DataError, match=message) as caught:
            open_data([str(directory)])
        assert "\n" not in str(caught.value)
    flip(directory / name, 20)
    open_data([str(directory)])


def test_a_changed_tokenizer_or_manifest_is_found(directory):
    path = directory / "tokenizer.json"
    text = path.read_text()
    path.write_text(text + " ")
    with pytest.raises(DataError, match=r"tokenizer\.json is not the one .* or manifest\.json was"):
        open_data([str(directory)])
    path.write_text(text)
    # A shard swapped together with its hash: the fingerprint tells.
    flip(directory / "train_00000.bin", 4)
    manifest = Manifest.load(directory)
    content = (directory / "train_00000.bin").read_bytes()
    manifest.splits["train"].shards[0].sha256 = hashlib.sha256(content).hexdigest()
    manifest.save(directory)
    with pytest.raises(DataError, match="the fingerprint is another"):
        open_data([str(directory)])


def test_a_file_in_the_cache_that_is_not_ours_is_no_verdict(directory, read):
    for content in ("", "{", "[]", "17", '{"train_00000.bin": 3}', "[" * 100_000, "\xff"):
        read.clear()
        (directory / VERIFIED_NAME).write_text(content, encoding="latin-1")
        open_data([str(directory)])
        assert len(read) == 2
    assert json.loads((directory / VERIFIED_NAME).read_text()).keys() == set(read)


def test_verdicts_of_a_read_only_directory_are_in_the_users_cache(
    directory, tmp_path, read, monkeypatch
):
    # Root may write anywhere, so the directory only says that it is read-only.
    genuine = Path.write_text

    def write_text(path, *arguments, **options):
        if path.parent == directory:
            raise OSError(30, "Read-only file system")
        return genuine(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    before = sorted(os.listdir(directory))
    for _ in range(2):
        open_data([str(directory)])
    assert len(read) == 2 and sorted(os.listdir(directory)) == before
    (verdict,) = (tmp_path / "cache" / "fastlm").iterdir()
    assert re.fullmatch(r"verified-[0-9a-f]{16}\.json", verdict.name)
    # With nowhere to write, the shards are read at every start.
    verdict.unlink()
    (tmp_path / "cache" / "fastlm").rmdir()
    (tmp_path / "cache" / "fastlm").write_bytes(b"")
    for _ in range(2):
        open_data([str(directory)])
    assert len(read) == 6


def test_a_long_verification_says_how_far_it_is(directory, monkeypatch, capsys):
    now = iter(range(0, 10_000, 11))
    monkeypatch.setattr("fastlm.data.progress.time.monotonic", lambda: next(now))
    open_data([str(directory)])
    lines = [line for line in capsys.readouterr().out.splitlines() if "SHA-256" in line]
    assert lines[0].startswith("[data] verifying the shards' SHA-256: 0.0 of 0.0 MB")
    assert lines[-1].startswith("[data] verifying the shards' SHA-256: 0.0 MB (")


def test_an_interruption_ends_the_other_threads(directory, monkeypatch):
    ended, begun = [], threading.Event()

    def hashing(path, on_bytes):
        if path.name.startswith("train"):
            begun.wait(5)
            raise KeyboardInterrupt
        begun.set()
        try:
            for _ in range(500):
                time.sleep(0.01)
                on_bytes(0)
        except InterruptedError:
            ended.append(path.name)
            raise

    monkeypatch.setattr(module, "_file_sha256", hashing)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(KeyboardInterrupt):
        open_data([str(directory)])
    assert ended == ["val_00000.bin"] and not (directory / VERIFIED_NAME).exists()
