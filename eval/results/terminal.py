# SPDX-License-Identifier: Apache-2.0
"""The table of a study for the terminal: in 80 columns, with a line for each method and budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from vtprune.eval.results.entries import Entry, conditions, rows
from vtprune.eval.results.formatting import (
    MISSING,
    flops_share,
    latency,
    loyalty,
    milliseconds,
    percent,
    short_gain,
)
from vtprune.eval.results.reasons import Reasons
from vtprune.eval.results.records import Record
from vtprune.eval.results.terms import ACCURACY, terms
from vtprune.eval.results.timings import Latency


def terminal_table(results: Sequence[Record], times: Mapping[str, Latency]) -> Group:
    """Methods and budgets, one a line; below, why rows have no numbers. `summary.md` has intervals and more columns.

    Args:
        results: lines of `results.jsonl` of one model on one task.
        times: name of a cell -> its latency.
    """
    first, words = results[0], terms(results)
    reasons = Reasons(results)
    # A study without a smaller image has no such columns.
    against = any(line["gain"] is not None or line["hard_score"] is not None for line in results)
    table = Table(
        title=escape(f"{first['task']}, {first['model']}{conditions(first)}, {first['n']} examples"),
        box=None,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", overflow="fold", min_width=8)
    is_accuracy = words.score == ACCURACY
    score = ACCURACY if is_accuracy else "score"  # the names of metrics are long
    heads = ["asked", score, *(("gain", "hard") if against else ()), "loyal", words.short, "FLOPs", "ms"]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for label, by_ratio in rows(results).items():
        for place, (ratio, entry) in enumerate(by_ratio.items()):
            asked = "" if ratio in (None, 0.0, 1.0) else f"{100 * ratio:g} %"
            numbers = _numbers(entry, against, times) if entry.ok else [f"see {reasons.mark(entry)}"]
            table.add_row("" if place else escape(label), asked, *map(escape, numbers))
    notes = [f"[{number}] {text}" for number, text in enumerate(reasons.texts, start=1)]
    in_percent = [*([ACCURACY] if is_accuracy else []), *(["hard"] if against else []), "loyal"]
    explained = [
        *([] if is_accuracy else [f"score: {words.scored};"]),
        f"{', '.join(in_percent)}: in %, ± over seeds; asked: share of {words.short} asked for;",
        *(_AGAINST if against else ()),
        f"loyal: answers that are the full model's; {words.short}: {words.final};",
        f"FLOPs: share of the unpruned {words.flops_name} in %; ms: one example, measured",
    ]
    return Group(table, Text("\n".join(explained), style="dim"), *(Text(note) for note in notes))


_AGAINST = (
    "gain: points over a smaller image of as many tokens (≈: interpolated, – : none);",
    "hard: only what the full model gets right and the smaller image wrong;",
)


def _numbers(entry: Entry, against: bool, times: Mapping[str, Latency]) -> list[str]:
    spread = "" if entry.spread is None else f" ±{100 * entry.spread:.1f}"
    spent = latency(entry, times)
    return [
        percent(entry.mean("score")) + spread,
        *((short_gain(entry), percent(entry.mean("hard_score"))) if against else ()),
        loyalty(entry),
        f"{entry.mean('final_tokens'):.1f}",
        f"{100 * flops_share(entry):.0f}",
        MISSING if spent is None else milliseconds(spent.whole),
    ]
