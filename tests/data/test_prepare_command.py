"""python -m fastlm.prepare as a program: refusals, interruptions, memory."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_server import commands
from prepared_data import bytes_tokenizer, decoded_documents, quiet, write_files

from fastlm import prepare as prepare_module
from fastlm.data import encoding, staging
from fastlm.data.files import open_data
from fastlm.data.manifest import Manifest
from fastlm.data.text import END_OF_TEXT, find_text_files
from fastlm.data.tokenizer import train_tokenizer
from fastlm.errors import OutputError
from fastlm.prepare import main, prepare

ROOT = Path(__file__).resolve().parents[2]
TEXTS = {"a.txt": "some text\n" * 30, "b.txt": "other text\n" * 30}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with texts in `in`; the handler that main() installs is taken back."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path / "in", TEXTS)
    handler = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def everything(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


def test_command(place):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "fastlm.prepare"),
            *("in", "--out", "new/my data", "--vocab-size", "5000"),
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    manifest = Manifest.load(place / "new/my data")
    assert manifest.vocab_size < 5000
    assert f"vocabulary is {manifest.vocab_size:,} tokens, not the 5,000" in output
    for name, split in manifest.splits.items():
        assert f"{name}: {split.documents} documents, {split.bytes:,} bytes" in output
        assert f"{split.tokens / split.bytes:.3f} tokens per byte" in output
    assert f"fingerprint: {manifest.fingerprint}" in output
    assert output.endswith("next: python -m fastlm.train --data 'new/my data'\n")
    assert sorted(os.listdir(place / "new")) == ["my data"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("in --out o --vocab-size 256", "--vocab-size 256: it must be at least 257"),
        ("in --out o --vocab-size 300 --tokenizer t.json", "exclude each other"),
        ("in --out o --val-fraction 0", "--val-fraction 0.0: it must be between 0 and 1"),
        ("in --out o --val-fraction 1", "--val-fraction 1.0: it must be between"),
        ("in --out o --val-fraction nan", "--val-fraction nan"),
        ("in --out o --shard-tokens 0", "--shard-tokens 0"),
        ("--out o", "no input is given"),
        ("'' --out o", "empty string"),
        ("in nowhere.txt --out o", "nowhere.txt: no such file or directory"),
        ("in '*.nothing' --out o", "*.nothing: no file matches this glob"),
        ("empty_directory --out o", "empty_directory: hidden ones aside, no *.txt, *.jsonl"),
        ("in --out o --processes 0", "--processes 0: it must be at least 1"),
        ("empty.txt --out o", "holds no text: 1 file(s)"),
        ("one.txt --out o", "one document of 1 character"),
        ("pipe --out o", "pipe: not a regular file"),
        ("in latin.txt --out deep/er/o", "latin.txt: not UTF-8 text: byte 0xe9 at offset 3;"),
        ("in --out o --tokenizer nowhere.json", "--tokenizer nowhere.json: cannot be read"),
        ("in --out o --tokenizer in/a.txt", "--tokenizer in/a.txt: not a tokenizer"),
        ("in --out o --tokenizer no_end.json", f"no_end.json: has no {END_OF_TEXT} token"),
        ("in --out in", "--out in: holds 'a.txt', which is not prepared data"),
        ("in --out in --overwrite", "--out in: holds 'a.txt', which is not prepared data"),
        ("in --out one.txt", "--out one.txt: not a usable directory"),
        ("in --out one.txt/o", "--out one.txt/o: "),
    ],
)
def test_refusals(place, capsys, arguments, message):
    """Exit code 2, one line that names the value, and nothing left behind."""
    write_files(place, {"empty.txt": "", "one.txt": "x", "empty_directory/a.md": "x"})
    (place / "latin.txt").write_bytes(b"caf\xe9\n")
    os.mkfifo(place / "pipe")
    bytes_tokenizer(place / "t.json")
    bytes_tokenizer(place / "no_end.json", end_of_text=None)
    before = everything_but_pipes(place)
    assert main(shlex.split(arguments)) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1
    assert message in errors
    assert everything_but_pipes(place) == before


def everything_but_pipes(directory: Path) -> dict[str, bytes]:
    (directory / "pipe").unlink(missing_ok=True)
    found = everything(directory)
    os.mkfifo(directory / "pipe")
    return found


def test_refusals_of_the_program(place):
    result = commands().run(["nowhere.txt", "--out", "o"], place, call="fastlm.prepare:main")
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: nowhere\.txt: .+\n", result.stderr)


def test_overwrite(place):
    files = find_text_files(["in"])
    prepare(files, "out", vocab_size=300, log=quiet)
    first = everything(place / "out")

    with pytest.raises(OutputError, match="--overwrite"):
        prepare(files, "out", vocab_size=270, log=quiet)
    assert everything(place / "out") == first

    write_files(place / "in", {"c.txt": "a third\n" * 40})
    manifest = prepare(find_text_files(["in"]), "out", vocab_size=270, overwrite=True, log=quiet)
    assert sum(split.documents for split in manifest.splits.values()) == 3
    assert len(decoded_documents(place / "out", "train")) == manifest.splits["train"].documents

    (place / "out" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        prepare(files, "out", vocab_size=270, overwrite=True, log=quiet)
    assert (place / "out" / "notes.md").read_text() == "mine"
    assert sorted(os.listdir(place)) == ["in", "out"]

    # An empty directory is free, and a link stays a link.
    (place / "elsewhere").mkdir()
    (place / "link").symlink_to("elsewhere")
    prepare(files, "link", vocab_size=270, log=quiet)
    assert (place / "link").is_symlink() and (place / "elsewhere" / "manifest.json").exists()


def test_refused_before_any_reading(place, monkeypatch):
    prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)

    def survey(*_):
        raise AssertionError("the input was read")

    monkeypatch.setattr(prepare_module, "survey", survey)
    with pytest.raises(OutputError):
        prepare(find_text_files(["in"]), "out", log=quiet)
    with pytest.raises(OutputError):
        prepare(find_text_files(["in"]), "in/a.txt/out", log=quiet)


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
@pytest.mark.parametrize("where", ["survey", "train_tokenizer", "encode_batch", "data_fingerprint"])
def test_an_error_half_way_leaves_nothing(place, monkeypatch, where, error, existing):
    out = "deep/er/out"
    if existing:
        prepare(find_text_files(["in"]), out, vocab_size=300, log=quiet)
    before = everything(place)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)  # a batch per document
    module = encoding if where == "encode_batch" else prepare_module
    genuine, calls = getattr(module, where), []

    def failing(*arguments):
        calls.append(where)
        # The second batch fails: the first one is in the shard by then.
        if where == "encode_batch" and len(calls) < 2:
            return genuine(*arguments)
        assert len(list(place.glob("deep/er/.out.partial-*"))) == 1
        raise error

    monkeypatch.setattr(module, where, failing)
    expected = OutputError if isinstance(error, OSError) else error
    with pytest.raises(expected):
        prepare(find_text_files(["in"]), out, vocab_size=270, overwrite=True, log=quiet)
    assert calls
    assert everything(place) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals(place, number):
    """Killed while it reads: no DIR, and what SIGKILL leaves does not hinder the next run."""
    line = "some words in a line of text that goes on for a while\n"
    (place / "in" / "large.txt").write_text(line * 1_500_000)
    command = commands().start(
        ["in", "--out", "out", "--vocab-size", "300"], place, call="fastlm.prepare:main"
    )
    deadline = time.monotonic() + 60
    while not list(place.glob(".out.partial-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    command.signal(number)
    result = command.wait()
    assert not (place / "out").exists()
    if number == signal.SIGKILL:
        (place / "in" / "large.txt").unlink()
        assert [name[:13] for name in os.listdir(place) if name != "in"] == [".out.partial-"]
        prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)
        assert Manifest.load(place / "out").splits["train"].tokens
        assert sorted(os.listdir(place)) == ["in", "out"]
        return
    assert result.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in result.output
    assert sorted(os.listdir(place)) == ["in"]


def test_a_signal_as_soon_as_there_is_a_directory(place, monkeypatch):
    """Of prepare's parents, too, nothing stays."""
    genuine = Path.mkdir

    def interrupted(self, *arguments, **options):
        genuine(self, *arguments, **options)
        if self.name.startswith(".out.partial-"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(find_text_files(["in"]), "deep/er/out", vocab_size=270, log=quiet)
    assert os.listdir(place) == ["in"]


def test_leftovers_of_a_process_that_lives_stay(place):
    files = find_text_files(["in"])
    others = [
        ".out.partial-notes",
        ".out.partial-1-abcdefgh",
        ".output.partial-1-0123abcd",
        "out.partial-1-0123abcd",
    ]
    prepare(files, "out", vocab_size=300, log=quiet)
    for name in (*others, ".out.partial-7-0123abcd", ".out.replaced-8-0123abcd"):
        write_files(place / name, {"train_00000.bin": "x"})
    with staging.locked(place / ".out.partial-7-0123abcd"):  # as long as its process writes it
        prepare(files, "out", vocab_size=270, overwrite=True, log=quiet)
        found = sorted(os.listdir(place))
        assert found == sorted([*others, ".out.partial-7-0123abcd", "in", "out"])
    prepare(files, "out", vocab_size=300, overwrite=True, log=quiet)
    assert sorted(os.listdir(place)) == sorted([*others, "in", "out"])


def test_data_set_aside_comes_back(place):
    """Killed between the two renames of --overwrite: the old data is under the hidden name."""
    files = find_text_files(["in"])
    prepare(files, "out", vocab_size=300, log=quiet)
    before = everything(place / "out")
    (place / "out").rename(place / ".out.replaced-9-0123abcd")
    write_files(place / ".out.partial-9-0123abcd", {"train_00000.bin": "x"})
    with pytest.raises(OutputError, match="is not empty; add --overwrite"):
        prepare(files, "out", vocab_size=270, log=quiet)
    assert everything(place / "out") == before
    assert sorted(os.listdir(place)) == ["in", "out"]


def test_a_directory_tidied_away_before_its_lock_is_made_again(place, monkeypatch):
    genuine, calls = staging.locked, []

    def overtaken(directory, **options):
        calls.append(directory)
        if len(calls) == 1:
            directory.rmdir()  # by another process, to which it was a leftover
        return genuine(directory, **options)

    monkeypatch.setattr(staging, "locked", overtaken)
    prepare(find_text_files(["in"]), "out", vocab_size=300, log=quiet)
    assert len(calls) == 2 and sorted(os.listdir(place)) == ["in", "out"]


def test_file_names_that_are_not_utf8(place):
    """On Linux a file's name is bytes. The command prints them as they are: they can be pasted."""
    try:
        os.mkdir(b"in\xff")
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    for index in range(6):
        Path(os.fsdecode(b"in\xff/%d\xfe.txt" % index)).write_text("some text\n" * 30)
    out = os.fsdecode(b"out\xfd")
    result = subprocess.run(
        [sys.executable, "-m", "fastlm.prepare", b"in\xff", "--out", out, "--vocab-size", "300"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.splitlines()[-1] == b"next: python -m fastlm.train --data 'out\xfd'"
    manifest = Manifest.load(out)
    assert sum(split.documents for split in manifest.splits.values()) == 6
    assert manifest.source["first_file"] == "0\ufffd.txt"  # any JSON reader takes it
    data = open_data([out])
    assert len(data.train) == manifest.splits["train"].tokens


def test_missing_rights(place):
    # pytest's own directories are closed to other users, all the way up.
    for directory in (place, *place.parents):
        if directory.stat().st_uid == os.getuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    write_files(place, {"closed.txt": "text", "hidden/a.txt": "text", "locked/x": "", "open/x": ""})
    for name, mode in {"closed.txt": 0, "hidden": 0, "locked": 0o555, "open": 0o777}.items():
        (place / name).chmod(mode)
    result = commands().run([], place, call="command_programs:prepare_without_rights")
    (place / "hidden").chmod(0o755)
    assert result.returncode == 0, result.output
    unwritable, unreadable, unreachable, hidden = result.stderr.splitlines()
    assert re.match(
        r"error: --out locked/new/out: cannot write in .*/locked/new \(Perm", unwritable
    )
    assert re.match(r"error: .*/closed\.txt: cannot be read \(Permission denied\)", unreadable)
    assert unreachable == "error: hidden/a.txt: cannot be read (Permission denied)"
    assert hidden == "error: --out hidden/out: not a usable directory (Permission denied)"
    assert "reading" not in result.stdout.partition("now without rights")[2]
    assert os.listdir(place / "locked") == ["x"]
    assert sorted(os.listdir(place / "open")) == ["out", "x"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read in /proc")
def test_memory_does_not_grow_with_the_file(place):
    size = 60_000_000
    text = ("internationalization" * 5 + " ") * 10_000  # all of it one line
    with open(place / "large.txt", "w") as file:
        for _ in range(size // len(text)):
            file.write(text)
    train_tokenizer([text], 400).save("long_tokens.json")  # few tokens: a quick test
    argv = ["large.txt", "--out", "out", "--tokenizer", "long_tokens.json"]
    result = commands().run(argv, place, call="command_programs:prepare_and_tell_growth")
    assert result.returncode == 0, result.output
    manifest = Manifest.load(place / "out")
    assert sum(split.bytes for split in manifest.splits.values()) > 0.98 * size
    assert int(result.stdout.splitlines()[-1]) < 100e6
