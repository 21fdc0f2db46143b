# SPDX-License-Identifier: Apache-2.0
"""What runs the cells of a study on a loaded model, and which models and tasks go together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from vtprune.errors import BudgetError, ConfigError, UnsupportedStageError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs.classifiers import is_classifier
from vtprune.eval.results.records import CellPart, Record, append, to_line
from vtprune.eval.results.status import Refusal
from vtprune.eval.results.timings import Spent
from vtprune.eval.running.cells import Cell
from vtprune.eval.tasks import AnyTask, Classification

if TYPE_CHECKING:
    from vtprune.eval.running.runner import Study

RunBatch = Callable[[range], tuple[list[Record], Spent]]
"""The numbers of a batch of examples -> their records, and the wall seconds that count."""


class Evaluator(ABC):
    """A loaded model and the examples that every cell runs over."""

    def __init__(self, config: EvalConfig, study: Study, loaded: Any):
        """loaded: what `load` returned."""
        self.config, self.study = config, study
        self.task: Any = study.task
        self.examples = study.examples

    @classmethod
    @abstractmethod
    def load(cls, config: EvalConfig, model: str, device: str) -> Any:
        """Loads a model by its name. Raises ConfigError if that fails."""

    @abstractmethod
    def _open(self, cell: Cell, stack: ExitStack) -> RunBatch:
        """The function that runs a batch of the cell. What it needs open, `stack` closes."""

    def _stream(self, cell: Cell, batches: Sequence[range]) -> Sequence[range]:
        """The batches that have to run, in their order, for the records of those that are wanted."""
        return batches

    @abstractmethod
    def write_views(self) -> None:
        """Writes what pages show of the first examples."""

    def run_cell(
        self, cell: Cell, batches: Sequence[range], part: CellPart, progress: Callable[[str, int], None]
    ) -> None:
        """Runs `batches` and adds their records to `part`, or ends `part` if the cell cannot run."""
        progress(cell.title, 0)
        try:
            with ExitStack() as stack:
                run_batch = self._open(cell, stack)
                for batch in self._stream(cell, batches):
                    records, spent = run_batch(batch)
                    if batch not in batches:
                        continue
                    part.append(records)
                    self._log_time(part, batch, spent)
                    progress(cell.title, len(batch))
        except (BudgetError, UnsupportedStageError) as error:
            part.end(Refusal.of(error))

    def _records(
        self, batch: range, predictions: Sequence[str], costs: Sequence[Record], scores: Sequence[Record] | None = None
    ) -> list[Record]:
        """What was answered to the examples of a batch, and what each of them cost.

        scores: fields of each record that score it; default the task's score of the prediction.
        """
        examples = [self.examples[i] for i in batch]
        if scores is None:
            scores = [{"score": self.task.score(said, e)} for said, e in zip(predictions, examples, strict=True)]
        return [
            {
                "index": index,
                "question": example.question,
                "family": example.family,
                "answer": example.answer,
                **({"data": self.study.digests[index]} if self.study.digests else {}),
                "prediction": prediction,
                **score,
                **cost,
            }
            for index, example, prediction, score, cost in zip(batch, examples, predictions, scores, costs, strict=True)
        ]

    def _log_time(self, part: CellPart, batch: range, spent: Spent) -> None:
        line = {"cell": part.name, "first": batch.start, "examples": len(batch), **spent.to_dict()}
        append(part.timings, to_line(line))


def refuse_mismatches(config: EvalConfig, tasks: Mapping[str, AnyTask]) -> None:
    """Raises ConfigError if a task does not go with a model, or a setting not with a task."""
    classifying = [name for name, task in tasks.items() if isinstance(task, Classification)]
    for model in config.model:
        classifier = is_classifier(model)
        for name in tasks:
            if classifier and name not in classifying:
                raise ConfigError(f"task {name!r} asks questions, and model {model!r} is a CLIP, which answers none")
            if name in classifying and not classifier:
                raise ConfigError(
                    f"task {name!r} has classes for a CLIP to tell apart, and model {model!r} is none; models that "
                    "are: digitscenes_clip, a CLIPModel or SiglipModel of transformers"
                )
    if not classifying:
        return
    for name in ("positions", "device_map"):
        if getattr(config, name) is not None:
            raise ConfigError(f"{name}: only for models that answer questions, and {classifying[0]} has classes")
    if config.baselines != ("full",):
        others = " and ".join(name for name in config.baselines if name != "full")
        raise ConfigError(f"baselines: {classifying[0]} has no {others}; give baselines: [full]")
    if config.max_new_tokens is not None:
        raise ConfigError(f"max_new_tokens: {classifying[0]} has classes, and nothing is generated; leave it out")
