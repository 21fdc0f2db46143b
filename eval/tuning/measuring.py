# SPDX-License-Identifier: Apache-2.0
"""Measures settings on a growing share of the examples, in the time that is left. Nothing is computed twice."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from time import monotonic
from typing import Any

from vtprune.errors import ConfigError, NothingPrunedError
from vtprune.eval.results.records import CellFile, CellPart, Record, cell_path, json_lines
from vtprune.eval.running.cells import Cell
from vtprune.eval.running.evaluator import Evaluator
from vtprune.eval.running.runner import Study

FULL = Cell("full", 1.0)

_TUNING = 2 / 3
"""Share of the examples that choose. The others are held out."""
_LEAST_BATCHES = 3
_ORDER = 0
"""Seed of the order of the examples, because a task may be sorted."""


class OutOfTime(Exception):
    """The time for this part of the command is over. What was measured is on disk."""


@dataclass
class Clock:
    """The time that the command may take."""

    end: float = float("inf")
    """clock of `time.monotonic` at which the present part has to be over"""

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - monotonic()


@dataclass(frozen=True)
class Sample:
    """What a setting did on some examples, beside the full model on the same ones."""

    cell: Cell
    scores: tuple[float, ...]
    full: tuple[float, ...]
    """(examples,) scores of the full model"""
    tokens: float
    """visual tokens, mean over layers and examples"""
    costs: dict[str, float] = field(default_factory=dict)
    """share of the full model's: `flops` of the prefill, bytes of the `kv` cache, and `latency`"""
    seconds: float = 0.0
    """for each example"""

    @property
    def score(self) -> float:
        return mean(self.scores)

    @property
    def retention(self) -> float:
        """Score over the full model's; 0.0 if that is 0."""
        full = mean(self.full)
        return self.score / full if full else 0.0


def split(study: Study) -> tuple[Study, list[range], list[range]]:
    """The study with its examples in a random order that never changes; its batches to tune on, and those held out.

    Raises:
        ConfigError: there are too few examples.
    """
    if len(study.batches) < _LEAST_BATCHES:
        size = len(study.batches[0]) if study.batches else 0
        raise ConfigError(
            f"task {study.task.name!r} has {len(study.examples)} examples in {len(study.batches)} batches of {size}; "
            f"tuning needs at least {_LEAST_BATCHES} batches: give more examples or a smaller --batch-size"
        )
    order = list(range(len(study.examples)))
    random.Random(_ORDER).shuffle(order)
    # The records of a setting belong to this order.
    identity = dataclasses.replace(study.identity, settings=study.identity.settings | {"order": f"shuffled {_ORDER}"})
    shuffled = dataclasses.replace(
        study,
        examples=[study.examples[i] for i in order],
        digests=[study.digests[i] for i in order] if study.digests else [],
        identity=identity,
    )
    cut = round(_TUNING * len(study.batches))
    return shuffled, study.batches[:cut], study.batches[cut:]


class Bench:
    """Runs settings on batches, and keeps their records in the output folder."""

    def __init__(
        self, study: Study, evaluator: Evaluator, output: Any, clock: Clock, progress: Callable[[str, int], None]
    ):
        """evaluator: of the study, whose examples are those of `split`. output: folder, a Path."""
        self._study, self._evaluator, self._output = study, evaluator, output
        self._clock, self._progress = clock, progress
        self._files: dict[str, CellFile] = {}
        self._records: dict[str, dict[int, Record]] = {}
        self._seconds: dict[tuple[str, int], float] = {}
        self._read_seconds()
        self.refused: dict[str, str] = {}
        """Title of a setting that cannot run -> why."""

    @property
    def seconds_a_batch(self) -> float:
        """What the full model needs, which is about the most that any setting needs."""
        found = [seconds for (cell, _), seconds in self._seconds.items() if cell == self._file(FULL).name]
        return mean(found) if found else 0.0

    def affordable(self) -> float:
        """Batches that fit into the time that is left; infinite without a limit."""
        return max(self._clock.left, 0.0) / max(self.seconds_a_batch, 1e-9)

    def warm(self, batches: Sequence[range]) -> None:
        """Makes the inputs of the batches, so that no setting's seconds have them in."""
        for batch in batches:
            self._evaluator.inputs(batch)  # type: ignore[attr-defined]

    def sample(self, cell: Cell, batches: Sequence[range]) -> Sample | None:
        """What a setting does on these batches; None if it cannot run, which `refused` then explains.

        Raises:
            OutOfTime: the time is over. The same call later measures only what is missing.
        """
        full = self._run(FULL, batches)
        records = self._run(cell, batches)
        if records is None or full is None:
            return None
        return self._sampled(cell, records, full, batches)

    def _sampled(self, cell: Cell, records: list[Record], full: list[Record], batches: Sequence[range]) -> Sample:
        def share(key: str) -> float:
            return sum(record[key] for record in records) / sum(record[key] for record in full)

        # A run that was killed may have left records without their time.
        timed = [batch for batch in batches if self._timed(cell, batch) and self._timed(FULL, batch)]
        took, full_took = (sum(self._timed(of, batch) for batch in timed) for of in (cell, FULL))
        return Sample(
            cell=cell,
            scores=tuple(record["score"] for record in records),
            full=tuple(record["score"] for record in full),
            tokens=mean(record["average_tokens"] for record in records),
            costs={
                "flops": share("prefill_flops"),
                "kv": share("kv_bytes"),
                "latency": took / full_took if full_took else 1.0,
            },
            seconds=took / max(sum(map(len, timed)), 1),
        )

    def _timed(self, cell: Cell, batch: range) -> float:
        return self._seconds.get((self._file(cell).name, batch.start), 0.0)

    def _read_seconds(self) -> None:
        lines = json_lines(self._output / "timings.jsonl")
        self._seconds = {(line["cell"], line["first"]): line["seconds"] for line in lines}

    def _file(self, cell: Cell) -> CellFile:
        if cell.title not in self._files:
            path = cell_path(self._output, cell.title, self._study.identity.key(cell))
            file = self._files[cell.title] = CellFile(path, self._study.batches)
            self._records[cell.title] = {record["index"]: record for record in file.records}
        return self._files[cell.title]

    def _run(self, cell: Cell, batches: Sequence[range]) -> list[Record] | None:
        file, done = self._file(cell), self._records[cell.title]
        todo = [batch for batch in batches if batch.start not in done]
        if todo and file.ending is None and cell.title not in self.refused:
            self._measure(cell, file, todo)
        if file.ending is not None:
            self.refused[cell.title] = file.ending["reason"]
        if cell.title in self.refused:
            return None
        return [done[index] for batch in batches for index in batch]

    def _measure(self, cell: Cell, file: CellFile, todo: Sequence[range]) -> None:
        part = CellPart(file.path, 0)

        def progress(title: str, examples: int) -> None:
            self._progress(title, examples)
            if self._clock.left <= 0:
                raise OutOfTime

        try:
            self._evaluator.run_cell(cell, todo, part, progress)
        except NothingPrunedError as error:
            self.refused[cell.title] = str(error)
        finally:
            found = {record["index"]: record for batch in part.batches for record in batch}
            self._records[cell.title].update(found)
            self._read_seconds()
        if part.ending is not None:
            file.finish([part])
