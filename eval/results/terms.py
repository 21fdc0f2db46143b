# SPDX-License-Identifier: Apache-2.0
"""What the rows of a study are counted in, and the words for it in tables, plots and pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vtprune.eval.results.aggregated import POINTS
from vtprune.eval.results.records import Record

ACCURACY = "accuracy"


@dataclass(frozen=True)
class Terms:
    """The words of one kind of study."""

    classifies: bool
    """whether a vision encoder classifies images, or a vision-language model answers questions"""
    flops: str
    """field of a line of `results.jsonl`; with `unpruned_` before it, the full model's"""
    flops_of: str
    """whose FLOPs of one example they are"""
    flops_name: str
    """the same in short"""
    tokens: str
    """what is pruned"""
    short: str
    """the same in short"""
    final: str
    """tokens of the field `final_tokens`"""
    average: str
    """tokens of the field `average_tokens`"""
    kind: str
    """what a family of examples is"""
    score: str = ACCURACY
    """what is scored: accuracy, or the name of a metric of lmms-eval"""
    unit: str = "%"
    """of the score: `%` or `points`"""

    @property
    def axis(self) -> str:
        """The label of an axis of scores, without the name of a metric."""
        return f"{ACCURACY if self.score == ACCURACY else 'score'} ({self.unit})"

    @property
    def scored(self) -> str:
        """The score with its unit: `accuracy in %`."""
        return f"{self.score} in {self.unit}"


QUESTIONS = Terms(
    classifies=False,
    flops="prefill_flops",
    flops_of="prefill FLOPs of the language model",
    flops_name="prefill FLOPs",
    tokens="visual tokens",
    short="tokens",
    final="tokens in the last layer",
    average="visual tokens measured, averaged over decoder layers",
    kind="kind of question",
)
CLASSES = Terms(
    classifies=True,
    flops="encoder_flops",
    flops_of="FLOPs of the vision encoder",
    flops_name="encoder FLOPs",
    tokens="patches",
    short="patches",
    final="patches behind the last layer",
    average="patches measured, averaged over encoder layers",
    kind="class",
)


def terms(results: Sequence[Record]) -> Terms:
    """The words for the lines of one model on one task."""
    words = CLASSES if CLASSES.flops in results[0] else QUESTIONS
    metric = next((line["metric"] for line in results if line.get("metric")), None)
    if metric is None:
        return words
    return replace(words, score=metric, unit="points" if results[0]["score_unit"] == POINTS else "%")
