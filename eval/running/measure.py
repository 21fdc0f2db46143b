# SPDX-License-Identifier: Apache-2.0
"""Makes records from a session's report, and the lines of `results.jsonl` from records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import torch

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.presets import find
from vtprune.eval.results.aggregated import Aggregated, Metrics, of_one_study
from vtprune.eval.results.evidence import Answers, add_evidence
from vtprune.eval.results.records import Record
from vtprune.eval.results.statistics import mean_interval, retention_interval
from vtprune.eval.results.status import OK
from vtprune.eval.running.cells import Cell, Identity
from vtprune.eval.tasks import AnyTask
from vtprune.report import Report

SHOWN = 8
"""Records say which visual tokens were kept for the first `SHOWN` examples only."""

NOTHING_PRUNED = {"name": "uniform", "keep_ratio": 1.0}
"""The method of a session that only measures: it keeps every token."""


_COSTS = ("prefill_flops", "kv_bytes", "encoder_flops")
"""Fields of records that lines have twice, for the cell and for the full model: the first two, or the last one."""


def measure(report: Report, indices: Sequence[int]) -> list[Record]:
    """One record for each sample of the last prefill: visual tokens, FLOPs and bytes.

    Args:
        report: of the batch.
        indices: number of the example of each sample. Records of the first `SHOWN` examples also have `kept`: the
            example's visual tokens, counted from 0, that are alive in the last layer. For merged tokens these are the
            representatives.
    """
    numbers: dict[str, Sequence[float]] = {
        "final_tokens": report.final_tokens,
        "average_tokens": report.counts.double().mean(1).tolist(),
        "prefill_flops": report.sample_prefill_flops,
        "kv_bytes": report.sample_kv_bytes,
    }
    records: list[Record] = [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]
    for sample, (index, record) in enumerate(zip(indices, records, strict=True)):
        if index < SHOWN:
            record["kept"] = torch.searchsorted(report.visual[sample], report.kept(sample)).tolist()
    return records


_MEAN = "mean score of a document"
"""Stands for the metric of a task of lmms-eval that is not at hand."""


@dataclass(frozen=True)
class Outcome:
    """What came of a cell: the records of its examples, or why there are none."""

    records: list[Record]
    ending: Record | None = None


@dataclass(frozen=True)
class StudyPlan:
    """What is known of the lines of one study before a cell has run."""

    examples: int
    """number of them, the same for every cell"""
    cells: list[Record]
    """the first fields of each line"""
    shared: Record
    """the last fields of all lines"""

    @classmethod
    def of(
        cls,
        config: EvalConfig,
        model: str,
        task: AnyTask,
        identity: Identity,
        examples: int,
        cells: Sequence[tuple[Cell, str]],
        axes: dict[str, str],
    ) -> StudyPlan:
        """cells: each with the name of its file. axes: the values of those that have several, which the lines name."""
        shared = {
            "weights": identity.model,
            "versions": identity.versions,
            "config": config.resolved(model, task.entry),
        }
        planned = [_planned(model, task.name, cell, name) for cell, name in cells]
        return cls(examples, [line | ({"axes": axes} if axes else {}) for line in planned], shared)

    def lines(self, outcomes: Sequence[Outcome], metrics: Metrics | None = None) -> list[Record]:
        """One line for each cell, from the records only: all runs end in the same lines.

        outcomes: of each cell, in their order; the full model has records. metrics: of a task of lmms-eval; without
            them its lines have the mean score of a document, and say so.
        """
        full = next(o.records for cell, o in zip(self.cells, outcomes, strict=True) if cell["method"] == "full")
        nothing = dict.fromkeys(_numbers(full, full))  # a cell without scores has the same fields with null
        scored_by_lmms = bool(full) and "results" in full[0]
        reference = None if metrics is None else Aggregated.of(metrics, full)
        lines: list[Record] = []
        answers: dict[str, Answers] = {}
        for cell, outcome in zip(self.cells, outcomes, strict=True):
            line = cell | {"status": OK, "n": len(outcome.records)}
            numbers = nothing | outcome.ending if outcome.ending else _numbers(outcome.records, full)
            if scored_by_lmms and not outcome.ending:
                numbers |= _of_lmms(line, outcome.records, metrics, reference, numbers["score"])
            lines.append(line | numbers)
            answers[line["cell"]] = Answers.of(outcome.records)
        lines = add_evidence(lines, answers)
        return [line | self.shared for line in (of_one_study(lines) if scored_by_lmms else lines)]


def _of_lmms(
    line: Record, records: Sequence[Record], metrics: Metrics | None, full: Aggregated | None, score: float
) -> Record:
    """Fields with the metrics of a task of lmms-eval. score: mean of the documents', for want of metrics."""
    if metrics is None or full is None:
        return {"metric": _MEAN, "metrics": {_MEAN: score}}
    try:
        return Aggregated.of(metrics, records).numbers(full)
    except ConfigError as error:  # of the task's code, on what this method answers
        raise ConfigError(f"{line['cell']}: {error}") from error


def _planned(model: str, task: str, cell: Cell, name: str) -> Record:
    line: Record = {
        "model": model,
        **cell.fields,
        "task": task,
        "cell": name,
    }
    if cell.preset is not None:
        given = find(cell.preset).published
        line["published"] = None if given is None else given.model_dump()
    return line


def _numbers(records: Sequence[Record], full: Sequence[Record]) -> Record:
    """Means over the examples. "Unpruned" numbers are those of the full model's cell, also for `downsample`."""

    def average(of: Sequence[Record], key: str) -> float:
        return mean(record[key] for record in of)

    scores = [record["score"] for record in records]
    score, interval = mean_interval(scores)
    kept, kept_interval = retention_interval(scores, [record["score"] for record in full])
    families: dict[str, list[float]] = {}
    for record in records:
        families.setdefault(record["family"], []).append(record["score"])
    if "encoder_flops" in full[0]:  # families are classes, which come by chance
        families = dict(sorted(families.items()))
    average_tokens = average(records, "average_tokens")
    visual_tokens = average(full, "average_tokens")
    return {
        "score": score,
        "ci": interval,
        "retention": kept,
        "retention_ci": kept_interval,
        "family_scores": {family: mean(values) for family, values in families.items()},
        "measured_keep_ratio": average_tokens / visual_tokens,
        "final_tokens": average(records, "final_tokens"),
        "average_tokens": average_tokens,
        "visual_tokens": visual_tokens,
        **{
            name: average(of, key)
            for key in _COSTS
            if key in full[0]
            for name, of in ((key, records), (f"unpruned_{key}", full))
        },
    }
