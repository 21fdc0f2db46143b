# SPDX-License-Identifier: Apache-2.0
"""Makes records from a session's report, and the lines of `results.jsonl` from records."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import torch

from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.presets import find
from vtprune.eval.results.aggregated import Aggregated, of_one_study
from vtprune.eval.results.records import CellFile, Record
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


def result_lines(
    config: EvalConfig, model: str, task: AnyTask, identity: Identity, cells: Sequence[tuple[Cell, CellFile]]
) -> list[Record]:
    """One line for each cell of one model on one task, from the records only: all runs end in the same lines."""
    full = next(file.records for cell, file in cells if cell.method == "full")
    nothing = dict.fromkeys(_numbers(full, full))  # a cell without scores has the same fields with null
    shared = {"weights": identity.model, "versions": identity.versions, "config": config.resolved(model, task.entry)}
    metrics = getattr(task, "scores", None)
    reference = None if metrics is None else Aggregated.of(metrics, full)
    lines = []
    for cell, file in cells:
        line: Record = {
            "model": model,
            "method": cell.method,
            "label": cell.label,
            "params": cell.params,
            "keep_ratio": cell.keep_ratio,
            "keep_tokens": cell.keep_tokens,
            "seed": cell.seed,
            "task": task.name,
            "cell": file.name,
            "status": OK,
            "n": len(file.records),
        }
        if cell.preset is not None:
            given = find(cell.preset).published
            line["published"] = None if given is None else given.model_dump()
        numbers = nothing | file.ending if file.ending else _numbers(file.records, full)
        if reference is not None and not file.ending:
            try:
                numbers |= Aggregated.of(metrics, file.records).numbers(reference)
            except ConfigError as error:  # of the task's code, on what this method answers
                raise ConfigError(f"{cell.title}: {error}") from error
        lines.append(line | numbers | shared)
    return lines if reference is None else of_one_study(lines)


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
