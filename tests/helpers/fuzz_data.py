"""Damaged and hostile token files, manifests and arguments, by seed: only documented errors.

python tests/helpers/fuzz_data.py --cases 100000 --seed 1     (5,000 cases a second or two)
"""

import argparse
import contextlib
import functools
import io
import json
import random
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prepared_data import seal

from fastlm import DataError, TokenDataset, load_token_dataset
from fastlm.data.dataset import TOKEN_DTYPES, as_dataset
from fastlm.data.files import open_data
from fastlm.data.manifest import MANIFEST_NAME, Manifest, Shard, Split, is_base_name

HOSTILE_VALUES = [
    *(None, True, False, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "\0", "../x", "/etc/passwd", "..", ".", "a/b", "a\\b"),
    *("\ud800", "é" * 300, "uint16", "uint64", "0" * 64, [], {}, [None], {"a": 1}, [[[]]]),
]

DESCRS = [
    *("'|u1'", "'<i8'", "'>u2'", "'<f4'", "'|O'", "'<U9'", "'V0'", "[('a', '<u2')]", "''"),
    *("('<u2', (3,))", "None", "'<u2", "'" + "x" * 200 + "'", "1"),
]
SHAPES = [
    *("()", "(-1,)", f"({10**30},)", f"({2**62},)", "(True,)", "('x',)", "7", "(", "(0,)", "None"),
    *("(" * 300, "[" * 3000, "(1" + ",1" * 80 + ")", "(5L,)"),
]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """`content` after a few flips, cuts, insertions and repetitions."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) + 1)
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            del data[place : place + rng.randint(1, 9)]
        elif kind == 4:
            data[place : place + 8] = struct.pack("<q", rng.choice([-1, 0, 2**31, 2**63 - 1]))
        else:
            data[place:place] = data[: rng.randint(1, 40)]
    return bytes(data)


def npy(rng: random.Random) -> bytes:
    """A .npy file whose header says what it likes."""
    n = rng.randint(0, 40)
    descr = rng.choice(["'<u2'"] * 5 + DESCRS)
    shape = rng.choice([f"({n},)"] * 5 + [f"({n}, 2)", f"({n}.0,)", *SHAPES])
    fortran = rng.choice(["False", "False", "True", "0", "f()", "\0", "__import__('os')"])
    header = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"
    header = rng.choice([header] * 4 + ["", "{", header + " 1", "\n  " + header, "{}", "'''"])
    text = header.encode() + b" " * rng.randint(0, 20) + b"\n"
    major, minor = rng.choice([(1, 0)] * 4 + [(2, 0), (3, 0), (0, 0), (9, 9)])
    length = len(text) + rng.choice([0] * 6 + [1, -1, 1000])
    size = struct.pack("<H", length % 2**16) if major == 1 else struct.pack("<I", length % 2**32)
    return b"\x93NUMPY" + bytes([major, minor]) + size + text + rng.randbytes(2 * n)


def raw(rng: random.Random) -> bytes:
    """Raw tokens, often behind llm.c's header, which may be wrong about them."""
    n = rng.randint(0, 40)
    count = rng.choice([n, n, n, n + 1, 0, -1, 2**31 - 1, -(2**31)])
    magic = rng.choice([20240520, 20240520, 20240801, 20240521, 0])
    header = struct.pack("<3i", magic, 1, count).ljust(1024, b"\0")
    return rng.choice([b"", header, header]) + rng.randbytes(2 * n + rng.choice([0, 0, 0, 1]))


def check_token_file(directory: Path, rng: random.Random) -> str:
    make, suffix = rng.choice([(npy, "npy"), (raw, "bin")])
    content = make(rng)
    if rng.random() < 0.5:
        content = damaged(content, rng)
    path = directory / f"tokens.{suffix}"
    path.unlink(missing_ok=True)  # many times faster than to overwrite it
    path.write_bytes(content)
    dtype = rng.choice([None, None, None, *TOKEN_DTYPES, "float32", "x", ""])
    try:
        tokens = load_token_dataset(path, mmap=rng.random() < 0.7, dtype=dtype)
    except DataError as error:
        assert str(path) in str(error), error
        return "refused"
    assert tokens.ndim == 1 and len(tokens) > 0 and tokens.dtype.name in TOKEN_DTYPES
    dataset = TokenDataset([tokens], [path])
    if len(tokens) > 1:
        x, y = dataset.gather(np.arange(len(tokens) - 1), 1, "cpu")  # reads all of it
        assert x[:, 0].tolist() == tokens[:-1].tolist() and y[-1, 0] == int(tokens[-1])
    return "loaded"


@functools.cache
def prepared(directory: Path) -> dict[str, Any]:
    """A sound prepared directory; returns its manifest's content."""
    (directory / "tokenizer.json").write_text("{}")
    shards = []
    for index, name in enumerate(("train_00000.bin", "train_00001.bin", "val_00000.bin")):
        np.arange(3 + index, dtype="<u2").tofile(directory / name)
        shards.append(Shard(name, 3 + index, ""))
    splits = {"train": Split(7, 20, 2, shards[:2]), "val": Split(5, 9, 1, shards[2:])}
    manifest = Manifest(300, "uint16", splits, "tokenizer.json", 0, source={"files": 3})
    seal(directory, manifest)
    return json.loads((directory / MANIFEST_NAME).read_text())


