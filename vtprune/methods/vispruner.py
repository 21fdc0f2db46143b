# SPDX-License-Identifier: Apache-2.0
"""VisPruner: keep the tokens with most attention in the encoder, and the least duplicated ones of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.duplicate_removal import important_and_distinct
from vtprune.signals import EncoderFeatures, EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisPruner(BeforeLLM):
    """Keeps the tokens with most attention in the encoder, then the least duplicated of the others (arXiv 2412.01818).

    Stage: before the LLM. Text is not used. Attention is that of the CLS token in the layer whose output the projector
    reads, or, without a CLS token, the attention that a token receives in the last layer; heads are averaged.
    Similarity is the cosine of the features that the projector reads. Deviations: tokens are dropped after the
    projector and not before it, which changes only the projector's (small) cost; lists of odd length, and lists of
    which more than half should be removed at once, work (the reference fails); newline tokens are dropped with the last
    token of their line (the reference always keeps them). Published settings: 128 tokens of 576 with a ratio of 0.5, 64
    with 0.75, 32 of each tile with 0.5.

    Fields
        important_ratio: share of the budget that is kept by attention, rounded down, in [0, 1], default 0.5.
    """

    name: ClassVar[str] = "vispruner"
    signal: ClassVar[str] = "attention in the encoder, similarity"
    paper: ClassVar[str] = "arXiv 2412.01818"

    important_ratio: Share = 0.5

    def attention(self, shape: ModelShape) -> EncoderSaliency:
        """The signal with the attention by which tokens are ranked."""
        return EncoderSaliency(shape.feature_layer if shape.has_cls else shape.encoder_layers - 1)

    def signals(self, shape: ModelShape):
        return self.attention(shape), EncoderFeatures()

    def select(self, tokens: VisualTokens) -> Selection:
        attention, features = tokens[self.attention(tokens.shape)], tokens[EncoderFeatures()]
        host, ratio = tokens.host, self.important_ratio
        return Selection(
            important_and_distinct(attention, features, tokens.valid, host.lengths, host.budget, important_ratio=ratio)
        )
