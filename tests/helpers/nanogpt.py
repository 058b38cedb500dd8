"""nanoGPT's own files with the patches of README and docs/nanogpt.md, for tests that run them.

A python block there whose first line is `# FILE.py of nanoGPT, at the top` patches that file.
Its first lines of code go there; further comments say what becomes of the code below them:

    # in place of: START      replaces the one line that starts so; the indentation stays
    # after: START            goes behind that line
    # delete: START           (no code) takes away that line and what is indented below it

nanoGPT is no dependency: NANOGPT names a folder with its model.py, train.py and configurator.py, or
they are in nanoGPT/ beside the repository. As a program's function, `train` runs a train.py.
"""

import os
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = ("model.py", "train.py", "configurator.py")


def nanogpt_folder() -> Path:
    """The folder of nanoGPT's files; skips the test where there is none."""
    folder = Path(os.environ.get("NANOGPT") or ROOT.parent / "nanoGPT")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        pytest.skip(f"{folder} has no {missing[0]}: clone nanoGPT there, or set NANOGPT")
    return folder


def shown_patches() -> list[tuple[str, str]]:
    """(file, edits) of each patch, in order: the loss, the linear loss, AdamW of README; then those
    of docs/nanogpt.md."""
    text = "\n".join((ROOT / n).read_text("utf-8") for n in ("README.md", "docs/nanogpt.md"))
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    heads = [re.match(r"# (\w+\.py) of nanoGPT, ", block) for block in blocks]
    return [
        (head[1], "# " + block[head.end() :])
        for head, block in zip(heads, blocks, strict=True)
        if head is not None
    ]


def patched(source: str, edits: str) -> str:
    """`source` after the edits; ValueError for one that is no edit or fits no single line."""
    lines = source.splitlines()
    for edit in re.split(r"^# ", edits, flags=re.MULTILINE)[1:]:
        what, *code = filter(str.strip, edit.splitlines())
        if what == "at the top":
            lines[:0] = code
            continue
        action, _, start = what.partition(": ")
        places = [i for i, line in enumerate(lines) if line.strip().startswith(start)]
        if action not in ("in place of", "after", "delete") or len(places) != 1:
            raise ValueError(f"{what!r} fits {len(places)} lines")
        (place,) = places
        indent = lines[place][: len(lines[place]) - len(lines[place].lstrip())]
        end = place + 1
        while action == "delete" and lines[end].startswith(f"{indent} "):
            end += 1
        lines[end if action == "after" else place : end] = [indent + line for line in code]
    return "\n".join(lines) + "\n"


def train(argv: list[str]) -> None:
    """In a process of its own: `python train.py argv...` in the working directory."""
    import torch

    if "--dtype=float16" in argv:  # nanoGPT scales the loss on a GPU only: a CPU's scaler here
        torch.cuda.amp.GradScaler = lambda enabled: torch.amp.GradScaler("cpu", enabled=enabled)
    sys.path.insert(0, "")
    sys.argv = ["train.py", *argv]
    runpy.run_path("train.py", run_name="__main__")
