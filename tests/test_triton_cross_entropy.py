"""The Triton kernels of cross_entropy without a GPU, in Triton's interpreter.

Two sets of cases: of the launchers (triton_*_cases.py), and all those of cross_entropy_loss.
In processes of their own: TRITON_INTERPRET=1 has to be set before the kernels are imported, and
where it is nothing can be compiled (test_triton_compile.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

TESTS = Path(__file__).resolve().parent


def run_interpreted(*files: str) -> tuple[int, str]:
    """Runs test files with the interpreter; (how many passed, the summary line)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [str(TESTS / file) for file in files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    run = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    summary = run.stdout.splitlines()[-1]
    return int(re.search(r"(\d+) passed", summary)[1]), summary


def test_launchers_in_the_interpreter():
    passed, summary = run_interpreted("triton_launcher_cases.py", "triton_head_cases.py")
    assert passed >= 110 and "skipped" not in summary, summary


def test_cross_entropy_loss_in_the_interpreter():
    passed, summary = run_interpreted("test_cross_entropy.py", "test_cross_entropy_kernel.py")
    assert passed >= 190, summary


FOREIGN_PROJECT = """
import sys

class Without:  # finds all but what another project may lack
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("fastlm", "tyro", "tokenizers", "matplotlib", "tqdm"):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import torch
import torch.nn.functional as F
from their_kernels import check_labels, cross_entropy_loss

logits = torch.randn(4, 3, 50, requires_grad=True)
targets = torch.randint(50, (4, 3))
targets[0] = -100
loss = cross_entropy_loss(logits, targets)
expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
torch.testing.assert_close(loss, expected)
torch.testing.assert_close(
    torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits), rtol=1e-5, atol=1e-7
)
compiled = torch.compile(cross_entropy_loss, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(logits, targets), loss)
targets[1, 2] = 50
assert cross_entropy_loss(logits, targets).isnan()
try:
    check_labels()
except ValueError as error:
    assert "[5] = 50" in str(error) and "[0, 50)" in str(error), error
else:
    raise AssertionError("nothing was raised")
check_labels()
print("right")
"""


@pytest.mark.parametrize("place", ["another project", "the root of the repository"])
def test_folder_works_under_another_name(place, tmp_path):
    folder = tmp_path / "their_kernels"
    shutil.copytree(TESTS.parent / "kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    run = subprocess.run(
        [sys.executable, "-c", FOREIGN_PROJECT],
        cwd=tmp_path if place == "another project" else TESTS.parent,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(tmp_path),
        },
        capture_output=True,
        text=True,
    )
    assert run.stdout == "right\n", run.stdout + run.stderr
