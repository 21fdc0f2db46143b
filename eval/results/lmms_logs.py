# SPDX-License-Identifier: Apache-2.0
"""Folders that `python -m lmms_eval --model vtprune ... --log_samples` wrote, as lines and records of an evaluation.

A folder holds one run: one model with one method, or unpruned, on one or more tasks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from loguru import logger

from vtprune.errors import ConfigError
from vtprune.eval.lmms.arguments import Arguments
from vtprune.eval.method_rows import ComposedEntry
from vtprune.eval.results.aggregated import POINTS, SHARE
from vtprune.eval.results.records import Record
from vtprune.eval.results.statistics import mean_interval, retention_interval
from vtprune.eval.results.status import OK
from vtprune.eval.running.cells import Cell
from vtprune.eval.tasks.opening import LMMS
from vtprune.eval.tasks.suites import suite_table

_RESULTS, _SAMPLES = "_results.json", "_samples_"
_COSTS = ("final_tokens", "average_tokens", "prefill_flops", "kv_bytes")
_BASES = {"average_tokens": "visual_tokens", "prefill_flops": "unpruned_prefill_flops", "kv_bytes": "unpruned_kv_bytes"}
"""Cost of a sample -> the same without pruning."""


@dataclass(frozen=True)
class Logged:
    """One task of a run."""

    line: Record
    """as of `results.jsonl`; without retention, because the full model is in another folder"""
    records: list[Record]
    """of the documents, in their order"""


def is_log(folder: Path) -> bool:
    """Whether lmms-eval, and not `vtprune eval`, wrote the results in a folder."""
    return not (folder / "results.jsonl").is_file() and bool(_results(folder))


def read_log(folder: Path) -> list[Logged]:
    """The tasks of the run in a folder.

    Raises:
        ConfigError: it holds several runs, another model than `vtprune`, no samples, or samples without costs. Tasks
            whose samples have no scores are left out, with a warning.
    """
    paths = _results(folder)
    if len(paths) > 1:
        raise ConfigError(f"{folder}: {len(paths)} runs of lmms-eval are here; give each an --output_path of its own")
    path = paths[0]
    summary = _json(path, path.read_text())
    config = summary.get("config", {})
    if config.get("model") != "vtprune":
        raise ConfigError(f"{path}: a run of the model {config.get('model')!r}; expected one of --model vtprune")
    arguments = _arguments(config.get("model_args") or "")
    found = []
    for task, values in summary["results"].items():
        samples = path.with_name(f"{path.name.removesuffix(_RESULTS)}{_SAMPLES}{task}.jsonl")
        if samples.is_file():
            logged = _logged(folder, task, values, summary, arguments, _samples(samples))
            found += [] if logged is None else [logged]
    if not found:
        raise ConfigError(f"{folder}: no scored samples are here; run lmms_eval with --log_samples")
    return found


def _results(folder: Path) -> list[Path]:
    return sorted([*folder.glob(f"*{_RESULTS}"), *folder.glob(f"*/*{_RESULTS}")])


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


def _samples(path: Path) -> list[Record]:
    """In the order of the documents. A task with several filters has a sample for each, of which the first counts."""
    found: dict[int, Record] = {}
    for sample in (_json(path, line) for line in path.read_text().splitlines()):
        found.setdefault(sample["doc_id"], sample)
    for sample in found.values():
        if not (sample.get("token_counts") or [None])[0]:
            raise ConfigError(f"{path}: document {sample['doc_id']} has no token_counts; was it from --use_cache?")
    return [found[index] for index in sorted(found)]


def _arguments(text: str) -> Arguments:
    from lmms_eval.utils import simple_parse_args_string

    return Arguments.of(simple_parse_args_string(text))


def _logged(
    folder: Path, task: str, values: Record, summary: Record, arguments: Arguments, samples: Sequence[Record]
) -> Logged | None:
    metrics = {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float) and "," in key and "_stderr" not in key
    }
    listed = [entry["metric"] for entry in summary["configs"][task].get("metric_list") or []]
    metrics = dict(sorted(metrics.items(), key=lambda item: _rank(item[0], task, listed)))
    if not metrics:
        raise ConfigError(f"{folder}: {task} has no metric that is a number")
    scores = [_score(metrics, sample) for sample in samples]
    if None in scores:
        logger.warning(f"{folder}: {task} is left out: its samples have no scores. `vtprune eval` has: {LMMS}{task}")
        return None
    records = [_record(task, score, sample) for score, sample in zip(scores, samples, strict=True)]
    return Logged(_line(folder, task, metrics, arguments, summary, records), records)


def _rank(metric: str, task: str, listed: Sequence[str]) -> tuple[bool, int]:
    """The main metric first, then in the order of the task's list; as in `vtprune eval`."""
    name = metric.split(",")[0]
    return name != suite_table().get(task, {}).get("metric"), listed.index(name) if name in listed else len(listed)


