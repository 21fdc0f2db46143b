# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: keep the tokens that visually relevant text attends to, and merge a part of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.methods.base import Share
from vtprune.methods.schedules import Staged
from vtprune.ops.selection import top_k_mask
from vtprune.ops.text_raters import text_raters
from vtprune.ops.token_recycling import recycle_dropped
from vtprune.signals import LayerSignal, LayerView
from vtprune.stages.layout import take_columns
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens


@dataclass(frozen=True)
class RaterAttention(LayerSignal):
    """(groups, heads, tokens): attention of the text raters over the visual tokens in the decoder layer before the cut,
    averaged over the raters. They are found by `vtprune.ops.text_raters` in the text after the last visual token."""

    undo_rotation: bool = False
    """Whether each weight is divided by the logit that positions alone would give."""

    def attends(self, cut: int) -> tuple[int, ...]:
        return (cut - 1,)

    def mark(self, view: LayerView) -> Tensor:
        (rows, valid), hidden = view.text_rows(), view.hidden.detach()
        real = (view.groups.valid.to(hidden.device), valid.to(hidden.device))
        raters = text_raters(view.groups.gather(hidden), take_columns(hidden, rows), *real).to(rows.device)
        return torch.zeros_like(view.real).scatter(1, rows, raters)

    def read_layer(self, view: LayerView) -> Tensor:
        attention, (rows, valid) = view.attention(view.layer - 1), view.rows_of(view.marked(self) & view.real)
        total = None
        for block, rates, weights in attention.blocks_of_rows(rows, valid):
            if self.undo_rotation:
                weights = weights / attention.context.position_logits(block)[:, None].to(weights.device)
            sums = weights.masked_fill(~rates[:, None, :, None], 0).sum(2)
            total = sums if total is None else total + sums
        return view.by_head(total / valid.to(total.device).sum(1)[:, None, None])


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Drops visual tokens in stages by the attention of text raters, and merges some of them (arXiv 2410.04417).

    Stage: inside the LLM. Raters are the text tokens after the image whose input embeddings are more similar to the
    image than average. The score of a token is the attention that the raters pay to it in the layer before the cut. The
    best dropped tokens are clustered, and each cluster becomes one token, which later cuts score like any other token.
    This is version 1.5 of the reference, and as there positions are renumbered after every stage. Version 2.0
    ("SparseVLM+") is `recycle=0, undo_rotation=True, heads=14, positions="original"`, and its "192 tokens" are
    `schedule=(0.521, 0.3473, 0.205)`.
    Deviations: counts include the merged tokens (in the reference they come in addition); a merged token takes the
    place of its cluster's centre (in the reference it stands after the whole image), and a cluster stays within one run
    of visual tokens; nothing is random (the reference adds noise to densities); if no text token is above the mean, all
    text tokens are raters, and without text after the image the last token is; batches and several images work; the
    paper's first release, which computes counts from the rank of the attention, is left out.

    Fields
        layers: cuts on the input of these decoder layers, 0-based, ascending; default None: (3, 7, 16) of 32 layers,
            rescaled to the model's depth.
        schedule: share of the entering visual tokens that is left after each cut, in [0, 1], not increasing; default
            (0.5365, 0.3542, 0.1962), i.e. 309, 204 and 113 of 576, the reference's "192 tokens" with its merged ones.
            With a budget the schedule is scaled to meet it.
        recycle: share of the dropped tokens that are clustered, in [0, 1], default 0.3; 0 merges none.
        undo_rotation: divide the attention by the logit that positions alone would give, default False.
        heads: average only this many heads, those in which the raters attend most to the image; >= 1, default None: all
            heads.
    """

    name: ClassVar[str] = "sparsevlm"
    signal: ClassVar[str] = "attention in the LLM, similarity of the text to the image"
    paper: ClassVar[str] = "arXiv 2410.04417"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    published_layers: ClassVar[tuple[int, ...]] = (3, 7, 16)

    schedule: tuple[Share, ...] = (0.5365, 0.3542, 0.1962)
    recycle: Share = 0.3
    undo_rotation: bool = False
    heads: Annotated[int, Ge(1)] | None = None
    positions: Literal["original", "compact"] = "compact"

    def signals(self, shape: ModelShape):
        return (RaterAttention(self.undo_rotation),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        """(groups, tokens) float, larger is better."""
        weights = tokens[RaterAttention(self.undo_rotation)]
        if self.heads is None:
            return weights.mean(1)
        # Padding is zero in every head, so it does not change the order of heads.
        best = weights.sum(-1).argsort(dim=1, descending=True, stable=True)[:, : self.heads]
        return weights.gather(1, best[..., None].expand(-1, -1, weights.shape[-1])).mean(1)

    def select(self, tokens: VisualTokens) -> Selection:
        scores = self.scores(tokens)
        if self.recycle == 0:
            return Selection(top_k_mask(scores, tokens.valid, tokens.budget))
        merging = Merging(tokens)
        for group, length, k in tokens.each():
            states = tokens.features[group, :length]
            runs = None if tokens.runs is None else tokens.runs[group, :length]
            merging.put(group, length, *recycle_dropped(states, scores[group, :length], k, self.recycle, runs=runs))
        return merging.selection
