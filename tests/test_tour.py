"""`docs/tour.ipynb`, the notebook from a checkpoint to a table, executed in an empty folder."""

from pathlib import Path

import pytest

TOUR = Path(__file__).resolve().parent.parent / "docs" / "tour.ipynb"


@pytest.mark.readme
def test_the_tour_is_executed_and_keeps_its_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(TOUR, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "it is committed without outputs"
    setup = next(cell for cell in notebook.cells if cell.cell_type == "code")
    quick = setup.source.replace('SIZE = "small"', 'SIZE = "tiny"').replace("EPOCHS = 20", "EPOCHS = 2")
    assert quick != setup.source
    setup.source = quick
    monkeypatch.setenv("PYTHONPATH", str(TOUR.parent.parent))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = "".join(o.get("text", "") + o.get("data", {}).get("text/plain", "") for o in outputs)
    for promise in (
        "resnet18",
        "proven with the framework itself",
        "(512, 8, 8)",
        "knn_top1_percent",
        "difference",
        "page.html",
    ):
        assert promise in shown
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "mine" in page
    assert "data:image/png" in page
