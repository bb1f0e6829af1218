import nbclient
import nbformat
import pytest
from conftest import ROOT

SHORTER = {"N_STEPS = 20_000": "N_STEPS = 300", "--log_points=40": "--log_points=6", "STEPS = 200": "STEPS = 20"}


def read_notebook():
    return nbformat.read(ROOT / "docs" / "grokking.ipynb", as_version=4)


def test_the_notebook_is_kept_without_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert cells and not any(cell.outputs or cell.execution_count for cell in cells)
    assert not any("!{" in cell.source for cell in cells), "a Python whose path holds a blank has to be quoted"


@pytest.mark.slow
def test_the_notebook_runs_from_its_first_cell_to_its_last(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # two threads would wait for each other beside another test
    for path in ROOT.iterdir():
        if path.name not in {".git", "notebook"}:
            (tmp_path / path.name).symlink_to(path)
    notebook = read_notebook()
    for cell in notebook.cells:
        for text, shorter in SHORTER.items():
            cell.source = cell.source.replace(text, shorter)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    printed = ["".join(output.get("text", "") for output in cell).replace("\r\n", "\n") for cell in outputs]
    _, training, _, history, _, remeasured, _, measured = printed
    assert "\n     300 " in training and "\r" not in training, "rows, one for each log step, and no broken bar"
    assert sum("image/png" in output.get("data", {}) for cell in outputs for output in cell) == 2
    assert history.count("robust at 0.07") == 6
    assert "wrote notebook/remeasured/training_history.json" in remeasured
    assert "largest change of a pixel by PGD 0.100" in measured and measured.count("robust at") == 3
