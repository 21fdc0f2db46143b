# SPDX-License-Identifier: Apache-2.0
"""Looks at a run that has not finished: which cells are done, and how far the others are. Changes nothing on disk.

OUTPUT/plan.json   the cells of the run that began last, written before any of them runs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vtprune.eval.results.entries import conditions
from vtprune.eval.results.formatting import at_budget
from vtprune.eval.results.records import Record, members, named_path, part_paths, read_results, write_atomically
from vtprune.eval.results.status import UNFINISHED
from vtprune.eval.running.measure import Outcome, StudyPlan

PLAN = "plan.json"


def write_plan(output: Path, studies: Sequence[StudyPlan]) -> None:
    """Writes the plan of a run that begins."""
    write_atomically(output / PLAN, json.dumps([asdict(study) for study in studies]).encode())


@dataclass(frozen=True)
class Progress:
    """How far the cells of one model on one task are."""

    plan: StudyPlan
    done: Mapping[str, int]
    """name of a cell -> its examples that are done; cells that ended without scores count as done"""
    outcomes: Mapping[str, Outcome]
    """name of a cell that is finished -> what came of it"""

    @classmethod
    def of(cls, folder: Path, plan: StudyPlan) -> Progress:
        done: dict[str, int] = {}
        outcomes: dict[str, Outcome] = {}
        for name in (cell["cell"] for cell in plan.cells):
            path = named_path(folder, name)
            finished = [record for batch in members(path) for record in batch]
            ended = len(finished) == 1 and "status" in finished[0]
            if ended or len(finished) == plan.examples:
                outcomes[name] = Outcome([], finished[0]) if ended else Outcome(finished)
                done[name] = plan.examples
            else:
                parts = [record for part in part_paths(path) for batch in members(part) for record in batch]
                done[name] = len({record["index"] for record in (*finished, *parts)})
        return cls(plan, done, outcomes)

    @property
    def finished(self) -> bool:
        return len(self.outcomes) == len(self.plan.cells)

    @property
    def comparable(self) -> bool:
        """Whether the full model has finished, which all others are compared with."""
        return any(cell["method"] == "full" and cell["cell"] in self.outcomes for cell in self.plan.cells)

    def lines(self) -> list[Record]:
        """The lines of `results.jsonl` so far. A row has numbers when all of its seeds have finished."""
        rows: dict[tuple, list[str]] = {}
        for cell in self.plan.cells:
            rows.setdefault((cell["label"], cell["keep_ratio"]), []).append(cell["cell"])
        found: dict[str, Outcome] = {}
        for names in rows.values():
            if all(name in self.outcomes for name in names):
                found |= {name: self.outcomes[name] for name in names}
                continue
            done, examples = sum(self.done[name] for name in names), self.plan.examples * len(names)
            ending = {"status": UNFINISHED, "reason": f"{done} of {examples} examples are done"}
            found |= {name: Outcome([], ending) for name in names}
        return self.plan.lines([found[cell["cell"]] for cell in self.plan.cells])

    def __str__(self) -> str:
        first = self.plan.cells[0]
        cells, total = len(self.plan.cells), self.plan.examples
        text = (
            f"{first['task']}, {first['model']}{conditions(first)}: {len(self.outcomes)} of {cells} cells are finished"
        )
        begun = [
            f"{_name(cell)} ({count} of {total} examples)"
            for cell in self.plan.cells
            if cell["cell"] not in self.outcomes and (count := self.done[cell["cell"]])
        ]
        return f"{text}; begun: {', '.join(begun)}" if begun else text


def unfinished(folder: Path) -> list[Progress]:
    """The studies of the run that began last in a folder, if it has not finished; else nothing.

    Raises:
        OSError, ValueError: the plan cannot be read, or it is damaged.
    """
    path, results = folder / PLAN, folder / "results.jsonl"
    if not path.is_file():
        return []
    plans = [StudyPlan(**study) for study in json.loads(path.read_bytes())]
    written = {line["cell"] for line in read_results(results)} if results.is_file() else set()
    if all(cell["cell"] in written for plan in plans for cell in plan.cells):
        return []
    return [Progress.of(folder, plan) for plan in plans]


def _name(cell: Record) -> str:
    seed = "" if cell["seed"] is None else f", seed {cell['seed']}"
    return f"{cell['label']}{at_budget(cell['keep_ratio'])}{seed}"
