# SPDX-License-Identifier: Apache-2.0
"""The plots of `vtprune.eval.pages.plots` as SVG inside a page, in its font and in colours that follow its theme.

Importing this module imports matplotlib. The plots show no text of a data set or a model: names stand in the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from vtprune.eval.pages.plots import COLOURS, GREYS, LINES, Style, panel
from vtprune.eval.results.entries import Entry
from vtprune.eval.results.records import Record
from vtprune.eval.results.terms import terms

VARIABLES = {colour: f"--c{index}" for index, colour in enumerate([*COLOURS, *GREYS])}
"""Colour of a row -> the CSS variable that stands for it in the page."""

_SHAPES = {
    "o": '<circle cx="6" cy="6" r="4"/>',
    "s": '<path d="M2 2h8v8H2z"/>',
    "D": '<path d="M6 .8 11.2 6 6 11.2.8 6z"/>',
    "^": '<path d="M6 1.5 11 10.5H1z"/>',
    "v": '<path d="M6 10.5 1 1.5h10z"/>',
    "<": '<path d="M1.5 6l9-5v10z"/>',
    "P": '<path d="M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z"/>',
    "X": '<path d="M1 3.2 3.2 1 6 3.8 8.8 1 11 3.2 8.2 6 11 8.8 8.8 11 6 8.2 3.2 11 1 8.8 3.8 6z"/>',
    "*": '<path d="M6 .5 7.5 4.3l4 .2-3.1 2.6 1 3.9L6 8.8l-3.4 2.2 1-3.9L.5 4.5l4-.2z"/>',
}
"""matplotlib's markers in a box of 12 x 12, for the legend."""


def chart(
    name: str,
    results: Sequence[Record],
    cost: Callable[[Entry], float],
    label: str,
    family: str | None = None,
    size: tuple[float, float] = (5.6, 4.2),
) -> Markup:
    """One plot of accuracy against a cost.

    Args:
        name: is different for each plot of the page.
        results: lines of `results.jsonl`.
        cost: the value of a row on the horizontal axis.
        label: of the horizontal axis.
        family: show only this kind of question, without intervals.
        size: in inches of 72 pixels; the page scales the plot.
    """
    # Text stays text. Ids come from the name, so that the same results give the same page.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        axes.set_facecolor("none")
        panel(axes, results, cost, family)
        axes.set_xlabel(label)
        axes.set_ylabel(terms(results).axis)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _themed(file.getvalue(), name)


def _themed(svg: str, name: str) -> Markup:
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", svg, flags=re.DOTALL)  # the style would apply to the whole page
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda match: _css(match[0]), svg)
    svg = re.sub(r"; font-family: [^;\"]*", "", svg)
    svg = re.sub(r"(\.\d\d)\d+", r"\1", svg)  # hundredths of a pixel
    # All plots of a page share one space of ids.
    svg = re.sub(r'(\bid="|(?:xlink:)?href="#|url\(#)', rf"\1{name}-", svg)
    box = re.search(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index(">") + 1 :]
    return Markup(f'<svg {box} class="chart" role="img" aria-label="accuracy against cost" fill="currentColor">{body}')


def _css(colour: str) -> str:
    if colour == "#000000":
        return "currentColor"
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour


def legend(styles: Mapping[str, Style]) -> list[tuple[str, Markup]]:
    """(label, its sign) of every row."""
    lines = [(label, Markup('<path d="M0 6h12" class="{}"/>').format(label)) for label in LINES]
    drawn = [
        (label, Markup('<g style="fill:{}">{}</g>').format(Markup(_css(style.colour)), Markup(_SHAPES[style.marker])))
        for label, style in styles.items()
    ]
    return [
        (label, Markup('<svg class="sign" viewBox="0 0 12 12">{}</svg>').format(sign)) for label, sign in lines + drawn
    ]
