"""Token files, manifests and arguments as nobody should give them: errors of the documented kinds.

tests/helpers/fuzz_data.py runs any number of these.
"""

import json

import pytest
from fuzz_data import CHECKS, fuzz

from fastlm import DataError, load_token_dataset
from fastlm.data.files import open_data
from fastlm.data.manifest import MANIFEST_NAME, Manifest, is_base_name


@pytest.mark.parametrize("what", CHECKS)
def test_only_documented_errors(what, tmp_path):
    outcomes = fuzz(what, tmp_path / "fuzz", cases=120, seed=10)
    assert outcomes.total() == 120 and outcomes.keys() == {"loaded", "refused"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", CHECKS)
def test_only_documented_errors_in_many_cases(what, tmp_path):
    assert fuzz(what, tmp_path / "fuzz", cases=5000, seed=11).total() == 5000


def test_the_fuzzer_tells_an_undocumented_error(tmp_path, monkeypatch):
    def broken(directory, rng):
        raise OverflowError("as NumPy does")

    monkeypatch.setitem(CHECKS, "token files", broken)
    with pytest.raises(
        AssertionError, match="case 'token files 3 0': OverflowError: as NumPy does"
    ):
        fuzz("token files", tmp_path, cases=1, seed=3)


def test_names_that_leave_their_directory():
    for name in ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "\ud800", "x" * 256):
        assert not is_base_name(name)
    for wrong in (None, 3, ["x"], b"x"):
        assert not is_base_name(wrong)
    for name in ("train_00000.bin", "..x", "é", "a b", "x" * 255, "\udcff"):
        assert is_base_name(name)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            ["tokenizer"],
            "../secret.txt",
            "tokenizer='../secret.txt': it must be the name of a file",
        ),
        (["tokenizer"], "/etc/passwd", "tokenizer='/etc/passwd'"),
        (
            ["splits", "train", "shards", 0, "file"],
            "../x.bin",
            r"train.shards\[0\].file='../x.bin'",
        ),
        (["splits", "val", "shards", 0, "file"], "a\0b", r"val.shards\[0\].file='a\\x00b'"),
        (["splits", "val", "shards", 0, "tokens"], 0, r"val.shards\[0\].tokens=0: .* from 1 to"),
        (["splits", "val", "shards", 0, "sha256"], "", r"val.shards\[0\].sha256='': .* a SHA-256"),
        (["splits", "val", "shards"], [], "lists no val shards"),
        (["splits", "val", "tokens"], 4, "the val shards hold 5 tokens, val.tokens says 4"),
        (["splits", "val", "bytes"], True, "val.bytes=True: it must be an integer from 0 to"),
        (["splits", "val", "bytes"], 2**62 + 1, "val.bytes=4611686018427387905: it must be"),
        (["vocab_size"], "300", "vocab_size='300': it must be an integer from 1 to 4294967296"),
        (["vocab_size"], 10**30, "vocab_size=1000000000000000000000000000000: it must"),
        (["end_of_text"], 300, "end_of_text=300: it must be an integer from 0 to 299"),
        (["fingerprint"], "f" * 63, "fingerprint='f+': it must be a SHA-256"),
        (["dtype"], ["uint16"], r"dtype=\['uint16'\]: it must be uint16 or uint32"),
        (["source"], 3, "source=3: it must be an object"),
    ],
)
def test_what_a_manifest_may_not_hold(path, value, message, tmp_path):
    from fuzz_data import prepared

    content = prepared(tmp_path)
    (tmp_path.parent / "secret.txt").write_text("secret")
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    for load in (Manifest.load, lambda directory: open_data([str(directory)])):
        with pytest.raises(DataError, match=f"^{tmp_path}/{MANIFEST_NAME}: .*{message}"):
            load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, "NaN", '"x"'])
def test_json_that_is_no_manifest(text, tmp_path):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(DataError, match="not a readable manifest"):
        Manifest.load(tmp_path)


def test_a_manifest_without_an_end(tmp_path):
    with open(tmp_path / MANIFEST_NAME, "wb") as file:
        file.truncate(1 << 30)  # takes no space on the disk
    with pytest.raises(DataError, match=r"is larger than any manifest \(64 MiB\)"):
        Manifest.load(tmp_path)


def test_npy_headers_that_numpy_cannot_stand(tmp_path):
    """Found by the fuzzer: a dtype of no bytes ended the process (SIGFPE in NumPy); the others
    raised OverflowError, tokenize.TokenError and TypeError."""
    for descr, shape in (
        *(("'V0'", "(9,)"), ("'<u2'", f"({10**30},)"), ("'<u2'", "(3,"), ("'<u2'", "(True,)")),
        ("'<u2'", "(-1,)"),
    ):
        header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
        path = tmp_path / "t.npy"
        path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + bytes(20))
        for mmap in (True, False):
            with pytest.raises(DataError, match=r"t\.npy: (not a readable|holds a 1-D)"):
                load_token_dataset(path, mmap)
