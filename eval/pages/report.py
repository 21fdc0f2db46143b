# SPDX-License-Identifier: Apache-2.0
"""Writes the page: tables, plots, the tokens that were kept, answers that differ, and the provenance."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from vtprune.errors import ConfigError
from vtprune.eval.pages import tables
from vtprune.eval.pages.charts import chart, legend
from vtprune.eval.pages.pictures import Album, Picture, Thumbnails, dimmed, seams
from vtprune.eval.pages.plots import LINES, average_tokens, flops, styles
from vtprune.eval.pages.views import read_views, views_folder
from vtprune.eval.results.entries import rows
from vtprune.eval.results.finished import Asked, Comparison, comparisons
from vtprune.eval.results.records import json_lines, write_atomically
from vtprune.eval.results.terms import terms

SHOWN = 4
"""Number of examples whose kept tokens the page shows."""
LISTED = 4
"""Number of examples listed for each method, budget and kind of disagreement."""
_LONGEST = 400
"""Largest number of characters shown of a text that a data set or a model wrote."""

_TURNS = {"\u061c", "\u200e", "\u200f", *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}
"""Characters that change the direction of the text around them."""


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Writes one HTML file about the results in folders. The same results give the same file.

    Args:
        folders: with `results.jsonl` (and what lies beside it) of `vtprune eval`, `bench.jsonl` of `vtprune bench`, or
            both. Cells of the same model on the same questions stand in one comparison.
        path: the file.

    Raises:
        ConfigError: a folder has neither file, or cannot be read.
    """
    found = comparisons(folder for folder in folders if not _only_bench(folder))
    album = Album()
    sections = [_section(f"c{number}", comparison, album) for number, comparison in enumerate(found)]
    environment = Environment(
        loader=PackageLoader("vtprune.eval.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["said"] = said
    page = environment.get_template("report.html.j2").render(
        title=_title(found),
        sections=sections,
        benches=[(folder, bench) for folder in folders if (bench := _bench(folder))],
        album=album,
    )
    write_atomically(path, page.encode())


def said(text: Any) -> str:
    """A text of a data set or a model, cut to a length. Characters that would act on the page are made visible."""
    text = str(text)
    text = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return "".join(c if _harmless(c) else f"⟨U+{ord(c):04X}⟩" for c in text)


def mark(score: float) -> str:
    """A tick for 1, a cross for 0, else the number."""
    return "✓" if score == 1 else "✗" if score == 0 else f"{score:.2f}"


def _harmless(character: str) -> bool:
    return character in "\n\t" or (character not in _TURNS and unicodedata.category(character) not in ("Cc", "Cs"))


def _title(found: Sequence[Comparison]) -> str:
    return ", ".join(dict.fromkeys(comparison.task for comparison in found)) or "time and memory"


def _only_bench(folder: Path) -> bool:
    return (folder / "bench.jsonl").is_file() and not (folder / "results.jsonl").exists()


def _bench(folder: Path) -> dict[str, Any] | None:
    lines = json_lines(folder / "bench.jsonl")
    if not lines:
        return None
    from vtprune.eval.bench.table import NOTES, sheets

    # The notes are Markdown with words in stars and backticks.
    notes = re.sub(r"`(.+?)`", r"<code>\1</code>", re.sub(r"\*(.+?)\*", r"<em>\1</em>", escape(NOTES)))
    try:
        return {
            "sheets": list(sheets(lines)),
            "notes": Markup(notes),
            "facts": {key: lines[0][key] for key in ("device", "threads")} | lines[0]["versions"],
            "config": json.dumps(lines[0]["config"], indent=2),
        }
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / 'bench.jsonl'}: not of this version of vtprune; run `vtprune bench` again"
        ) from error


@dataclass(frozen=True)
class Seen:
    """The tokens that one row kept of an example, and its answer."""

    row: tables.Row
    drawing: Markup
    kept: int
    answer: str
    mark: str


@dataclass(frozen=True)
class Shown:
    """An example with the kept tokens and answers of all rows."""

    asked: Asked
    original: Markup
    answer: str
    """the full model's"""
    mark: str
    kind: str
    seen: dict[str, dict[tables.Budget, Seen]]
    """label -> budget -> the tokens that were kept"""


