# SPDX-License-Identifier: Apache-2.0
"""Lines of `results.jsonl` put together: the seeds of a row, the rows of a method, the results of a study."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from vtprune.eval.results.aggregated import POINTS
from vtprune.eval.results.records import Record
from vtprune.eval.results.status import OK, status_text


@dataclass(frozen=True)
class Entry:
    """One method at one budget: the lines of all its seeds."""

    cells: tuple[Record, ...]

    @property
    def status(self) -> str:
        """ "ok", or the reason why there are no numbers."""
        first = self.cells[0]
        return status_text(first["status"], first.get("floor"))

    @property
    def ok(self) -> bool:
        return self.cells[0]["status"] == OK

    def mean(self, key: str) -> float | None:
        """Mean over the seeds; None if a cell has no such number. Of a `score` in points it is the hundredth part."""
        values = [cell[key] for cell in self.cells]
        return None if None in values else mean(values) * (self._scale if key == "score" else 1)

    def family(self, name: str) -> float:
        """Mean score over the seeds for one kind of question."""
        return mean(cell["family_scores"][name] for cell in self.cells) * self._scale

    @property
    def spread(self) -> float | None:
        """Standard deviation of the score over the seeds, None for a single one."""
        return stdev(cell["score"] for cell in self.cells) * self._scale if len(self.cells) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score; over several seeds the mean of their bounds. None if a cell has none."""
        found = self.bounds("ci")
        return None if found is None else (found[0] * self._scale, found[1] * self._scale)

    @property
    def _scale(self) -> float:
        """Tables, plots and pages show a share times 100. A hundredth of points they show as the points are."""
        return 0.01 if self.cells[0].get("score_unit") == POINTS else 1

    def bounds(self, key: str) -> tuple[float, float] | None:
        """Mean over the seeds of the bounds of an interval; None if a cell has none."""
        intervals = [cell[key] for cell in self.cells]
        return None if None in intervals else (mean(i[0] for i in intervals), mean(i[1] for i in intervals))


def rows(results: Sequence[Record]) -> dict[str, dict[float, Entry]]:
    """Label of a method -> keep ratio as asked for -> its entry, in the order of the results."""
    grouped: dict[str, dict[float, list[Record]]] = {}
    for record in results:
        grouped.setdefault(record["label"], {}).setdefault(record["keep_ratio"], []).append(record)
    return {
        label: {ratio: Entry(tuple(cells)) for ratio, cells in by_ratio.items()} for label, by_ratio in grouped.items()
    }


def ratios(results: Sequence[Record]) -> list[float]:
    """The ratios of the grid, largest first."""
    given = {record["keep_ratio"] for record in results} - {None}
    return sorted((ratio for ratio in given if 0 < ratio < 1), reverse=True)


def conditions(line: Record) -> str:
    """The axes that have several values in the run, with the line's: `, dtype bfloat16, device cuda`; else nothing."""
    return "".join(f", {name} {value}" for name, value in line.get("axes", {}).items())


def studies(results: Sequence[Record]) -> dict[str, list[Record]]:
    """Suffix of the plots' names -> the results of one model on one task, under one value of each axis.

    A single study has the suffix \"\".
    """
    grouped: dict[tuple[str, str, str], list[Record]] = {}
    for record in results:
        grouped.setdefault((record["task"], record["model"], conditions(record)), []).append(record)
    if len(grouped) == 1:
        return {"": list(results)}
    named: dict[str, list[Record]] = {}
    for number, ((task, model, _), lines) in enumerate(grouped.items(), start=1):
        words = (Path(model).name, *lines[0].get("axes", {}).values())
        named[f"-{number}-{task}-{re.sub(r'[^A-Za-z0-9.]+', '-', '-'.join(words))}"] = lines
    return named
