# SPDX-License-Identifier: Apache-2.0
"""The shape of the package: no module needs another one that needs it, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vtprune

ROOT = Path(vtprune.__file__).parent
LONGEST = 350


def modules() -> dict[str, Path]:
    """Name -> file, of the package and of all folders that are linked into it."""
    # `rglob` follows no links below its start.
    files = [file for folder in (ROOT, *filter(Path.is_dir, ROOT.iterdir())) for file in folder.rglob("*.py")]
    found = {}
    for file in files:
        parts = ("vtprune", *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Modules of ours that are needed to import a file; imports in functions and for type checkers are not."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module


def test_no_module_is_imported_in_a_circle():
    files = modules()
    assert {"vtprune.adapters.llava", "vtprune.eval.config", "vtprune.session"} <= files.keys()
    graph = {name: set(imports(ast.parse(file.read_text()), set(files))) - {name} for name, file in files.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
    assert order.index("vtprune.session") > order.index("vtprune.stages.call") > order.index("vtprune.errors")


def test_no_file_is_long():
    lengths = {name: len(file.read_text().splitlines()) for name, file in modules().items()}
    assert not {name: length for name, length in lengths.items() if length > LONGEST}
