# SPDX-License-Identifier: Apache-2.0
"""The notebooks run from top to bottom on the built-in model, and hold no outputs of another run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="not installed: the extra dev")
nbclient = pytest.importorskip("nbclient", reason="not installed: the extra dev")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
SHOWN = {
    "compare_methods": ("mmtok", "divprune", " KB\n"),
    "own_method": ("checks\n", "- right: "),
    "prune_and_look": ("full: ", "image/png", "pruned: "),
}
"""Notebook -> what its outputs hold."""


def test_all_notebooks_are_here():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHOWN)


@pytest.mark.parametrize("name", SHOWN)
def test_it_is_stored_without_outputs(name):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_it_runs(name, tmp_path):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    place = {"metadata": {"path": tmp_path}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=place).execute()
    outputs = json.dumps([cell.get("outputs", []) for cell in notebook.cells], ensure_ascii=False)
    assert all(json.dumps(words)[1:-1] in outputs for words in SHOWN[name])