def _record(task: str, score: float, sample: Record) -> Record:
    costs = sample["token_counts"][0]
    reply = sample["filtered_resps"]
    return {
        "index": sample["doc_id"],
        "question": str(sample.get("input", "")),
        "family": task,
        "answer": sample["target"] if isinstance(sample["target"], str) else json.dumps(sample["target"]),
        "prediction": reply if isinstance(reply, str) else json.dumps(reply),
        "score": score,
        **{key: costs[key] for key in (*_COSTS, *_BASES.values())},
        **({"kept": costs["kept"]} if "kept" in costs else {}),
    }


def _score(metrics: Iterable[str], sample: Record) -> float | None:
    """Of one document: the main metric, or the first that the document has. None if it has no number."""
    for name in (metric.split(",")[0] for metric in metrics):
        value = sample.get(name)
        if isinstance(value, dict):
            value = value.get("score")
        if isinstance(value, int | float):
            return float(value)
    return None


def _line(
    folder: Path, task: str, metrics: dict[str, float], arguments: Arguments, summary: Record, records: Sequence[Record]
) -> Record:
    cell = _cell(arguments)
    scores = [record["score"] for record in records]
    average, interval = mean_interval(scores)
    score = next(iter(metrics.values()))
    unit = SHARE if 0 <= score <= 1 else POINTS
    costs = {key: mean(record[key] for record in records) for key in (*_COSTS, *_BASES.values())}
    settings = arguments.model_dump(mode="json")
    return {
        "model": arguments.pretrained,
        **cell.fields,
        "task": task,
        "cell": f"{folder}: {task}",
        "status": OK,
        "n": len(records),
        "score": score,
        "ci": interval if abs(average - score) < 1e-9 else None,
        "retention": None,
        "retention_ci": None,
        "family_scores": {task: score},
        "metric": next(iter(metrics)),
        "metrics": metrics,
        "score_unit": unit,
        "measured_keep_ratio": costs["average_tokens"] / costs["visual_tokens"] if costs["visual_tokens"] else 1.0,
        **costs,
        "weights": arguments.pretrained,
        "versions": {"lmms-eval": str(summary.get("lmms_eval_version")), "date": str(summary.get("date"))},
        "config": settings | {"task": f"{LMMS}{task}", "limit": summary["config"].get("limit")},
    }


def _cell(arguments: Arguments) -> Cell:
    """The row that `vtprune eval` would make of the method. Raises ConfigError if its file cannot be read."""
    spec: Any = arguments.spec
    if spec is None:
        return Cell("full", 1.0)
    if isinstance(spec, Path):
        try:
            spec = yaml.safe_load(spec.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"{spec}: the method of a run of lmms-eval, cannot be read: {error}") from error
    if isinstance(spec, list) and len(spec) == 1:
        spec = spec[0]
    if isinstance(spec, list):
        row = ComposedEntry.model_validate(spec)
        return Cell(" + ".join(part["name"] for part in row.parts), row.keep_ratio, parts=row.parts)
    given = _named(spec)
    budgets = {key: given.pop(key, None) for key in ("keep_ratio", "keep_tokens")}
    budgets |= {key: value for key in budgets if (value := getattr(arguments, key)) is not None}
    given.pop("seed", None)
    (method,) = arguments.methods()
    return Cell(given.pop("name"), seed=getattr(method, "seed", None), given=given, **budgets)


def _named(spec: Any) -> dict[str, Any]:
    return {"name": spec} if isinstance(spec, str) else dict(spec)


def with_retention(line: Record, scores: Sequence[float], full: Record, full_scores: Sequence[float]) -> Record:
    """The line of a run beside that of the full model; the scores are those of their documents."""
    if full["score"] == 0:
        return line
    interval = None
    if line["ci"] is not None and full["ci"] is not None:  # both are means over documents
        _, interval = retention_interval(list(scores), list(full_scores))
    return line | {"retention": line["score"] / full["score"], "retention_ci": interval}
