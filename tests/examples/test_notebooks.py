"""The notebooks run from beginning to end, in the order in which they name each other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
ORDER = ("study", "finished-run")


def shown(notebook: Any) -> str:
    return json.dumps([cell.outputs for cell in notebook.cells if cell.cell_type == "code"])


@pytest.mark.long
@pytest.mark.filterwarnings("default:::(jupyter|zmq|nbclient|nbformat|traitlets|tornado)")
def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(ORDER)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    shutil.copy(FOLDER / "tiny_base.py", tmp_path)
    pages = []
    for name in ORDER:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        nbformat.validate(notebook)
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
        pages.append(shown(notebook))
    assert "image/png" in pages[0] and "round 8" in pages[0]
    assert "past policy.max_epsilon" in pages[1]  # the ledger is as the other left it
