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
from vtprune.eval.results.finished import Asked, Comparison, comparisons
from vtprune.eval.results.formatting import at_budget, percent
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
    places: list[int]
    """of the compared questions in `comparison.asked`"""

    @property
    def name(self) -> str:
        return f"{self.comparison.task}{self.comparison.conditions}: {self.label}{at_budget(self.keep_ratio)}"

    @property
    def seeds(self) -> list[int | None]:
        return [line["seed"] for line in self.entry.cells]

    @property
    def scores(self) -> np.ndarray:
        """(compared questions,) the mean over the seeds."""
        return self.comparison.scores(self.entry)[self.places]

    @property
    def score(self) -> float:
        return float(self.scores.mean())

    @property
    def predictions(self) -> list[str]:
        """The predictions of all seeds, one after another."""
        answers = [self.comparison.answers[line["cell"]].predictions for line in self.entry.cells]
        return [said[place] for said in answers for place in self.places]


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
    shared: list[str]
    """what is compared, for each task of which a run has questions that the other has not"""

    @property
    def worse(self) -> bool:
        """Whether the second run is significantly worse anywhere."""
        return any(pair.verdict == "worse" for pair in self.pairs)


def compare(first: Path, second: Path) -> Compared:
    """Pairs the rows of two folders of results, on the questions that both runs asked.

    Raises:
        ConfigError: a folder cannot be read, no question is in both runs or it is not certain which are, or they have
            no row in common.
    """
    runs = [_by_task(folder) for folder in (first, second)]
    if set(runs[0]) != set(runs[1]):
        names = " and ".join(", ".join(sorted(run)) for run in runs)
        raise ConfigError(f"{first} and {second} hold different tasks: {names}")
    both: list[tuple[Side, Side]] = []
    only: tuple[list[str], list[str]] = ([], [])
    shared: list[str] = []
    for task, comparison in runs[0].items():
        other = runs[1][task]
        places = _common_places(comparison, other, first, second)
        counts = len(comparison.asked), len(other.asked)
        if len(places) < max(counts):
            of = f"{counts[0]} in {first}, {counts[1]} in {second}"
            shared.append(f"{task}: compared on the {len(places)} questions that both runs asked ({of})")
        mine, others = ([pair[side] for pair in places] for side in (0, 1))
        ours, theirs = _sides(comparison, mine), _sides(other, others)
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
    return Compared([Pair(ours, theirs, gap) for (ours, theirs), gap in zip(both, gaps, strict=True)], only, shared)


def _by_task(folder: Path) -> dict[str, Comparison]:
    found: dict[str, Comparison] = {}
    for comparison in comparisons([folder], needs_full=False):
        task = comparison.task + comparison.conditions
        if task in found:
            names = f"{found[task].model} and {comparison.model}"
            raise ConfigError(f"{folder}: {task} was run on several models ({names}); compare runs of one")
        found[task] = comparison
    return found


def _common_places(ours: Comparison, theirs: Comparison, first: Path, second: Path) -> list[tuple[int, int]]:
    """The places in both lists of questions of each question that both runs asked.

    Questions with the same number are the same if all that is known of them is. If it is not, the runs had other lists
    of questions. Then all questions of the shorter list must be in the other one, and none may be there twice.
    """
    numbers = [{asked.index: place for place, asked in enumerate(run.asked)} for run in (ours, theirs)]
    found = [(numbers[0][index], numbers[1][index]) for index in numbers[0] if index in numbers[1]]
    unlike = [(a, b) for a, b in found if ours.asked[a] != theirs.asked[b]]
    if unlike:
        known = [{replace(asked, index=0): place for place, asked in enumerate(run.asked)} for run in (ours, theirs)]
        found = [(known[0][asked], known[1][asked]) for asked in known[0] if asked in known[1]]
        once = all(len(alike) == len(run.asked) for alike, run in zip(known, (ours, theirs), strict=True))
        if not once or len(found) < min(map(len, known)):
            raise ConfigError(
                f"{ours.task}: {_difference(ours.asked[unlike[0][0]], theirs.asked[unlike[0][1]], first, second)}"
            )
    if not found:
        raise ConfigError(f"{ours.task}: {first} and {second} have no question in common")
    return found


def _difference(ours: Asked, theirs: Asked, first: Path, second: Path) -> str:
    if replace(ours, data=None) == replace(theirs, data=None):
        return (
            f"example {ours.index}, {ours.question!r}, has other pictures or settings in {first} than in {second}; run "
            "both on the same data"
        )
    return (
        f"example {ours.index} is {ours.question!r} ({ours.answer!r}) in {first}, {theirs.question!r} "
        f"({theirs.answer!r}) in {second}"
    )


def _sides(comparison: Comparison, places: list[int]) -> dict[tuple[str, float | None], Side]:
    return {
        (label, ratio): Side(comparison, label, ratio, entry, places)
        for label, by_ratio in rows(comparison.lines).items()
        for ratio, entry in by_ratio.items()
        if entry.ok
    }


def terminal_tables(compared: Compared) -> Iterator[Table]:
    """A table for each task with a line for each row: both accuracies, their difference and its significance."""
    for comparison in {id(pair.first.comparison): pair.first.comparison for pair in compared.pairs}.values():
        table = Table(
            title=escape(comparison.task + comparison.conditions),
            caption=f"{_scored(comparison)} in %; difference: the second run less the first in points, paired 95 % "
            f"bootstrap interval; p: corrected for {len(compared.pairs)} rows (Holm); changed: answers that differ",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        table.add_column("method", overflow="fold", min_width=8)
        for heading in ("asked", "first", "second", "difference", "p", "changed", "verdict"):
            table.add_column(heading, justify="right", no_wrap=True)
        for pair in compared.pairs:
            if pair.first.comparison is comparison:
                table.add_row(*_cells(pair))
        yield table


def _scored(comparison: Comparison) -> str:
    """What the numbers of a task are: a metric of lmms-eval need not be a mean over documents, so these stand alone."""
    return ACCURACY if terms(comparison.lines).score == ACCURACY else "score of single documents"


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
