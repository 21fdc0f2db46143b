# SPDX-License-Identifier: Apache-2.0
"""Footnotes: why rows of a table have no numbers."""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.eval.results.entries import Entry, rows
from vtprune.eval.results.formatting import at_budget
from vtprune.eval.results.records import Record


class Reasons:
    """The numbered reasons of one study. A row whose budgets all have the same reason has one.

    Args:
        results: lines of `results.jsonl`.
    """

    def __init__(self, results: Sequence[Record]):
        found: dict[tuple[str, str, str], list[str]] = {}
        for by_ratio in rows(results).values():
            for ratio, entry in by_ratio.items():
                if not entry.ok:
                    found.setdefault(_key(entry), []).append(at_budget(ratio).removeprefix(" at "))
        self._numbers = {key: number for number, key in enumerate(found, start=1)}
        self.texts = [_text(*key, list(filter(None, budgets))) for key, budgets in found.items()]
        """the footnotes, from number 1 on"""

    def mark(self, entry: Entry) -> str:
        """The footnote's number as it stands in a table, e.g. `[2]`; the row has no numbers."""
        return f"[{self._numbers[_key(entry)]}]"

    def of(self, entry: Entry) -> str:
        """What stands in a table instead of numbers: the status and the footnote's number."""
        return f"{entry.status} {self.mark(entry)}"


def _key(entry: Entry) -> tuple[str, str, str]:
    line = entry.cells[0]
    return line["label"], entry.status, line.get("reason") or "the results do not say why"


def _text(label: str, status: str, reason: str, budgets: Sequence[str]) -> str:
    return f"{label}{' at ' if budgets else ''}{', '.join(budgets)}: {status}: {reason}"
