# SPDX-License-Identifier: Apache-2.0
"""The plots: every row has a sign of its own, in the pictures and on the page, and all of the legend is there."""

import re
from pathlib import Path

import pytest

from vtprune.eval.pages import charts, plots
from vtprune.eval.results.entries import Entry

CSS = Path(plots.__file__).parent / "templates" / "style.css.j2"
MANY = 30


def grid(methods):
    """A row for each method, its label unlike all others."""
    return {f"{method} {number}": {0.5: Entry(({"method": method},))} for number, method in enumerate(methods)}


@pytest.mark.parametrize("methods", [["fastv"] * MANY, ["random"] * MANY, ["fastv", "pool", "random"] * (MANY // 3)])
def test_thirty_rows_have_thirty_signs(methods):
    found = plots.styles(grid(methods))
    assert len({(style.colour, style.marker) for style in found.values()}) == len(found) == MANY
    assert len({str(sign) for _, sign in charts.legend(found)}) == MANY + len(plots.LINES)


def test_baselines_are_grey_and_methods_are_not():
    found = plots.styles(grid(["pool", "fastv", "full"]) | grid(["zero"]))
    assert (found["pool 0"].colour, found["pool 0"].baseline) == (plots.GREYS[0], True)
    assert (found["fastv 1"].colour, found["fastv 1"].baseline) == (plots.COLOURS[0], False)


def test_the_page_has_a_colour_of_its_own_for_each_of_them_in_both_themes():
    light, dark = re.findall(r":root \{(.*?)\}", CSS.read_text(), re.DOTALL)
    for theme in (light, dark):
        colours = dict(re.findall(r"(--c\d+): (#\w+);", theme))
        assert list(colours) == list(charts.VARIABLES.values())
        assert len(set(colours.values())) == len(colours) == len(plots.COLOURS) + len(plots.GREYS)
