# SPDX-License-Identifier: Apache-2.0
"""The numbers of a page as rows: which rows are compared with which, and the words for the outcome."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from vtprune.eval.pages.plots import LINES
from vtprune.eval.results.entries import Entry, rows
from vtprune.eval.results.finished import Comparison
from vtprune.eval.results.formatting import (
    MISSING,
    accuracy,
    bounds,
    flops,
    flops_share,
    gain,
    hard,
    latency,
    loyalty,
    milliseconds,
    percent,
    points,
    tokens_per_correct,
)
from vtprune.eval.results.reasons import Reasons
from vtprune.eval.results.records import Record
from vtprune.eval.results.statistics import Difference, corrected, difference
from vtprune.eval.results.terms import terms
from vtprune.eval.results.timings import Latency

Budget = float | None


@dataclass(frozen=True)
class Row:
    """A method at a budget."""

    label: str
    budget: Budget
    entry: Entry

    @property
    def seed_cell(self) -> Record:
        """The line of its first seed."""
        return self.entry.cells[0]


def table_rows(comparison: Comparison) -> list[Row]:
    """All rows with numbers, in the order of the results."""
    return [
        Row(label, budget, entry)
        for label, by_budget in rows(comparison.lines).items()
        for budget, entry in by_budget.items()
        if entry.ok
    ]


def budgets(comparison: Comparison) -> list[Budget]:
    """The budgets of the grid, largest first; None, at the end, for counts and for methods' own schedules."""
    found = {line["keep_ratio"] for line in comparison.lines if line["label"] not in LINES}
    shares = sorted((budget for budget in found if budget is not None), reverse=True)
    return [*shares, *([None] if None in found else [])]


def budget_name(budget: Budget) -> str:
    """For people."""
    return "own budget" if budget is None else f"{100 * budget:.4g} %"


# -- accuracy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A method at a budget in the overview."""

    text: str
    detail: str = ""
    warmth: float | None = None
    """0 for the score without visual tokens, 1 for the full model's score"""


def overview(comparison: Comparison, reasons: Reasons) -> list[tuple[str, list[Place]]]:
    """(label, a place for each budget); the rows of `LINES` have a single place."""
    zero = [row.entry.mean("score") for row in table_rows(comparison) if row.label == "zero"]
    floor, ceiling = (zero or [0.0])[0], Entry((comparison.full,)).mean("score")

    def place(entry: Entry | None) -> Place:
        if entry is None:
            return Place(MISSING)
        if not entry.ok:
            return Place(reasons.of(entry))
        score = entry.mean("score")
        spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
        warmth = min(1.0, max(0.0, (score - floor) / (ceiling - floor))) if ceiling > floor else None
        kept = entry.mean("retention")
        return Place(percent(score) + spread, "" if kept is None else f"keeps {percent(kept)} %", warmth)

    found = []
    for label, by_budget in rows(comparison.lines).items():
        if label in LINES:
            found.append((label, [place(next(iter(by_budget.values())))]))
        else:
            found.append((label, [place(by_budget.get(budget)) for budget in budgets(comparison)]))
    return found


@dataclass(frozen=True)
class Verdict:
    """One row compared with another row."""

    text: str
    """difference in points of accuracy, its interval"""
    p: str
    sign: str
    """"better", "worse" or "open" """


def verdict(found: Difference) -> Verdict:
    """The words for a difference."""
    low, high = found.interval
    sign = "open" if not found.significant else "better" if found.mean > 0 else "worse"
    p = "p < 0.001" if found.p < 0.001 else f"p = {found.p:.3f}" if found.p < 0.1 else f"p = {found.p:.2f}"
    return Verdict(f"{points(found.mean)} [{points(low)}, {points(high)}]", p, sign)


@dataclass(frozen=True)
class Standing:
    """A row of a ranking at one budget."""

    row: Row
    accuracy: str
    retention: str
    gain: str
    hard: str
    loyalty: str
    tokens: str
    cost: str
    below: Verdict | None
    """against the next row of the ranking"""
    random: Verdict | None
    """against random tokens at the same budget"""
    published: str | None
    """what the paper of a preset reports"""


def ranking(comparison: Comparison, budget: Budget) -> list[Standing]:
    """The rows at a budget and those of `LINES`, best first, each compared with the next one."""
    chosen = [row for row in table_rows(comparison) if row.label in LINES or row.budget == budget]
    chosen.sort(key=lambda row: row.entry.mean("score"), reverse=True)  # stable: ties stay in the order of the results
    drawn = next((row for row in chosen if row.seed_cell["method"] in ("random", "random_patches")), None)

    def against(others: Sequence[Row | None]) -> list[Verdict | None]:
        """Compares each row with the one in `others`, if any; p values are corrected for the number of comparisons."""
        pairs = [(row, other) for row, other in zip(chosen, others, strict=True) if other is not None]
        found = [difference(comparison.scores(row.entry), comparison.scores(other.entry)) for row, other in pairs]
        verdicts = map(verdict, corrected(found))
        return [None if other is None else next(verdicts) for other in others]

    below = against([*chosen[1:], None] if chosen else [])
    random = against([None if row is drawn or row.label in LINES else drawn for row in chosen])
    return [
        Standing(
            row,
            accuracy(row.entry),
            retention(row.entry),
            gain(row.entry),
            hard(row.entry),
            loyalty(row.entry),
            f"{row.entry.mean('final_tokens'):.1f}",
            percent(flops_share(row.entry)),
            against_next,
            against_random,
            published(row.seed_cell),
        )
        for row, against_next, against_random in zip(chosen, below, random, strict=True)
    ]


