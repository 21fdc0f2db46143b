# SPDX-License-Identifier: Apache-2.0
"""MMR: keep tokens that matter, and are unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.marginal_relevance import marginal_relevance
from vtprune.signals import EncoderSaliency, TextEmbeddings
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class MMR(BeforeLLM):
    """Keeps tokens by maximal marginal relevance: relevance less likeness to those kept before.

    The rule is that of Carbonell and Goldstein (1998); IDPruner (arXiv 2602.13315) uses it for visual tokens, with
    scores of a trained network. Stage: before the LLM; likeness is the cosine of projected features. The first token
    is the most relevant one.
    Deviations: scores need no training; relevance is scaled to [0, 1] in each crop, and how it is traded against being
    unlike is a choice made here.

    Fields
        relevance: "saliency" (default): attention in the encoder layer whose output the projector reads, that of the
            CLS token or, where the encoder has none, what a token receives. "question": the largest cosine with the
            embedding of a token of the question; without a question all tokens are equally relevant.
        trade: weight of relevance against being unlike, in [0, 1], default 0.5.
    """

    name: ClassVar[str] = "mmr"
    signal: ClassVar[str] = "attention in the encoder or the question, similarity"
    paper: ClassVar[str] = "arXiv 2602.13315"

    relevance: Literal["saliency", "question"] = "saliency"
    trade: Share = 0.5

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer),) if self.relevance == "saliency" else (TextEmbeddings(),)

    def select(self, tokens: VisualTokens) -> Selection:
        if self.relevance == "saliency":
            relevance = tokens[EncoderSaliency(tokens.shape.feature_layer)]
        else:
            relevance = _likeness_to_question(tokens.features, tokens[TextEmbeddings()])
        keep = marginal_relevance(tokens.features, relevance, tokens.valid, tokens.host.budget, self.trade)
        return Selection(keep)


def _likeness_to_question(features: Tensor, texts: list[Tensor]) -> Tensor:
    """(groups, tokens) largest cosine of each (groups, tokens, dim) feature with a token of its (words, dim) text."""
    likeness = features.new_zeros(features.shape[:2], dtype=torch.float32)
    for group, text in enumerate(texts):
        if len(text):
            cosines = normalize(features[group].float(), dim=-1) @ normalize(text.float(), dim=-1).mT
            likeness[group] = cosines.amax(1)
    return likeness
