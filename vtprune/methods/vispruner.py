# SPDX-License-Identifier: Apache-2.0
"""VisPruner: what the vision encoder attends to, and of the rest what duplicates least."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.cls_attention import cls_score
from vtprune.ops.duplicate_removal import important_and_distinct
from vtprune.signals import AttentionReceived, ClsAttention, EncoderFeatures
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisPruner(BeforeLLM):
    """Keeps the tokens with most attention in the encoder, then the least duplicated ones of the rest
    (arXiv 2412.01818).

    Stage: before the LLM; text plays no part. Attention is that of the CLS token in the layer whose output the
    projector reads, or where there is no CLS token what a token receives in the last layer; the mean over heads.
    Similarity is the cosine of what the projector reads. Deviations: tokens are dropped after the projector instead of
    before it, which changes nothing but the projector's (small) cost; the reference cannot split a list of odd length
    in two, nor take more from a list than half, here both go as far as they can; newline tokens, which the reference
    always keeps, go with the last token of their line. Published settings: 128 tokens of 576 with a ratio of 0.5, 64
    with 0.75, 32 of each tile with 0.5.

    Fields
        important_ratio: share of the budget that is kept for its attention, rounded down, in [0, 1], default 0.5.
    """

    name: ClassVar[str] = "vispruner"
    signal: ClassVar[str] = "attention in the encoder, similarity"
    paper: ClassVar[str] = "arXiv 2412.01818"

    important_ratio: Share = 0.5

    def attention(self, shape: ModelShape) -> Hashable:
        """The request for the attention that tokens are ranked by."""
        return ClsAttention((shape.feature_layer,)) if shape.has_cls else AttentionReceived(shape.encoder_layers - 1)

    def signals(self, shape: ModelShape):
        return self.attention(shape), EncoderFeatures()

    def select(self, tokens: VisualTokens) -> Selection:
        attention, features = tokens[self.attention(tokens.shape)], tokens[EncoderFeatures()]
        if tokens.shape.has_cls:
            attention = cls_score(attention)
        ratio = self.important_ratio
        return Selection(
            important_and_distinct(attention, features, tokens.valid, tokens.budget, important_ratio=ratio)
        )
