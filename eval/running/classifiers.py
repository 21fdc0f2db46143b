# SPDX-License-Identifier: Apache-2.0
"""Images to a CLIP: the classes that it names and what they cost, under the session of a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import mean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import BatchFeature

import vtprune
from vtprune.adaptation import AdaptingClassifier
from vtprune.classify import ZeroShotClassifier
from vtprune.encoder_report import EncoderReport
from vtprune.eval.config import EvalConfig
from vtprune.eval.inputs import InputCache
from vtprune.eval.inputs.classifiers import load_classifier
from vtprune.eval.results.records import Record
from vtprune.eval.results.timings import Spent
from vtprune.eval.running.cells import Cell
from vtprune.eval.running.clock import now
from vtprune.eval.running.evaluator import Evaluator, RunBatch
from vtprune.methods import TCA

if TYPE_CHECKING:
    from vtprune.eval.running.runner import Study

_NOTHING_DROPPED = {"name": "uniform_patches", "keep_ratio": 1.0}
"""The method of a session that only measures: it keeps every patch."""


class ClassifierEvaluator(Evaluator):
    """A CLIP and the images that every cell classifies."""

    def __init__(self, config: EvalConfig, study: Study, loaded: tuple[Any, Any, Callable]):
        super().__init__(config, study, loaded)
        model, tokenizer, self.preprocess = loaded
        self.classifier = ZeroShotClassifier(model, tokenizer, self.task.classes, self.task.templates)
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.inputs = InputCache(self._preprocessed)
        for batch in study.batches:  # before anything is timed: the memory that this takes and gives back slows it down
            self.inputs(batch)

    @classmethod
    def load(cls, config: EvalConfig, model: str, device: str) -> tuple[Any, Any, Callable]:
        return load_classifier(model, config.dtype, config.attention, device)

    def write_views(self) -> None:
        """Nothing: merged and dropped inside the layers, patches have no single place where they were kept."""

    def _preprocessed(self, batch: range) -> BatchFeature:
        images = [self.preprocess(self.examples[i].image) for i in batch]
        return BatchFeature({"pixel_values": torch.stack(images)})

    def _classify(self, cell: Cell, stack: ExitStack) -> tuple[Callable[[Tensor], Tensor], Any]:
        """What makes logits, (batch, classes), of the cell's pixels, and what has the `report` of its last batch.

        `full` runs in a session that keeps every patch, because a session measures.
        """
        if _adapts(cell):
            adapting = AdaptingClassifier(self.classifier, cell.spec)
            return adapting, adapting
        method = _NOTHING_DROPPED if cell.method == "full" else cell.spec
        return self.classifier, stack.enter_context(vtprune.prune(self.classifier.model, method))

    def _stream(self, cell: Cell, batches: Sequence[range]) -> Sequence[range]:
        """What a classifier that adapts makes of a batch depends on all batches before it, so these run again."""
        if not _adapts(cell) or not batches:
            return batches
        return [batch for batch in self.study.batches if batch.start <= batches[-1].start]

    def _open(self, cell: Cell, stack: ExitStack) -> RunBatch:
        """The seconds are those of the classifier alone: images are read and resized before."""
        classify, session = self._classify(cell, stack)

        @torch.inference_mode()
        def run(batch: range) -> tuple[list[Record], Spent]:
            pixels = self.inputs(batch)["pixel_values"].to(self.device, self.dtype)
            started = now(self.device)
            logits = classify(pixels)
            spent = Spent(now(self.device) - started)
            names = [self.task.classes[place] for place in logits.argmax(1).tolist()]
            return self._records(batch, names, [_costs(session.report)] * len(batch)), spent

        return run


def _costs(report: EncoderReport) -> Record:
    """Of each image of a batch."""
    return {
        "final_tokens": report.final_tokens,
        "average_tokens": mean(report.counts),
        "encoder_flops": report.encoder_flops // report.images,
    }


def _adapts(cell: Cell) -> bool:
    """Whether a cell's classifier adapts to the images it sees."""
    return cell.method == TCA.name and cell.given.get("reservoir") is not None