def _section(name: str, comparison: Comparison, album: Album) -> dict[str, Any]:
    """The values of the template for one comparison."""
    lines = comparison.lines
    kinds = list(comparison.full["family_scores"])
    apart = tables.disagreements(comparison)
    listed = [place for found in apart for place in (*found.lost[:LISTED], *found.won[:LISTED])]
    thumbnails = Thumbnails(comparison, album, max(listed, default=0))
    grid, words = rows(lines), terms(lines)
    return {
        "name": name,
        "terms": words,
        "comparison": comparison,
        "budgets": tables.budgets(comparison),
        "budget_name": tables.budget_name,
        "legend": legend(styles(grid)),
        "plots": [
            chart(f"{name}-tokens", lines, average_tokens, words.average),
            chart(f"{name}-flops", lines, flops, words.flops_of),
        ],
        "overview": tables.overview(comparison),
        "rankings": [(budget, tables.ranking(comparison, budget)) for budget in tables.budgets(comparison)],
        "published": any(line.get("published") for line in lines),
        "costs": list(tables.costs(comparison)),
        "kinds": kinds,
        "kind_plots": [
            (kind, chart(f"{name}-kind{number}", lines, average_tokens, words.tokens, kind, size=(3.6, 2.7)))
            for number, kind in enumerate(kinds)
        ],
        "families": [(budget, tables.families(comparison, budget)) for budget in tables.budgets(comparison)],
        "shown": list(_shown(comparison, album)),
        "disagreements": [
            {
                "row": found.row,
                "lost": len(found.lost),
                "won": len(found.won),
                "cards": {
                    title: [_card(comparison, place, found.row, thumbnails) for place in places[:LISTED]]
                    for title, places in (("Lost", found.lost), ("Won", found.won))
                    if places
                },
            }
            for found in apart
        ],
        "listed": LISTED,
        "thumbnails": thumbnails,
        "provenance": tables.provenance(comparison),
        "seeds": tables.seeds(comparison),
    }


def _shown(comparison: Comparison, album: Album) -> Iterator[Shown]:
    """The first examples with the tokens that every row kept; none if the runs left no views."""
    views = {}
    for folder in reversed(comparison.folders):
        views |= read_views(views_folder(folder, comparison.task, comparison.full["weights"]))
    full = comparison.answers[comparison.full["cell"]]
    for place, asked in enumerate(comparison.asked[:SHOWN]):
        view, path = views.get(asked.index, (None, None))
        if view is None or (view.question, view.data) != (asked.question, asked.data):
            continue
        picture = album.add(path.read_bytes())
        between = seams(view, picture)
        seen: dict[str, dict[tables.Budget, Seen]] = {}
        for row in tables.table_rows(comparison):
            answers = comparison.answers[row.seed_cell["cell"]]
            kept = answers.kept.get(asked.index)
            # A smaller image has tokens of its own.
            if kept is None or row.label in LINES or row.seed_cell["method"] == "downsample":
                continue
            words = f"{row.label} at {tables.budget_name(row.budget)}: {len(kept)} of {len(view.places)} tokens kept"
            drawing = picture.draw(words, dimmed(view, kept, picture) + between)
            found = Seen(row, drawing, len(kept), answers.predictions[place], mark(answers.scores[place]))
            seen.setdefault(row.label, {})[row.budget] = found
        original = picture.draw(f"what the encoder saw of example {asked.index}", between)
        yield Shown(asked, original, full.predictions[place], mark(full.scores[place]), view.kind, seen)


def _card(comparison: Comparison, place: int, row: tables.Row, thumbnails: Thumbnails) -> dict[str, Any]:
    """One example on which a row and the full model differ."""
    picture: Picture | None = thumbnails[place]
    asked = comparison.asked[place]
    return {
        "asked": asked,
        "picture": None if picture is None else picture.draw(f"example {asked.index}"),
        "wide": picture is not None and picture.width > 2 * picture.height,
        "full": comparison.answers[comparison.full["cell"]].predictions[place],
        "other": comparison.answers[row.seed_cell["cell"]].predictions[place],
    }
