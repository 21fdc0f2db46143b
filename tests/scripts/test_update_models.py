# SPDX-License-Identifier: Apache-2.0
"""docs/models.md has the table of models that the adapters give."""

SCRIPT = "update_models"


def test_the_page_has_the_table(script):
    (found,) = script.MARKERS.findall(script.PAGE.read_text(encoding="utf-8"))
    assert found == script.table(), "run python scripts/update_models.py"
