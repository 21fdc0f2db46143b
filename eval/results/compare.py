# SPDX-License-Identifier: Apache-2.0
"""`vtprune compare`: compares the rows that two runs have in common, example by example."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from vtprune.errors import ConfigError
from vtprune.eval.results.entries import Entry, rows
from vtprune.eval.results.finished import Comparison, comparisons
from vtprune.eval.results.formatting import percent
from vtprune.eval.results.lmms_logs import is_log
from vtprune.eval.results.statistics import Difference, corrected, difference
from vtprune.eval.results.terms import ACCURACY, terms

_COLOURS = {"better": "green", "worse": "red", "same": "dim"}


@dataclass(frozen=True)
class Side:
    """A method at a budget in one of two runs."""

    comparison: Comparison
    label: str
    keep_ratio: float | None
    entry: Entry

    @property
    def name(self) -> str:
        budget = "" if self.keep_ratio in (None, 0.0, 1.0) else f" at {100 * self.keep_ratio:g} %"
        return f"{self.comparison.task}: {self.label}{budget}"

    @property
    def seeds(self) -> list[int | None]:
        return [line["seed"] for line in self.entry.cells]

    @property
    def scores(self) -> np.ndarray:
        """(examples,) the mean over the seeds."""
        return self.comparison.scores(self.entry)

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @property
    def predictions(self) -> list[str]:
        """The predictions of all seeds, one after another."""
        return [said for line in self.entry.cells for said in self.comparison.answers[line["cell"]].predictions]


@dataclass(frozen=True)
class Pair:
    """A method at a budget in both runs."""

    first: Side
    second: Side
    difference: Difference
    """the second run less the first; p corrected for the number of rows (Holm)"""

    @property
    def changed(self) -> float:
        """Share of the answers, of all seeds, that differ."""
        both = list(zip(self.first.predictions, self.second.predictions, strict=True))
        return sum(first != second for first, second in both) / len(both)

    @property
    def verdict(self) -> str:
        """ "better" or "worse" if the second run is so significantly, else "same"."""
        if not self.difference.significant:
            return "same"
        return "better" if self.difference.mean > 0 else "worse"


@dataclass(frozen=True)
class Compared:
    """Two runs of the same tasks, paired."""

    pairs: list[Pair]
    only: tuple[list[str], list[str]]
    """names of the rows with scores that only this run has"""

    @property
    def worse(self) -> bool:
        """Whether the second run is significantly worse anywhere."""
        return any(pair.verdict == "worse" for pair in self.pairs)


def compare(first: Path, second: Path) -> Compared:
    """Pairs the rows of two folders of results.

    Raises:
        ConfigError: a folder cannot be read, the runs asked other questions, or they have no row in common.
    """
    runs = [_by_task(folder) for folder in (first, second)]
    if set(runs[0]) != set(runs[1]):
        names = " and ".join(", ".join(sorted(run)) for run in runs)
        raise ConfigError(f"{first} and {second} hold different tasks: {names}")
    both: list[tuple[Side, Side]] = []
    only: tuple[list[str], list[str]] = ([], [])
    for task, comparison in runs[0].items():
        _check_questions(comparison, runs[1][task], first, second)
        ours, theirs = _sides(comparison), _sides(runs[1][task])
        if is_log(first) and is_log(second):  # each is a run of one row, whose methods are what is compared
            ours, theirs = (dict(enumerate(sides.values())) for sides in (ours, theirs))
        both += [(ours[key], theirs[key]) for key in ours if key in theirs]
        for names, sides, others in zip(only, (ours, theirs), (theirs, ours), strict=True):
            names += [side.name for key, side in sides.items() if key not in others]
    if not both:
        raise ConfigError(f"{first} and {second} have no row in common")
    for ours, theirs in both:
        if ours.label == theirs.label and ours.seeds != theirs.seeds:
            raise ConfigError(f"{ours.name}: seeds {ours.seeds} in {first}, {theirs.seeds} in {second}")
    gaps = corrected([difference(theirs.scores, ours.scores) for ours, theirs in both])
    return Compared([Pair(ours, theirs, gap) for (ours, theirs), gap in zip(both, gaps, strict=True)], only)


def _by_task(folder: Path) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    for comparison in comparisons([folder], needs_full=False):
        if comparison.task in found:
            names = f"{found[comparison.task].model} and {comparison.model}"
            raise ConfigError(f"{folder}: {comparison.task} was run on several models ({names}); compare runs of one")
        found[comparison.task] = comparison
    return found


def _check_questions(ours: Comparison, theirs: Comparison, first: Path, second: Path) -> None:
    counts = len(ours.asked), len(theirs.asked)
    if counts[0] != counts[1]:
        raise ConfigError(
            f"{ours.task}: {counts[0]} examples in {first}, {counts[1]} in {second}; run both with the same limit"
        )
    for our_question, their_question in zip(ours.asked, theirs.asked, strict=True):
        if our_question == their_question:
            continue
        if replace(our_question, data=None) == replace(their_question, data=None):
            raise ConfigError(
                f"{ours.task}: example {our_question.index}, {our_question.question!r}, has other pictures or settings "
                f"in {first} than in {second}; run both on the same data"
            )
        raise ConfigError(
            f"{ours.task}: example {our_question.index} is {our_question.question!r} ({our_question.answer!r}) in "
            f"{first}, {their_question.question!r} ({their_question.answer!r}) in {second}"
        )


def _sides(comparison: Comparison) -> dict[tuple[str, float | None], Side]:
    return {
        (label, ratio): Side(comparison, label, ratio, entry)
        for label, by_ratio in rows(comparison.lines).items()
        for ratio, entry in by_ratio.items()
        if entry.ok
    }


def terminal_tables(compared: Compared) -> Iterator[Table]:
    """A table for each task with a line for each row: both accuracies, their difference and its significance."""
    for task in dict.fromkeys(pair.first.comparison.task for pair in compared.pairs):
        table = Table(
            title=escape(task),
            caption=f"{_scored(compared, task)} in %; difference: the second run less the first in points, "
            f"paired 95 % bootstrap interval; p: corrected for {len(compared.pairs)} rows (Holm); "
            "changed: answers that are others",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("method", overflow="fold", min_width=8)
        for heading in ("asked", "first", "second", "difference", "p", "changed", "verdict"):
            table.add_column(heading, justify="right", no_wrap=True)
        for pair in compared.pairs:
            if pair.first.comparison.task == task:
                table.add_row(*_cells(pair))
        yield table


def _scored(compared: Compared, task: str) -> str:
    """What the numbers of a task are: a metric of lmms-eval need not be a mean over documents, so these stand alone."""
    lines = next(pair.first.comparison.lines for pair in compared.pairs if pair.first.comparison.task == task)
    return ACCURACY if terms(lines).score == ACCURACY else "score of single documents"


def _asked(*ratios: float | None) -> str:
    """The budget of both runs, or of each if they differ."""
    return ", ".join("" if ratio is None else f"{100 * ratio:g} %" for ratio in dict.fromkeys(ratios))


def _cells(pair: Pair) -> list[str]:
    side, (low, high) = pair.first, pair.difference.interval
    return [
        escape(side.label if side.label == pair.second.label else f"{side.label}, then {pair.second.label}"),
        _asked(side.keep_ratio, pair.second.keep_ratio),
        percent(side.score),
        percent(pair.second.score),
        f"{100 * pair.difference.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]",
        f"{pair.difference.p:.3f}",
        f"{100 * pair.changed:.0f} %",
        f"[{_COLOURS[pair.verdict]}]{pair.verdict}[/]",
    ]
