# SPDX-License-Identifier: Apache-2.0
"""The README's table of models is the one that the adapters give."""

from pathlib import Path

SCRIPT = "update_models"

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table(script):
    (found,) = script.MARKERS.findall(README.read_text(encoding="utf-8"))
    assert found == script.table(), "run python scripts/update_models.py"
