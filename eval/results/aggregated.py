# SPDX-License-Identifier: Apache-2.0
"""Scores of a cell that are not the mean over its examples: metrics of lmms-eval with their own aggregation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vtprune.errors import ConfigError
from vtprune.eval.results.records import Record
from vtprune.eval.results.statistics import interval

SHARE, POINTS = "share", "points"
"""Units of scores: tables show a share in per cent, and points as they are."""

_ALL = "all documents"
"""The family if there is no other."""


class Metrics(Protocol):
    """The metrics of a task; `results` are those of its examples' records."""

    def aggregated(self, results: Sequence[Any]) -> dict[str, float]:
        """Metric -> value, the main one first. Raises ConfigError if there is none."""

    def draws(self, results: Sequence[Any], name: str) -> np.ndarray | None:
        """Values of one of them on resampled examples, the same examples for every cell; None if that fails."""


@dataclass(frozen=True)
class Aggregated:
    """The metrics of one cell."""

    metrics: dict[str, float]
    """the main one first"""
    draws: np.ndarray | None
    """of the main one"""
    families: dict[str, float] = field(default_factory=dict)
    """the main one over the examples of each family; without families over whose examples it cannot be computed"""

    @classmethod
    def of(cls, metrics: Metrics, records: Sequence[Record]) -> Aggregated:
        """From the records of a cell, and from nothing else."""
        found = metrics.aggregated([record["results"] for record in records])
        families: dict[str, list[Any]] = {}
        for record in records:
            families.setdefault(record["family"], []).append(record["results"])
        scores = {family: _first(lambda own=own: metrics.aggregated(own)) for family, own in families.items()}
        return cls(
            found,
            metrics.draws([record["results"] for record in records], next(iter(found))),
            {family: score for family, score in scores.items() if score is not None},
        )

    @property
    def score(self) -> float:
        """The value of the main metric."""
        return next(iter(self.metrics.values()))

    def numbers(self, full: Aggregated) -> Record:
        """Fields of a line of results. An interval is null if the metric cannot be computed on drawn examples."""
        kept = None if full.score == 0 else self.score / full.score
        return {
            "score": self.score,
            "ci": None if self.draws is None else interval(self.draws),
            "retention": kept,
            "retention_ci": None if kept is None else self._retention_interval(full),
            "family_scores": self.families,
            "metric": next(iter(self.metrics)),
            "metrics": self.metrics,
        }

    def _retention_interval(self, full: Aggregated) -> list[float] | None:
        if self.draws is None or full.draws is None or len(self.draws) != len(full.draws):
            return None
        drawn = full.draws > 0
        return interval(self.draws[drawn] / full.draws[drawn]) if drawn.any() else None


def of_one_study(lines: Sequence[Record]) -> list[Record]:
    """The lines of one model on one task, with what all of them share: the unit of scores, and the families.

    Scores are a share if none of them is over 1. Families are those over whose examples every cell has a score.
    """
    scored = [line for line in lines if line["score"] is not None]
    unit = SHARE if all(0 <= line["score"] <= 1 for line in scored) else POINTS
    shared = [name for name in scored[0]["family_scores"] if all(name in line["family_scores"] for line in scored)]
    found = []
    for line in lines:
        if line["score"] is not None:
            own = {name: line["family_scores"][name] for name in shared}
            line = line | {"family_scores": own or {_ALL: line["score"]}}
        found.append(line | {"score_unit": unit})
    return found


def _first(aggregate: Callable[[], dict[str, float]]) -> float | None:
    try:
        return next(iter(aggregate().values()))
    except ConfigError:  # of the task's code, which may need examples of every family
        return None
