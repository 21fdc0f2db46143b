# SPDX-License-Identifier: Apache-2.0
"""Questions to a vision-language model: its inputs, its answers and what they cost, under the session of a cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import InputCache, answers, conversation_inputs, load_model
from vtprune.eval.inputs.downsample import Downsampler, FewerFrames, smaller_medium
from vtprune.eval.pages.views import views_folder, write_views
from vtprune.eval.results.records import Record
from vtprune.eval.results.timings import Spent
from vtprune.eval.running.cells import Cell
from vtprune.eval.running.clock import Stopwatch
from vtprune.eval.running.evaluator import Evaluator, RunBatch
from vtprune.eval.running.measure import NOTHING_PRUNED, SHOWN, measure
from vtprune.eval.tasks import Conversation

if TYPE_CHECKING:
    from vtprune.eval.running.runner import Study


class QuestionEvaluator(Evaluator):
    """A vision-language model and the questions that every cell asks.

    Raises:
        ConfigError: the model does not take the task's kind of media.
    """

    def __init__(self, config: EvalConfig, study: Study, loaded: tuple[Any, Any]):
        super().__init__(config, study, loaded)
        self.model, self.processor = loaded
        adapter = vtprune.adapter_for(self.model)
        if self.task.kind not in adapter.kinds:
            raise ConfigError(f"task {self.task.name!r} shows {self.task.kind}s, which {adapter.family} does not take")
        self.inputs = InputCache(lambda batch: conversation_inputs(self.processor, self._asked(batch)))

    @classmethod
    def load(cls, config: EvalConfig, model: str, device: str) -> tuple[Any, Any]:
        return load_model(model, config.dtype, config.attention, device)

    def write_views(self) -> None:
        folder = views_folder(self.config.output, self.task.name, self.study.identity.model)
        write_views(folder, self.model, self.processor, self.examples[:SHOWN], self.task.kind, self.study.digests)

    def _asked(self, batch: range) -> list[Conversation]:
        """The prompts of a batch of examples."""
        return [self.examples[i].conversation() for i in batch]

    def _open(self, cell: Cell, stack: ExitStack) -> RunBatch:
        """The seconds are those of the answers. Inputs are made before, for most rows only once.

        The baselines `full` and `downsample` run in a session that prunes nothing, because a session measures.
        """
        prepare: Callable[[range], Mapping[str, Any]] = self.inputs
        if cell.method == "downsample":
            smaller = self._downsampled(cell.keep_ratio, stack)

            def prepare(batch: range) -> Mapping[str, Any]:
                return smaller.inputs(self._asked(batch))

        if cell.method in ("full", "downsample"):
            session = vtprune.prune(self.model, NOTHING_PRUNED)
        elif cell.method == "zero":
            session = vtprune.prune(self.model, "zero")
        else:
            session = vtprune.prune(self.model, cell.spec)
        stack.enter_context(session)

        def run(batch: range) -> tuple[list[Record], Spent]:
            inputs = prepare(batch)
            with Stopwatch(self.model) as watch:
                records = self._run_batch(batch, inputs, session)
            return records, watch.spent

        return run

    def _downsampled(self, keep_ratio: float, stack: ExitStack) -> Downsampler | FewerFrames:
        smaller = smaller_medium(self.model, self.processor, self.task.kind, keep_ratio)
        if isinstance(smaller, Downsampler):
            stack.enter_context(smaller.interpolated())
        return smaller

    def _run_batch(self, batch: range, inputs: Any, session: Any) -> list[Record]:
        limit = self.config.max_new_tokens or self.task.max_new_tokens
        predictions, _ = answers(self.model, self.processor, inputs, limit)
        return self._records(batch, predictions, measure(session.report, batch))