def retention(entry: Entry) -> str:
    """Share of the full model's accuracy, paired interval; over several seeds the means, ± standard deviation."""
    values = [cell["retention"] for cell in entry.cells]
    if None in values:
        return MISSING
    spread = f" ±{100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{percent(mean(values))}{spread}{bounds(entry.bounds('retention_ci'))}"


def published(line: Record) -> str | None:
    """The number of a paper for a row, and our distance from it; None for rows without a published number."""
    given = line.get("published")
    if not given:
        return None
    ours = line["retention"] if given["metric"] == "retention" else line["score"]
    apart = "" if ours is None else f", ours {100 * (ours - given['value']):+.1f}"
    where = f"{given['benchmarks']}; {given['source']}, {given['table']}"
    return f"{percent(given['value'])} ({given['metric']}{apart}; {where})"


# -- cost -------------------------------------------------------------------------------------------------------------


def costs(comparison: Comparison, times: Mapping[str, Latency]) -> Iterator[tuple[Row, dict[str, str]]]:
    """Every row with its measured cost of one example. times: name of a cell -> its latency."""
    words = terms(comparison.lines)
    for row in table_rows(comparison):
        entry, spent = row.entry, latency(row.entry, times)
        cells = {
            words.final: f"{entry.mean('final_tokens'):.1f}",
            f"{words.short}, mean of layers": f"{entry.mean('average_tokens'):.1f}",
            "kept, %": percent(entry.mean("measured_keep_ratio")),
            f"{words.short} per right answer": tokens_per_correct(entry),
        }
        if words.classifies:
            cells |= {
                "encoder": flops(entry.mean("encoder_flops")),
                "encoder, %": percent(flops_share(entry)),
                "images/s": MISSING if spent is None else f"{spent.per_second:.0f}",
            }
        else:
            cells |= {
                "prefill": flops(entry.mean("prefill_flops")),
                "prefill, %": percent(flops_share(entry)),
                "KV cache": size(entry.mean("kv_bytes")),
                "KV cache, %": percent(entry.mean("kv_bytes") / entry.mean("unpruned_kv_bytes")),
                "prefill, ms": MISSING if spent is None else milliseconds(spent.prefill),
                "answer, ms": MISSING if spent is None else milliseconds(spent.whole),
            }
        yield row, cells


def size(count: float) -> str:
    """Bytes with a unit."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


# -- kinds of question, and single answers ----------------------------------------------------------------------------


def families(comparison: Comparison, budget: Budget) -> list[tuple[Row, list[tuple[str, float]]]]:
    """Rows at a budget, and those of `LINES`, with (score as text, how warm it is) of every kind of question."""
    names = list(comparison.full["family_scores"])
    return [
        (row, [(percent(score), min(1.0, score)) for score in map(row.entry.family, names)])
        for row in table_rows(comparison)
        if row.label in LINES or row.budget == budget
    ]


@dataclass(frozen=True)
class Disagreement:
    """The examples on which a row and the full model differ."""

    row: Row
    lost: list[int]
    """places in `asked` where the full model has the higher score, widest gaps first"""
    won: list[int]
    """places where the row has the higher score"""


def disagreements(comparison: Comparison) -> list[Disagreement]:
    """One for each method and budget; if there are several seeds, of the first one."""
    full = comparison.answers[comparison.full["cell"]].scores
    found = []
    for row in table_rows(comparison):
        if row.label not in LINES:
            gap = full - comparison.answers[row.seed_cell["cell"]].scores
            order = sorted(range(len(gap)), key=lambda place: -abs(gap[place]))
            found.append(Disagreement(row, [i for i in order if gap[i] > 0], [i for i in order if gap[i] < 0]))
    return found


# -- provenance -------------------------------------------------------------------------------------------------------


def provenance(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """(configuration as JSON, facts) of every state of code and configuration that the numbers come from."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in comparison.lines:
        config = json.dumps(line["config"], indent=2)
        facts = [*line["versions"].items(), ("fingerprint of the weights", line["weights"])]
        found.setdefault(json.dumps([facts, config]), [("configuration", config), *facts])
    return [(facts[0][1], facts[1:]) for facts in found.values()]


def seeds(comparison: Comparison) -> list[tuple[str, Any]]:
    """(label, seeds) of the rows with random numbers."""
    found: dict[str, list[Any]] = {}
    for line in comparison.lines:
        if line["seed"] is not None:
            found.setdefault(line["label"], []).append(line["seed"])
    return [(label, ", ".join(map(str, dict.fromkeys(drawn)))) for label, drawn in found.items()]
