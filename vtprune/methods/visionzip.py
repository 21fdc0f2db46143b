# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the tokens that the encoder attends to most, and merge the others into a few contextual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.contextual_merging import merge_contextual
from vtprune.ops.selection import top_k_mask
from vtprune.signals import EncoderKeys, EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VisionZip(BeforeLLM):
    """Keeps dominant tokens, by attention in the encoder, and merges the others (arXiv 2412.04467).

    Stage: before the LLM, from attention and keys of the encoder layer whose output the projector reads. Text is not
    used. Attention is that of the CLS token, averaged over heads. Where the encoder has no CLS token, it is the
    attention that a token receives, as in the authors' variants for such encoders. Contextual tokens are at an even
    stride among the tokens that are not dominant. Each other token joins the contextual token with the most similar
    key; keys are averaged over heads, and taken before any rotation.
    Deviations: a contextual token is the mean of its group, as the paper says (see reference_quirks); tokens are merged
    after the projector and not before it; the CLS token, which the reference counts in its budget, does not enter the
    LLM; a contextual token takes the place of its group's centre (in the reference it stands after all dominant
    tokens), and tiles keep their rows and newline tokens; budgets without a contextual token, or with more contextual
    tokens than tokens to merge, work (the reference fails).

    Fields
        contextual_share: share of contextual tokens among the kept tokens, in [0, 1], default 10/64, as published (10
            of 64, 20 of 128, 30 of 192); 0 drops all tokens that are not dominant.
        reference_quirks: a contextual token is its centre plus the mean of the tokens that joined it, about twice as
            long as other tokens; default False.
    """

    name: ClassVar[str] = "visionzip"
    signal: ClassVar[str] = "attention and keys in the encoder"
    paper: ClassVar[str] = "arXiv 2412.04467"
    merges: ClassVar[bool] = True

    contextual_share: Share = 10 / 64
    reference_quirks: bool = False

    def signals(self, shape: ModelShape):
        return EncoderSaliency(shape.feature_layer), EncoderKeys(shape.feature_layer, heads="mean")

    def select(self, tokens: VisualTokens) -> Selection:
        saliency, keys = (tokens[signal] for signal in self.signals(tokens.shape))
        budget = tokens.host.budget
        contextual = (budget * self.contextual_share).round().long()
        dominant = top_k_mask(saliency, tokens.valid, budget - contextual)
        merged = merge_contextual(
            tokens.features, keys, dominant, tokens.valid, contextual, reference_quirks=self.reference_quirks
        )
        return Selection(*merged)
