"""README.md: short, of files and commands that exist, with code that runs."""

import re
from pathlib import Path

import numpy as np
import pytest

import fastlm

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PYTHON_BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TREE = re.search(r"^## The tree\n+```\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1]


def test_it_is_short():
    assert len(README.splitlines()) <= 170


def paths_named() -> set[str]:
    """Files of this repository that README names: in the tree, in code spans and as links."""
    linked = re.findall(r"\]\(([^):]+)\)", README)
    spans = re.findall(r"`((?:csrc|kernels|fastlm|tests|bench)/[\w./]*)`", README)
    folder, in_tree = "", []
    for line in TREE.splitlines():
        if top := re.match(r"(\w+/)", line):
            folder = top[1]
        elif not line.startswith(" "):
            folder = ""
        words = re.findall(r"(?<![\w*<>/])([\w/]+\.(?:py|h|md|cpp|inc)|\w+/(?=:))", line)
        in_tree += [folder, *(folder + word for word in words)]
    return {*linked, *spans, *in_tree} - {""}


def test_the_files_it_names_exist():
    named = paths_named()
    assert {"bench/RESULTS.md", "fastlm/train.py", "csrc/adamw.cpp", "csrc/parallel.h"} <= named
    assert not [name for name in sorted(named) if not (ROOT / name).exists()]


def test_the_commands_it_names_exist():
    targets = set(re.findall(r"\bmake ([a-z][a-z-]+)", README))
    assert {"train", "report", "test-newest"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    modules = set(re.findall(r"python -m fastlm\.(\w+)", README))
    assert {"train", "prepare", "generate", "doctor", "export"} == modules
    assert all((ROOT / "fastlm" / f"{module}.py").exists() for module in modules)


def test_what_it_calls_fastlms_is_public():
    names = set(re.findall(r"\bfastlm\.([a-zA-Z_]\w+)\(", README))
    assert "keep_freed_memory" in names and names <= set(fastlm.__all__)


def test_nanogpts_patches_are_those_that_test_nanogpt_applies():
    assert len([block for block in PYTHON_BLOCKS if "of nanoGPT" in block]) == 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("block", [b for b in PYTHON_BLOCKS if "of nanoGPT" not in b])
def test_its_code_runs(block, tmp_path, monkeypatch):
    """With small sizes: a vocabulary of 50304 and 1000 steps would take hours."""
    smaller = {
        "50304": "64",
        "d_model=512, num_heads=8, num_layers=6": "d_model=16, num_heads=2, num_layers=1",
        "range(1000)": "range(3)",
    }
    for size, small in smaller.items():
        assert size in block
        block = block.replace(size, small)
    calls = []
    monkeypatch.setattr(fastlm, "keep_freed_memory", lambda: calls.append("keep"))
    monkeypatch.chdir(tmp_path)
    np.random.default_rng(0).integers(0, 64, 5000, dtype=np.uint16).tofile("train.bin")
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert calls == ["keep"]  # for the whole test process it would not be undone
    assert names["step"] == 1000
    assert 0 < float(names["optimizer"].last_grad_norm) < 100
