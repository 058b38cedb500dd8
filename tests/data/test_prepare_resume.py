"""fastlm.prepare goes on where a stopped process was, and encodes in several processes."""

import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from command_server import commands
from prepared_data import bytes_tokenizer, quiet, write_files
from tokenizers import Tokenizer, normalizers

from fastlm import prepare as prepare_module
from fastlm.data import encoding
from fastlm.data.manifest import Manifest
from fastlm.data.text import END_OF_TEXT, find_text_files
from fastlm.errors import DataError
from fastlm.prepare import prepare

TEXTS = {
    "a.txt": END_OF_TEXT.join(f"document {i} of the first file\n" * 9 for i in range(40)),
    "b.jsonl": "".join(f'{{"text": "record {i} of the second"}}\n' for i in range(60)),
    "c.txt": "the third file\n" * 9_000,  # several pieces
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with texts in `in`; progress is saved after each small batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 2_000)
    monkeypatch.setattr(prepare_module, "SAVE_SECONDS", 0.0)
    write_files(tmp_path / "in", TEXTS)
    return tmp_path


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Stop:
    """Raises at the so-manieth call of what it stands in for; counts the calls."""

    def __init__(self, genuine, at: int | None = None, error=KeyboardInterrupt):
        self.genuine, self.at, self.error, self.calls = genuine, at, error, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return self.genuine(*arguments, **options)


@pytest.mark.parametrize("shard_tokens", [700, 10_000_000])
def test_stopped_again_and_again_it_makes_the_same(place, monkeypatch, shard_tokens):
    files = find_text_files(["in"])
    options = dict(vocab_size=300, val_fraction=0.3, shard_tokens=shard_tokens)
    prepare(files, "whole", **options, log=quiet)
    expected = content(place / "whole")
    encoded = Stop(encoding.encode)
    monkeypatch.setattr(encoding, "encode", encoded)
    prepare(files, "uninterrupted", **options, log=quiet)
    batches, stops = encoded.calls, 0
    trained = Stop(prepare_module.train_tokenizer)
    monkeypatch.setattr(prepare_module, "train_tokenizer", trained)
    lines: list[str] = []
    while True:
        # Each attempt encodes two batches, and is killed in the third.
        encoded = Stop(encoded.genuine, at=3)
        monkeypatch.setattr(encoding, "encode", encoded)
        try:
            prepare(files, "out", **options, log=lines.append)
            break
        except KeyboardInterrupt:
            stops += 1
            assert not (place / "out").exists()
            assert len(list(place.glob(".out.partial-*"))) == 1
    assert stops == (batches - 1) // 2 > 4
    assert trained.calls == 1
    assert lines.count("stopped; the same command goes on from here") == stops
    assert any(line.startswith("going on: ") for line in lines)
    assert content(place / "out") == expected
    assert sorted(os.listdir(place)) == ["in", "out", "uninterrupted", "whole"]


def test_stopped_before_the_first_token_it_reads_the_input_once(place, monkeypatch):
    surveyed = Stop(prepare_module.survey)
    monkeypatch.setattr(prepare_module, "survey", surveyed)
    genuine = prepare_module.train_tokenizer
    monkeypatch.setattr(prepare_module, "train_tokenizer", Stop(genuine, at=1, error=SystemExit))
    with pytest.raises(SystemExit):
        prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)
    prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)
    assert surveyed.calls == 1


@pytest.mark.parametrize("change", ["settings", "input", "tokenizer", "damage"])
def test_another_command_begins_anew(place, monkeypatch, change):
    tokenizer = bytes_tokenizer(place / "t.json")
    options = dict(tokenizer=tokenizer, val_fraction=0.3)
    genuine = encoding.encode
    monkeypatch.setattr(encoding, "encode", Stop(genuine, at=9))
    with pytest.raises(KeyboardInterrupt):
        prepare(find_text_files(["in"]), "out", **options, log=quiet)
    monkeypatch.setattr(encoding, "encode", genuine)
    (left,) = place.glob(".out.partial-*")
    if change == "settings":
        options["val_fraction"] = 0.2
    elif change == "input":
        os.utime(place / "in/a.txt", ns=(1, 1))
    elif change == "tokenizer":
        bytes_tokenizer(place / "t.json", the=300)
    else:
        (left / "progress.json").write_bytes(b"{")
    lines: list[str] = []
    prepare(find_text_files(["in"]), "out", **options, log=lines.append)
    prepare(find_text_files(["in"]), "whole", **options, log=quiet)
    assert not any(line.startswith("going on") for line in lines)
    assert content(place / "out") == content(place / "whole")
    assert sorted(os.listdir(place)) == ["in", "out", "t.json", "whole"]


def test_an_error_leaves_nothing_to_go_on_with(place, monkeypatch):
    """Disk space, for one, comes back."""
    monkeypatch.setattr(encoding, "encode", Stop(encoding.encode, at=5, error=OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)
    assert os.listdir(place) == ["in"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_command_goes_on_after_a_signal(place, number):
    bytes_tokenizer(place / "t.json")
    argv = ["in", "--out", "out", "--tokenizer", "t.json"]
    command = commands().start(argv, place, call="command_programs:prepare_slowly")
    command.until_true(
        lambda: any(b'"place": [1' in p.read_bytes() for p in place.glob(".out.p*/progress.json"))
    )
    command.signal(number)
    result = command.wait()
    assert not (place / "out").exists()
    if number == signal.SIGTERM:
        assert result.returncode == 143
        assert "stopped; the same command goes on from here" in result.stdout
    lines: list[str] = []
    options = dict(tokenizer="t.json", log=lines.append)
    prepare(find_text_files(["in"]), "out", **options)
    assert any(line.startswith("going on: ") for line in lines)
    prepare(find_text_files(["in"]), "whole", **options)
    assert content(place / "out") == content(place / "whole")


def test_several_processes_write_the_same(place):
    files = find_text_files(["in"])
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer(place / "t.json")))
    tokenizer.normalizer = normalizers.Replace("record", "")  # of the second file alone
    tokenizer.save("t.json")
    lines: list[str] = []
    prepare(files, "one", tokenizer="t.json", log=quiet)
    prepare(files, "several", tokenizer="t.json", processes=2, log=lines.append)
    assert content(place / "one") == content(place / "several")
    assert any("does not give the text back" in line for line in lines)
    assert Manifest.load("several").splits["train"].documents > 80


def test_a_process_that_is_killed_is_an_error_with_a_fix(place, monkeypatch):
    def broken(*_):
        raise BrokenProcessPool

    monkeypatch.setattr(encoding.ProcessPoolExecutor, "submit", broken)
    with pytest.raises(DataError, match=r"one of 4 encoding processes was killed.*--processes 2"):
        prepare(find_text_files(["in"]), "out", vocab_size=300, processes=4, log=quiet)
    assert os.listdir(place) == ["in"]


def test_small_text_is_encoded_by_one_process(monkeypatch):
    monkeypatch.setattr(encoding, "_cores", lambda: 8)
    assert encoding.useful_processes(0) == encoding.useful_processes(100 << 20) == 1
    assert encoding.useful_processes(300 << 20) == 4
    assert encoding.useful_processes(1 << 40) == 8
