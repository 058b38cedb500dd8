"""docs/notebook.ipynb runs: its code alone, and as a notebook that shows LivePlotter's pictures."""

import base64
import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"

pytestmark = pytest.mark.usefixtures("one_thread", "without_extras")


def test_its_code_runs(tmp_path, monkeypatch, capsys):
    """Outside a notebook, where nothing is drawn."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), names)
    assert names["plotter"].train_steps == list(range(100))
    assert names["plotter"].train_losses[-1] < 3.5 < names["plotter"].train_losses[0]
    assert len(names["plotter"].eval_steps) == 4
    assert (tmp_path / "notebook_run" / "checkpoints" / "checkpoint_final.pt").exists()
    assert "    def " in capsys.readouterr().out


def test_it_is_executed_and_shows_the_curve(tmp_path):
    """Each draw replaces the picture before: an output cell ends with one, and the last lines."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing: no notebook runs here")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is missing: no notebook runs here")
    pytest.importorskip("ipykernel", reason="ipykernel is missing: no notebook runs here")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = dict(kernel_name="python3", timeout=600, resources={"metadata": {"path": tmp_path}})
    nbclient.NotebookClient(notebook, **options).execute()
    pictures, texts = [], []
    for cell in notebook.cells:
        outputs = cell.get("outputs", ())
        pictures.append([o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})])
        texts.append("".join(o.text for o in outputs if o.output_type == "stream"))
    own_loop, trainer, sample = 3, 5, 6
    assert [len(of_cell) for of_cell in pictures] == [0, 0, 0, 1, 0, 1, 0]
    for of_cell in (pictures[own_loop], pictures[trainer]):
        assert base64.b64decode(of_cell[0]).startswith(b"\x89PNG")
    assert "[summary] training    100 steps" in texts[trainer]
    assert "def " in texts[sample]
