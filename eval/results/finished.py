# SPDX-License-Identifier: Apache-2.0
"""Reads folders of finished evaluations: which cells can be compared, and their records example by example."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vtprune.errors import ConfigError
from vtprune.eval.results.entries import Entry, conditions, studies
from vtprune.eval.results.evidence import Answers, add_evidence
from vtprune.eval.results.lmms_logs import Logged, is_log, read_log, with_retention
from vtprune.eval.results.records import Record, cell_records, read_results
from vtprune.eval.results.status import OK
from vtprune.eval.running.unfinished import unfinished


@dataclass(frozen=True)
class Asked:
    """One question that every cell of a comparison was asked."""

    index: int
    question: str
    answer: str
    family: str
    data: str | None = None
    """digest of the example with its media; None if they follow from the code of the task"""


@dataclass
class Comparison:
    """Cells of one model on the same questions, from folders in which the full model gave the same answers."""

    model: str
    task: str
    conditions: str
    """`, dtype bfloat16`: the axes that have several values in the run, with those of these cells; else empty"""
    asked: list[Asked]
    lines: list[Record] = field(default_factory=list)
    """of `results.jsonl`, with the full model's line"""
    answers: dict[str, Answers] = field(default_factory=dict)
    """`cell` of a line -> its answers; cells without scores have none"""
    folders: list[Path] = field(default_factory=list)

    @property
    def full(self) -> Record:
        """The line of the full model."""
        return next(line for line in self.lines if line["method"] == "full")

    def scores(self, entry: Entry) -> np.ndarray:
        """(examples,) scores of a row, the means over its seeds."""
        return np.mean([self.answers[line["cell"]].scores for line in entry.cells], axis=0)


def comparisons(folders: Iterable[Path], needs_full: bool = True) -> list[Comparison]:
    """The results in several folders, put together if they can be compared.

    Args:
        folders: of `vtprune eval`, or of runs of lmms-eval (`--log_samples`), each of which is a row.
        needs_full: whether runs of lmms-eval without the full model are an error.

    Raises:
        ConfigError: a folder lacks what an evaluation leaves there, or it cannot be read.
    """
    found: dict[str, Comparison] = {}
    for folder in map(Path, folders):
        if is_log(folder):
            for logged in read_log(folder):
                _add_logged(found, folder, logged)
            continue
        lines = _lines(folder)
        for study in studies(lines).values():
            _add(found, folder, study)
    return [_against_full(comparison, needs_full) for comparison in found.values()]


def _add_logged(found: dict[str, Comparison], folder: Path, logged: Logged) -> None:
    """Adds one task of a run of lmms-eval to the runs of the same model on the same documents."""
    line = logged.line
    asked = [Asked(r["index"], r["question"], r["answer"], r["family"]) for r in logged.records]
    same = [line["task"], line["weights"], *(line["config"].get(key) for key in ("dtype", "attention"))]
    key = hashlib.sha256(json.dumps([*same, [vars(question) for question in asked]]).encode()).hexdigest()
    comparison = found.setdefault(key, Comparison(line["model"], line["task"], "", asked))
    comparison.folders.append(folder)
    _add_row(comparison, folder, line, Answers.of(logged.records))


def _against_full(comparison: Comparison, needs_full: bool) -> Comparison:
    """Gives the rows of a comparison what is measured against the full model, as far as they lack it."""
    full = next((line for line in comparison.lines if line["method"] == "full"), None)
    if full is None:
        if needs_full:
            raise ConfigError(
                f"{', '.join(map(str, comparison.folders))}: {comparison.task} has no run of the full model to compare "
                "with; run lmms_eval once without a method, with the same limit, dtype and attention"
            )
        return comparison
    scores = {cell: answers.scores for cell, answers in comparison.answers.items()}
    for place, line in enumerate(comparison.lines):
        if line["status"] == OK and line["retention"] is None:
            comparison.lines[place] = with_retention(line, scores[line["cell"]], full, scores[full["cell"]])
    comparison.lines.sort(key=lambda line: line["method"] != "full")  # tables begin with the full model
    # Lines of earlier versions have no such fields, and other folders have more rows.
    comparison.lines = add_evidence(comparison.lines, comparison.answers)
    return comparison


def _add(found: dict[str, Comparison], folder: Path, lines: Sequence[Record]) -> None:
    model, task, axes = lines[0]["model"], lines[0]["task"], lines[0].get("axes", {})
    full = next((line for line in lines if line["method"] == "full"), None)
    if full is None:
        raise ConfigError(f"{folder / 'results.jsonl'}: {task} has no row of the full model to compare with")
    records = _records(folder, full)
    asked = [Asked(r["index"], r["question"], r["answer"], r["family"], r.get("data")) for r in records]
    same = [task, full["weights"], *(full["config"].get(key) for key in ("dtype", "attention"))]
    same.append(axes.get("device"))  # runs on different devices are put together, except if a run compares devices
    parts = [*same, [vars(question) for question in asked], [(r["prediction"], r["score"]) for r in records]]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    comparison = found.setdefault(key, Comparison(model, task, conditions(lines[0]), asked))
    comparison.folders.append(folder)
    for line in lines:
        _add_row(comparison, folder, line, _answers(folder, line, asked) if line["status"] == OK else None)


def _add_row(comparison: Comparison, folder: Path, line: Record, answers: Answers | None) -> None:
    """Adds a cell, unless it is there with the same answers."""
    twins = [other for other in comparison.lines if _row(other) == _row(line)]
    if any(_agree(comparison.answers.get(twin["cell"]), answers) for twin in twins):
        return
    if twins:  # the same row with other numbers, for example from another version of the code
        line = line | {"label": f"{line['label']} · {folder.name}"}
    comparison.lines.append(line)
    if answers is not None:
        comparison.answers[line["cell"]] = answers


def _row(line: Record) -> tuple:
    return line["label"], line["keep_ratio"], line["seed"]


def _agree(ours: Answers | None, theirs: Answers | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    return ours.predictions == theirs.predictions and bool((ours.scores == theirs.scores).all())


def _answers(folder: Path, line: Record, asked: Sequence[Asked]) -> Answers:
    records = _records(folder, line)
    if [(r["index"], r["question"]) for r in records] != [(a.index, a.question) for a in asked]:
        raise ConfigError(f"{folder}: the records of {line['cell']} are not of the full model's questions")
    return Answers.of(records)


def _lines(folder: Path) -> list[Record]:
    path = Path(folder) / "results.jsonl"
    progress = _read(folder, lambda: unfinished(folder))
    if found := [line for study in progress if study.comparable for line in study.lines()]:
        return found
    if progress and not path.is_file():  # otherwise a run before has left it
        said = "; ".join(map(str, progress))
        raise ConfigError(f"{folder}: the full model, which all rows are compared with, has not finished: {said}")
    if not path.is_file():
        if not folder.is_dir():
            raise ConfigError(f"{folder}: there is no such folder")
        raise ConfigError(f"{folder}: no results.jsonl here; `vtprune eval` writes it when all cells are done")
    lines = _read(path, lambda: read_results(path))
    if not lines or not all({"model", "task", "cell", "status"} <= set(line) for line in lines):
        raise ConfigError(f"{path}: not of this version of vtprune; run `vtprune eval` on the folder once more")
    return lines


def _records(folder: Path, line: Record) -> list[Record]:
    return _read(folder / "cells" / line["cell"], lambda: cell_records(folder, line["cell"]))


def _read(path: Path, read: Any) -> Any:
    try:
        return read()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
