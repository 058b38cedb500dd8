"""The default corpus: which files, prepared once, never half, and made again where damaged."""

import contextlib
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
from command_server import commands
from prepared_data import decoded_documents, quiet, write_files

from fastlm import corpus
from fastlm.corpus import default_corpus
from fastlm.data.files import open_data
from fastlm.data.fingerprint import VERIFIED_NAME
from fastlm.data.manifest import Manifest
from fastlm.data.split import document_hash
from fastlm.errors import DataError, OutputError

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = 300

# Enough files for some of them to be in the 5 % of validation.
MODULES = {f"module_{i}.py": f"def function_{i}():\n    return {i}\n" * 5 for i in range(60)}
PACKAGED = {"package/__init__.py": "", "package/deep/part.py": "# naïve\r\nx = 1\n"}
LEFT_OUT = {
    "test/test_a.py": "left out",
    "package/tests/test_b.py": "left out",
    "idlelib/idle.py": "left out",
    "idlelib/idle_test/test_idle.py": "left out",
    "encodings/cp037.py": "left out",
    "pydoc_data/topics.py": "left out",
    "lib2to3/main.py": "left out",
    "turtledemo/clock.py": "left out",
    "site-packages/numpy/__init__.py": "left out",
    "dist-packages/apt.py": "left out",
    "package/__pycache__/part.py": "left out",
    "readme.txt": "left out",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small directory in the place of the standard library, and an empty cache."""
    root = write_files(tmp_path / "lib", {**MODULES, **PACKAGED, **LEFT_OUT})
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\n# caf\xe9\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    monkeypatch.setattr(corpus, "MIN_BYTES", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return root


@pytest.fixture
def preparations(monkeypatch):
    """One entry for each call of prepare."""
    calls, genuine = [], corpus.prepare

    def counted(*arguments, **options):
        calls.append(arguments)
        return genuine(*arguments, **options)

    monkeypatch.setattr(corpus, "prepare", counted)
    return calls


def documents(directory: Path) -> list[str]:
    return decoded_documents(directory, "train") + decoded_documents(directory, "val")


def test_the_library_without_its_tests(library, tmp_path):
    lines = []
    directory = default_corpus(VOCAB_SIZE, log=lines.append)
    assert directory.parent == tmp_path / "cache" / "fastlm"
    texts = {**MODULES, **PACKAGED}
    assert sorted(documents(directory)) == sorted(texts.values())
    held_out = [name for name in texts if document_hash(name, 0) < 0.05 * 2**64]
    assert held_out
    val = sorted(decoded_documents(directory, "val"))
    assert val == sorted(texts[name] for name in held_out)

    manifest = Manifest.load(directory)
    assert manifest.vocab_size == VOCAB_SIZE
    version = ".".join(map(str, sys.version_info[:3]))
    assert lines[0].startswith(f"[corpus] Python {version} standard library: 62 files, 0.0 MB -> ")
    assert lines[0].endswith(str(directory))
    assert f"[corpus] fingerprint: {manifest.fingerprint}" in lines
    assert all(line.startswith("[corpus] ") for line in lines)
    assert len(open_data([str(directory)]).val) == manifest.splits["val"].tokens


def test_a_file_that_cannot_be_read_is_named(library):
    (library / "gone.py").symlink_to("nowhere")
    lines = []
    directory = default_corpus(VOCAB_SIZE, log=lines.append)
    (left_out,) = [line for line in lines if "gone.py" in line]
    assert left_out.endswith("gone.py cannot be read and is left out (No such file or directory)")
    assert sorted(documents(directory)) == sorted({**MODULES, **PACKAGED}.values())
    assert not any("latin.py" in line for line in lines)  # in another encoding on purpose


def test_prepared_once(library, preparations):
    directory = default_corpus(VOCAB_SIZE, log=quiet)
    lines = []
    assert default_corpus(VOCAB_SIZE, log=lines.append) == directory
    assert len(preparations) == 1
    assert any(Manifest.load(directory).fingerprint in line for line in lines)


def test_made_anew_for_other_contents_names_and_sizes(library, preparations):
    directories = {default_corpus(VOCAB_SIZE, log=quiet)}
    text = MODULES["module_1.py"]
    (library / "module_1.py").write_text(text.replace("return", "Return"))  # of the same length
    directories.add(default_corpus(VOCAB_SIZE, log=quiet))
    (library / "module_2.py").rename(library / "renamed.py")
    directories.add(default_corpus(VOCAB_SIZE, log=quiet))
    directories.add(default_corpus(VOCAB_SIZE + 1, log=quiet))
    (library / "test" / "test_a.py").write_text("not part of it")
    directories.add(default_corpus(VOCAB_SIZE, log=quiet))
    assert len(directories) == len(preparations) == 4


@pytest.mark.parametrize(
    "name, damage",
    [
        ("train_00000.bin", lambda content: content[:-2]),
        ("val_00000.bin", lambda content: content + b"\0\0"),
        ("val_00000.bin", None),
        ("val_00000.bin", lambda content: content[:-1] + b"\xff"),
        ("manifest.json", None),
        ("manifest.json", lambda content: content[: len(content) // 2]),
        ("manifest.json", lambda content: b"\xff" + content),
        ("manifest.json", lambda content: content.replace(b'"sha256": "', b'"sha256": "zz')),
        ("manifest.json", lambda content: content.replace(b'"uint16"', b'"strange"')),
        ("manifest.json", lambda content: content.replace(b'"tokenizer.json"', b"null")),
        ("tokenizer.json", None),
        ("tokenizer.json", lambda content: content.replace("Ġ".encode(), b"?")),
    ],
)
def test_damage_is_mended(library, preparations, name, damage):
    directory = default_corpus(VOCAB_SIZE, log=quiet)
    sound = {path.name: path.read_bytes() for path in directory.iterdir()}
    if damage is None:
        (directory / name).unlink()
    else:
        assert damage(sound[name]) != sound[name]
        (directory / name).write_bytes(damage(sound[name]))
    lines = []
    assert default_corpus(VOCAB_SIZE, log=lines.append) == directory
    assert any("is damaged" in line for line in lines)
    assert len(preparations) == 2
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert {name: content for name, content in found.items() if name in sound} == sound
    assert found.keys() - sound.keys() <= {VERIFIED_NAME}
    assert os.listdir(directory.parent) == [directory.name]


def test_an_interruption_leaves_no_cache(library, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fastlm.data.encoding.encode_batch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            default_corpus(VOCAB_SIZE, log=quiet)
        assert os.listdir(os.path.join(os.environ["XDG_CACHE_HOME"], "fastlm")) == []
    assert documents(default_corpus(VOCAB_SIZE, log=quiet))


def test_the_second_of_two_uses_the_firsts(library, monkeypatch):
    genuine = corpus.prepare

    def overtaken(files, directory, **options):
        genuine(files, directory, **options)
        (directory / "manifest.json").touch()
        winner.append((directory / "manifest.json").stat().st_ino)
        genuine(files, directory, **options)

    winner = []
    monkeypatch.setattr(corpus, "prepare", overtaken)
    lines = []
    directory = default_corpus(VOCAB_SIZE, log=lines.append)
    assert "[corpus] another process has prepared it meanwhile" in lines
    assert [(directory / "manifest.json").stat().st_ino] == winner
    assert os.listdir(directory.parent) == [directory.name]
    assert sorted(documents(directory)) == sorted({**MODULES, **PACKAGED}.values())


def test_two_repair_it_at_once(library, preparations, monkeypatch):
    """The second, which saw the damage and waited, leaves the first one's corpus alone."""
    directory = default_corpus(VOCAB_SIZE, log=quiet)
    (directory / "val_00000.bin").unlink()
    directory.with_name(f".{directory.name}.damaged-0123").mkdir()  # a killed process left it
    genuine, lines, first = corpus.locked, [], []

    @contextlib.contextmanager
    def overtaken(path):
        if not first:
            first.append(True)
            default_corpus(VOCAB_SIZE, log=quiet)  # the other process, from here to its end
            first.append((directory / "manifest.json").stat().st_ino)
        with genuine(path):
            yield

    monkeypatch.setattr(corpus, "locked", overtaken)
    assert default_corpus(VOCAB_SIZE, log=lines.append) == directory
    assert lines[-1] == "[corpus] another process has prepared it meanwhile"
    assert (directory / "manifest.json").stat().st_ino == first[1]  # what it opened is still there
    assert len(preparations) == 2 and os.listdir(directory.parent) == [directory.name]


def test_processes_at_once(library):
    cache = {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}
    call = "command_programs:prepare_corpus"
    started = [commands().start([str(library)], library, call=call, env=cache) for _ in range(2)]
    for command in started:
        command.until("ready")
    (library / "go").touch()
    results = [command.wait() for command in started]
    assert [result.returncode for result in results] == [0, 0], results
    (directory,) = {Path(result.stdout.splitlines()[-1]) for result in results}
    assert os.listdir(directory.parent) == [directory.name]
    assert sorted(documents(directory)) == sorted({**MODULES, **PACKAGED}.values())


def test_cache_directory(library, tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_corpus(VOCAB_SIZE, log=quiet).parent == tmp_path / "home/.cache/fastlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # as if unset, by the XDG specification
    assert default_corpus(VOCAB_SIZE, log=quiet).parent == tmp_path / "home/.cache/fastlm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert default_corpus(VOCAB_SIZE, log=quiet).parent == tmp_path / "other/fastlm"


def test_unwritable_cache(library, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"file/fastlm cannot be written.*set XDG_CACHE_HOME"):
        default_corpus(VOCAB_SIZE, log=quiet)


def test_a_cache_that_cannot_be_written_is_read(library, monkeypatch):
    """A prepared cache on a read-only file system serves."""
    directory = default_corpus(VOCAB_SIZE, log=quiet)

    def check_writable(_):
        raise AssertionError("asked to write")

    monkeypatch.setattr(corpus, "_check_writable", check_writable)
    assert default_corpus(VOCAB_SIZE, log=quiet) == directory


def test_no_library(library, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MIN_BYTES", 1_000_000)
    with pytest.raises(DataError, match=r"too little for a default corpus; .*--data"):
        default_corpus(VOCAB_SIZE, log=quiet)
    shutil.rmtree(library)  # as where the library is in a zip file
    with pytest.raises(DataError, match="--data"):
        default_corpus(VOCAB_SIZE, log=quiet)
    assert not (tmp_path / "cache").exists()


def test_this_interpreters_library(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = default_corpus()
    manifest = Manifest.load(directory)
    train, val = manifest.splits["train"], manifest.splits["val"]
    assert (manifest.vocab_size, manifest.dtype, manifest.end_of_text) == (4096, "uint16", 0)
    assert train.tokens > 1_000_000
    assert 0.02 < val.bytes / (train.bytes + val.bytes) < 0.12
    assert train.tokens / train.bytes < 0.35
    sources = {file.path.read_bytes() for file in corpus._python_files(Path(os.__file__).parent)}
    assert {text.encode() for text in decoded_documents(directory, "val")} <= sources
    assert manifest.fingerprint in capsys.readouterr().out
