# SPDX-License-Identifier: Apache-2.0
"""What a row's answers say beside those of a smaller image and of the full model, question by question.

    gain over the smaller image   score less that of `downsample` at as many measured tokens
    hard questions                score on those that the full model gets right and the smaller image gets wrong
    loyalty                       share of the answers that are the full model's

Measured tokens are visual tokens averaged over layers and examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vtprune.eval.results.records import Record
from vtprune.eval.results.statistics import mean_interval
from vtprune.eval.results.status import OK

RIGHT = 0.5
"""Smallest score of an answer that is called right; most scores are 0 or 1."""
SAME = 0.02
"""Largest difference, as a share, between two counts of tokens that are called equal."""
FIELDS = ("gain", "gain_ci", "hard_score", "hard_examples", "loyalty")
"""Fields that `add_evidence` gives to lines."""


@dataclass(frozen=True)
class Answers:
    """The answers of one cell to the examples."""

    scores: np.ndarray
    """(examples,)"""
    predictions: list[str]
    kept: dict[int, list[int]]
    """example -> its visual tokens that were kept; only for the first examples"""

    @classmethod
    def of(cls, records: Sequence[Record]) -> Answers:
        """From the records of a cell."""
        return cls(
            np.array([record["score"] for record in records], dtype=float),
            [record["prediction"] for record in records],
            {record["index"]: record["kept"] for record in records if "kept" in record},
        )


@dataclass(frozen=True)
class _Smaller:
    """The smaller images that were measured, the fewest tokens first."""

    tokens: np.ndarray
    """(cells,)"""
    scores: np.ndarray
    """(cells, examples)"""

    def nearest(self, tokens: float) -> int:
        return int(np.abs(self.tokens - tokens).argmin())

    def at(self, tokens: float) -> tuple[np.ndarray | None, bool]:
        """Scores of a smaller image with so many tokens, (examples,), and whether one was measured.

        Between two that were measured, scores are interpolated. Outside their range there are none.
        """
        place = self.nearest(tokens)
        if abs(self.tokens[place] - tokens) <= SAME * self.tokens[place]:
            return self.scores[place], True
        above = int(np.searchsorted(self.tokens, tokens))
        if above in (0, len(self.tokens)):
            return None, False
        low, high = self.tokens[above - 1 : above + 1]
        weight = (tokens - low) / (high - low)
        return (1 - weight) * self.scores[above - 1] + weight * self.scores[above], False


def add_evidence(lines: Sequence[Record], answers: Mapping[str, Answers]) -> list[Record]:
    """The lines of one model on one task with `FIELDS`, which are None where there is nothing to say.

    `gain_ci` is a paired 95 % interval; there is one where a smaller image with as many tokens was measured. The full
    model and the smaller images themselves have no gain and no score on hard questions: these are so by definition.

    Args:
        lines: of `results.jsonl`, with or without `FIELDS`; one is the full model's.
        answers: `cell` of each line with scores -> its answers.
    """
    full = answers[next(line["cell"] for line in lines if line["method"] == "full")]
    small = [line for line in lines if line["method"] == "downsample" and line["status"] == OK]
    small.sort(key=lambda line: line["average_tokens"])
    smaller = None
    if small:
        scores = np.stack([answers[line["cell"]].scores for line in small])
        smaller = _Smaller(np.array([line["average_tokens"] for line in small]), scores)
    nothing: Record = dict.fromkeys(FIELDS)
    found = []
    for line in lines:
        more: Record = {}
        if line["status"] == OK:
            row = answers[line["cell"]]
            more["loyalty"] = float(np.mean([a == b for a, b in zip(row.predictions, full.predictions, strict=True)]))
            if smaller is not None and line["method"] not in ("full", "downsample"):
                more |= _against(smaller, line["average_tokens"], row.scores, full.scores)
        found.append(line | nothing | more)
    return found


def _against(smaller: _Smaller, tokens: float, scores: np.ndarray, full: np.ndarray) -> Record:
    found: Record = {}
    others, measured = smaller.at(tokens)
    if others is not None:
        gain, interval = mean_interval((scores - others).tolist())
        found |= {"gain": gain, "gain_ci": interval if measured else None}
    hard = (full >= RIGHT) & (smaller.scores[smaller.nearest(tokens)] < RIGHT)
    score = float(scores[hard].mean()) if hard.any() else None
    return found | {"hard_score": score, "hard_examples": int(hard.sum())}
