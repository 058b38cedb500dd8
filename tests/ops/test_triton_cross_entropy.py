"""The Triton kernels of cross_entropy: their launchers on a GPU, without one in the interpreter.

Two sets of cases: of the launchers (triton_*_cases.py), and all those of cross_entropy_loss, which
a GPU runs where they stand. In processes of their own: TRITON_INTERPRET=1 has to be set before the
kernels are imported, and where it is nothing can be compiled (test_triton_compile.py).
"""

import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from interpreter import TESTS, run_interpreted, run_kernel_cases

LAUNCHERS = "triton_launcher_cases.py", "triton_row_cases.py", "triton_head_cases.py"
LOSSES = "ops", "test_cross_entropy.py", "test_cross_entropy_kernel.py", "test_loss_clients.py"


def test_launchers():
    passed, summary = run_kernel_cases(*LAUNCHERS)
    assert passed >= 105 and "skipped" not in summary, summary


def test_losses_in_the_interpreter():
    passed, summary = run_interpreted(*LOSSES)
    assert passed >= 170, summary


@pytest.mark.exhaustive
def test_sweeps_of_the_launchers():
    passed, summary = run_kernel_cases(*LAUNCHERS, marks="exhaustive")
    assert passed >= 10, summary


@pytest.mark.exhaustive
def test_sweeps_of_the_losses_in_the_interpreter():
    passed, summary = run_interpreted(*LOSSES, marks="exhaustive")
    assert passed >= 20, summary


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
from their_kernels import AdamW, check_labels, cross_entropy_loss

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

params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (), (0,), (700,))]
copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
optimizer = AdamW(params, lr=0.1, weight_decay=0.1, max_grad_norm=1.0)
plain = torch.optim.AdamW(copies, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
for step in range(3):
    for p, q in zip(params, copies):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(copies, 1.0)
    plain.step()
    torch.testing.assert_close(optimizer.last_grad_norm, norm)
for p, q in zip(params, copies):
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
plain.load_state_dict(optimizer.state_dict())
params[3].grad[5] = torch.nan
optimizer.step()
assert optimizer.first_nonfinite()[:2] == (0, 3) and all(p.isfinite().all() for p in params)
print("right")
"""


@pytest.mark.parametrize(
    "place",
    ["another project", pytest.param("the root of the repository", marks=pytest.mark.exhaustive)],
)
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
