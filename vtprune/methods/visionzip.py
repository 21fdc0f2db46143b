# SPDX-License-Identifier: Apache-2.0
"""VisionZip: the tokens that the encoder attends to, and a few that sum up the rest."""

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

    Stage: before the LLM, from attention and keys of the encoder layer whose output the projector reads; text plays no
    part. Attention is that of the CLS token; where the encoder has none, what a token receives, as in the authors' own
    variants for such encoders; the mean over heads. Contextual tokens stand at an even stride among those that are not
    dominant, and each other token joins the one with the most similar key. Keys are averaged over heads, and taken
    before any rotation.
    Deviations: a contextual token is the mean of its group, as the paper says (see reference_quirks); tokens are merged
    after the projector instead of before it; the CLS token, which the reference counts in its budget, does not enter
    the LLM; contextual tokens stand where the centres of their groups stood, not after all dominant ones, and tiles
    keep their rows and newlines; budgets with no contextual token, or with fewer tokens to merge than contextual ones,
    on which the reference fails, work.

    Fields
        contextual_share: share of the kept tokens that are contextual, in [0, 1], default 10/64, as published (10 of
            64, 20 of 128, 30 of 192); 0 drops what is not dominant.
        reference_quirks: a contextual token is its centre plus the mean of those that joined it, about twice as long
            as any other; default False.
    """

    name: ClassVar[str] = "visionzip"
    signal: ClassVar[str] = "attention and keys in the encoder"
    paper: ClassVar[str] = "arXiv 2412.04467"

    contextual_share: Share = 10 / 64
    reference_quirks: bool = False

    def signals(self, shape: ModelShape):
        return EncoderSaliency(shape.feature_layer), EncoderKeys(shape.feature_layer, heads="mean")

    def select(self, tokens: VisualTokens) -> Selection:
        saliency, keys = (tokens[signal] for signal in self.signals(tokens.shape))
        contextual = (tokens.budget * self.contextual_share).round().long()
        dominant = top_k_mask(saliency, tokens.valid, tokens.budget - contextual)
        merged = merge_contextual(
            tokens.features, keys, dominant, tokens.valid, contextual, reference_quirks=self.reference_quirks
        )
        return Selection(*merged)