def mutated(value: Any, rng: random.Random) -> Any:
    """A copy of a JSON value in which one thing is replaced, removed, renamed or doubled."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
        copy = value.copy()
        kind = rng.randrange(8)
        if kind == 0:
            del copy[key]
        elif kind == 1 and isinstance(copy, dict):
            copy[rng.choice(["x", "", "shards", "tokens"])] = copy.pop(key)
        elif kind == 1:
            copy.append(copy[key])
        elif isinstance(copy[key], dict | list):
            copy[key] = mutated(copy[key], rng)
        else:
            copy[key] = rng.choice(HOSTILE_VALUES)
        return copy
    return rng.choice(HOSTILE_VALUES)


def check_manifest(directory: Path, rng: random.Random) -> str:
    path = directory / MANIFEST_NAME
    sound = prepared(directory)
    path.unlink(missing_ok=True)
    kind = rng.randrange(10)
    if kind == 0:
        opening = rng.choice(["[", '{"a":', '[{"splits":'])
        path.write_text(opening * rng.choice([10, 500, 100_000]))
    elif kind < 4:
        path.write_bytes(damaged(json.dumps(sound).encode(), rng))
    else:
        value = mutated(sound, rng)
        path.write_text(json.dumps(mutated(value, rng) if rng.random() < 0.2 else value))
    try:
        manifest = Manifest.load(directory)
    except DataError as error:
        assert str(path) in str(error) and len(str(error)) < 2000, error
        with contextlib.suppress(DataError), contextlib.redirect_stdout(io.StringIO()):
            open_data([str(directory)])
            raise AssertionError("opened, and its manifest is none") from error
        return "refused"
    names = [shard.file for split in manifest.splits.values() for shard in split.shards]
    assert all(map(is_base_name, [*names, manifest.tokenizer or "none"]))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = open_data([str(directory)])
    except DataError as error:
        assert str(directory) in str(error), error
        return "refused"
    assert (len(data.train), len(data.val)) == (7, 5)
    return "loaded"


def any_value(rng: random.Random, depth: int = 0) -> Any:
    """An argument that may or may not be tokens."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return rng.choice(HOSTILE_VALUES)
    if kind == 1:
        shape = rng.choice([(), (0,), (3,), (5,), (2, 3), (1, 0, 2)])
        return np.zeros(
            shape, rng.choice(["u2", "u2", "u1", "i8", ">u2", "f4", "O", "U3", "M8[s]"])
        )
    if kind == 2:
        dtype = rng.choice([torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
        return torch.zeros(rng.choice([(), (3,), (2, 2)]), dtype=dtype)
    if kind == 3:
        return rng.choice([object(), int, "x", b"xyz", range(3), iter([1]), {1, 2}, slice(3)])
    if kind == 4:
        return np.arange(rng.randint(1, 9), dtype=np.uint16)
    if kind == 5:
        return np.arange(20, dtype=np.uint16)[:: rng.choice([1, 2, -1])]
    return [any_value(rng, depth + 1) for _ in range(rng.randint(0, 3))]


def check_arguments(directory: Path, rng: random.Random) -> str:
    segments = any_value(rng)
    extra = {}
    if rng.random() < 0.3:
        extra = {rng.choice(["paths", "offsets"]): rng.choice([(), ["a"], [1, 2], "ab", [None]])}
    try:
        if extra:
            dataset = TokenDataset(segments, **extra)
        else:
            dataset = rng.choice([TokenDataset, as_dataset])(segments)
    except (DataError, ValueError, TypeError):
        return "refused"
    assert len(dataset) == sum(map(len, dataset.segments))
    part = dataset.slice(len(dataset) // 3, len(dataset) // 2 + 1)
    assert len(part) <= len(dataset)
    return "loaded"


CHECKS: dict[str, Callable[[Path, random.Random], str]] = {
    "token files": check_token_file,
    "manifests": check_manifest,
    "TokenDataset": check_arguments,
}


def fuzz(what: str, directory: Path, cases: int, seed: int) -> Counter[str]:
    """Runs the cases of one kind in `directory`; counts "loaded" and "refused".

    Raises AssertionError, naming the case's own seed, for any other outcome.
    """
    outcomes: Counter[str] = Counter()
    directory.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of NumPy, on headers
        for case in range(cases):
            name = f"{what} {seed} {case}"
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    outcomes[CHECKS[what](directory, random.Random(name))] += 1
            except Exception as error:
                raise AssertionError(f"case {name!r}: {type(error).__name__}: {error}") from error
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        for what in CHECKS:
            began = time.monotonic()
            outcomes = fuzz(what, Path(place, what), arguments.cases // len(CHECKS), arguments.seed)
            seconds = time.monotonic() - began
            print(f"{what}: {dict(outcomes)}, seed {arguments.seed}, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
