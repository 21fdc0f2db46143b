# SPDX-License-Identifier: Apache-2.0
"""Methods and adapters of other packages, found by their entry points."""

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from vtprune.plugins import load_plugins

LIBRARY = """
import vtprune
from vtprune.adapters import list_adapters
print({"mmtok", "mine"} <= set(vtprune.list_methods()), {"llava", "mine"} <= set(list_adapters()))
"""


@pytest.fixture
def installed(tmp_path):
    """A folder of two packages: the modules of one cannot be imported, those of the other can."""
    for package, module in (("Broken-Package", "not_there"), ("Good-Package", "good_plugin")):
        folder = tmp_path / f"{package.replace('-', '_').lower()}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        groups = "[vtprune.methods]\na_{0} = {0}:Mine\n[vtprune.adapters]\na_{0} = {0}:MyAdapter\n"
        (folder / "entry_points.txt").write_text(groups.format(module))
    (tmp_path / "good_plugin.py").write_text(
        "import vtprune\n"
        "class Mine(vtprune.Zero):\n    name = 'mine'\n"
        "class MyAdapter(vtprune.Adapter):\n    model_types = ('mine',)\n"
    )
    return tmp_path


def test_a_plugin_that_cannot_be_imported_is_a_warning_that_names_its_package(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    others = {entry.name for entry in entry_points(group="vtprune.methods")} - {"a_not_there"}
    found = []
    with pytest.warns(UserWarning) as warned:
        load_plugins("vtprune.methods", found.append)
    assert [str(warning.message) for warning in warned if "not_there" in str(warning.message)] == [
        "Broken-Package: its plug-in 'a_not_there' (not_there:Mine, group vtprune.methods) is left out: "
        "ModuleNotFoundError: No module named 'not_there'"
    ]
    assert "Mine" in {each.__name__ for each in found} and len(found) == len(others)


def test_everything_else_works_beside_a_broken_plugin(installed):
    command = [sys.executable, "-c", f"import sys; sys.path.append({str(installed)!r})\n{LIBRARY}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]
    assert done.stderr.count("Broken-Package: its plug-in") == 2


OUTSIDE = """
import sys
sys.path[:0] = [{tests!r}]
from own_vlm import two_prompts
from test_contributing import example
from testing.outside import Gathers, LongStates

exec(example("adapter"))
"""


@pytest.mark.slow
def test_the_matrix_finds_methods_and_models_of_other_packages(tmp_path):
    tests = Path(__file__).parent
    folder = tmp_path / "outside_package-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-package\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[vtprune.methods]\na = outside_package:Gathers\nb = outside_package:LongStates\n"
        "[vtprune.adapters]\na = outside_package:OwnVLM\n[vtprune.test_models]\na = outside_package:two_prompts\n"
    )
    (tmp_path / "outside_package.py").write_text(OUTSIDE.format(tests=str(tests)))
    matrix = tests / "conformance" / "test_other_packages.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", matrix],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    for cell in ("[gathers]", "[long_states]", "[OwnVlm-divprune]"):
        assert f"{cell} PASSED" in done.stdout
