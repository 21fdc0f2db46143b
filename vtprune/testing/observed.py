# SPDX-License-Identifier: Apache-2.0
"""A session that takes down what its method put in the place of visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vtprune.methods.base import AfterPrefill, BeforeLLM, InEncoder, Method
from vtprune.methods.in_layers import InLayers
from vtprune.report import Report
from vtprune.session import Session
from vtprune.stages.model_calls import ModelCalls
from vtprune.testing.recompute import Merges
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True)
class Sample:
    """What one sample of a padded batch, or a prompt alone, got under a session. Columns are those of its own prompt,
    without padding."""

    logits: Tensor
    """(new tokens, vocabulary)"""
    kept: list[Tensor]
    """One a decoder layer: columns of the visual tokens alive in it."""
    cached: list[Tensor]
    """One a decoder layer: columns of those that its cache holds."""
    merges: Merges | None
    """None if features only went or stayed."""


class _ObservedCalls(ModelCalls):
    """Remembers the features that a method returned in the last prefill."""

    merged: Sequence[tuple[int, int, Tensor, Tensor]] = ()
    """Decoder layer, row of the batch, columns (tokens,) of the padded prompt, features (tokens, dim)."""

    def start_prefill(self, call, incoming):
        super().start_prefill(call, incoming)
        self.merged = []
        parts = [part for method in self.methods for part in method.parts(self.adapter.shape)]
        if any(isinstance(part, InEncoder | InLayers) for part in parts):
            for row, visual in enumerate(call.media.visual):
                self.merged.append((0, row, visual.nonzero().flatten(), call.embeddings[row, visual].detach().clone()))

    def choose(self, method: Method, tokens: VisualTokens) -> Selection:
        selection = super().choose(method, tokens)
        call = self.now.call
        if isinstance(method, BeforeLLM):
            layer, groups = 0, call.crop_groups() if method.scope == "crop" else call.image_groups()
        else:
            layer, groups = tokens.layer, call.sample_groups()
        keep = selection.on_host().keep & groups.valid
        if selection.features is not None and not bool(keep.equal(groups.valid)):
            for group, row in enumerate(groups.rows.tolist()):
                columns = call.sequence.columns[row, groups.columns[group, keep[group]]]
                features = selection.features[group, keep[group].to(selection.features.device)]
                order = columns.argsort()
                self.merged.append((layer, row, columns[order], features.to(columns.device)[order].detach().clone()))
        return selection


class ObservedSession(Session):
    """A session of one method that remembers the features which it returned in the last prefill."""

    _calls_class = _ObservedCalls

    def __init__(self, model, method: Method):
        super().__init__(model, [method], strict=True, text=None, prompt_length=None, profile=False)
        parts = method.parts(self.adapter.shape)
        # What only empties the cache drops nothing from the sequence, which a strict session takes for a mistake.
        self.strict = not all(isinstance(part, AfterPrefill) for part in parts)

    def sample(self, row: int, first: int, logits: Tensor, report: Report | None = None) -> Sample:
        """What a row of the last prefill got. first: column of its first real token. report: of that prefill."""
        report = report or self.report
        layers = range(report.depth)
        values = [(layer, columns - first, x) for layer, own, columns, x in self._calls.merged if own == row]
        return Sample(
            logits=logits,
            kept=[report.kept(row, layer) - first for layer in layers],
            cached=[report.cached(row, layer) - first for layer in layers],
            merges=Merges(values, [report.sources(row, layer) for layer in layers]) if values else None,
        )
