"""docs/ and CONTRIBUTING.md: pages, files and targets that exist, with code that runs."""

import dataclasses
import json
import re
from inspect import signature
from pathlib import Path

import pytest
import torch

from fastlm.generate import GenerateArguments
from fastlm.prepare import prepare
from fastlm.run.cli import CommandLine

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
OF_OTHERS = ("huggingface", "nanogpt")  # test_huggingface_docs.py and test_nanogpt.py run them
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "page", [p for p in PAGES if python_blocks(p) and p.stem not in OF_OTHERS], ids=lambda p: p.stem
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    for number, block in enumerate(python_blocks(page)):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    if page.stem == "own_loop":
        check_formats(tmp_path)


def check_formats(folder: Path) -> None:
    """What formats.md says of the files that the page's run has written."""
    text = (ROOT / "docs" / "formats.md").read_text()
    keys = set(re.findall(r"`(\w+)`", re.search(r"\| key \| value \|.*?\n\n", text, re.DOTALL)[0]))
    (checkpoint,) = (folder / "run" / "checkpoints").glob("checkpoint_final.pt")
    assert keys == set(torch.load(checkpoint, weights_only=True))
    rows = (folder / "run" / "logs" / "metrics.jsonl").read_text().splitlines()
    found = {row["event"]: row for row in map(json.loads, rows)}
    for event, fields in re.findall(r"^\| `(start|train|val|summary)` \| (.+) \|$", text, re.M):
        assert set(re.findall(r"`(\w+)`", fields)) <= found[event].keys(), event


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_the_files_and_pages_it_names_exist(page):
    text = page.read_text()
    linked = [page.parent / name for name in re.findall(r"\]\(([\w./-]+\.md)\)", text)]
    spans = re.findall(r"`((?:csrc|kernels|fastlm|tests|bench)/[\w./]*\.\w+)`", text)
    missing = [p for p in [*linked, *(ROOT / span for span in spans)] if not p.exists()]
    assert not missing


def test_every_page_is_in_the_sites_navigation():
    nav = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == [page.name for page in PAGES]


def test_litgpts_options_have_options_here():
    page = (ROOT / "docs" / "nanogpt.md").read_text().split("\n## litgpt")[1]
    # Of torchrun, lm_eval, hf, fastlm.export.
    others = "--nproc-per-node --nnodes --model --model_args --tasks --local-dir --ckpt --out"
    known = set(others.split())
    for settings in (CommandLine, GenerateArguments):
        known |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings)}
    known |= {f"--{name.replace('_', '-')}" for name in signature(prepare).parameters}
    rows = re.findall(r"^\| `.+? \| (.*) \|$", page, re.MULTILINE)
    named = {flag for row in rows for flag in re.findall(r"--[\w-]+", row)}
    assert len(named) > 30 and named <= known


def test_contributing_names_targets_that_exist():
    targets = set(re.findall(r"`?\bmake ([a-z-]+)\b", CONTRIBUTING))
    makefile = (ROOT / "Makefile").read_text()
    assert {"test", "lint", "report"} <= targets
    assert targets <= set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
