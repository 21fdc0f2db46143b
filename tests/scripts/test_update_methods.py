# SPDX-License-Identifier: Apache-2.0
"""docs/methods.md is the page that the methods give."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from vtprune import catalogue

SCRIPT = "update_methods"


def test_the_page_is_current(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run python scripts/update_methods.py"


@pytest.mark.parametrize("name", catalogue.CLASSES)
def test_a_method_with_a_paper_states_its_deviations(script, name):
    method = catalogue.load(name)
    assert script.identifier(method) == "" or "Deviation" in method.__doc__


def test_every_vector_is_counted(script):
    golden = Path(__file__).parents[1] / "golden"
    counted = script.vectors()
    assert counted.total() == len(list(golden.glob("*.npz")))
    assert counted["glsim"] == 1 and counted["glsim_patches"] == 0


def test_deviations_end_with_their_sentence(script):
    @dataclass
    class Method:
        """Does it.

        Deviations (there is no code): one thing (the
        reference; it fails. Always); another. This is something else; and this.
        """

    assert script.deviations(Method) == ["one thing (the reference; it fails. Always)", "another"]
