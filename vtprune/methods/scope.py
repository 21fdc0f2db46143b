# SPDX-License-Identifier: Apache-2.0
"""SCOPE: keep salient tokens that cover what is not covered yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from vtprune.methods.base import BeforeLLM
from vtprune.ops.coverage import greedy_cover
from vtprune.ops.token_pairs import directions_of
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class SCOPE(BeforeLLM):
    """Greedy choice by saliency times coverage gain (arXiv 2510.24214).

    Stage: before the LLM. Text is not used. A set of tokens covers a token by the largest cosine with one of the set,
    at least 0; the gain of a token is what it adds to the coverage of all tokens. Each step takes the token with the
    largest product of gain and saliency. Saliency is attention in the encoder layer whose output the projector reads:
    that of the CLS token, averaged over heads, or, where the encoder has none, what a token receives. Published
    settings: 64 of 576 tokens; 160 of 2,880.
    Deviations: the attention of a head is not scaled to a sum of 1 without the CLS token; tokens are chosen for each
    crop separately (AngelSlim's implementation chooses among all images of a prompt together; scope="image": among the
    crops of an image); only tokens that may have the largest product are evaluated, with the same result.

    Fields
        alpha: exponent of the saliency, >= 0, default 1; 0 is pure coverage.
    """

    name: ClassVar[str] = "scope"
    signal: ClassVar[str] = "coverage of the image, attention in the encoder"
    paper: ClassVar[str] = "arXiv 2510.24214"

    alpha: Annotated[float, Ge(0)] = 1.0

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer),)

    def select(self, tokens: VisualTokens) -> Selection:
        weights = tokens[EncoderSaliency(tokens.shape.feature_layer)].float() ** self.alpha
        directions = directions_of(tokens.features, tokens.valid)
        kept = []
        for group, length, k in tokens.each():
            own = directions[group, :length]
            order, _ = greedy_cover((own @ own.T).clamp_min_(0), weights[group, :length], k)
            kept.append(order.sort().values)
        return Selection.of_indices(tokens, kept)
