# SPDX-License-Identifier: Apache-2.0
"""HoloV: spread the budget over the parts of an image, and keep the most salient tokens of each part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from vtprune.methods.base import BeforeLLM
from vtprune.ops.run_budgets import best_of_runs
from vtprune.signals import EncoderSaliency
from vtprune.tokens import ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class HoloV(BeforeLLM):
    """Gives each part of an image a budget by its mean attention, and keeps its most salient tokens (arXiv 2510.02912).

    Stage: before the LLM, from attention in the encoder layer whose output the projector reads: that of the CLS token,
    averaged over heads, or, where the encoder has none, what a token receives. Text is not used. A part is a run of
    tokens in raster order, as in the reference. Published setting: 64 of 576 tokens, 16 parts.
    Deviations: the reference adds the variance of similarities to a part's score, scaled so that its mean is a fixed
    share of the attention's mean; it cannot change a budget, and is left out. What a part cannot take goes to the most
    salient tokens of the others (the reference fills up with zero vectors); a part of one token weighs as much as any
    other; kept tokens stay in raster order (in the reference, the most salient token of a part comes first). Each tile
    has a budget of its own (scope="image": one for the image, as in the reference).

    Fields
        parts_per_crop: number of parts, >= 1, default 16.
        reference_quirks: what a part cannot take is lost, so that fewer tokens stay than the budget says, and a part of
            one token weighs 1,090 times less; default False.
    """

    name: ClassVar[str] = "holov"
    signal: ClassVar[str] = "attention in the encoder"
    paper: ClassVar[str] = "arXiv 2510.02912"

    parts_per_crop: Annotated[int, Ge(1)] = 16
    reference_quirks: bool = False

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer),)

    def select(self, tokens: VisualTokens) -> Selection:
        saliency = tokens[EncoderSaliency(tokens.shape.feature_layer)]
        return Selection(
            best_of_runs(
                saliency,
                tokens.valid,
                tokens.budget,
                self.parts_per_crop,
                reference_quirks=self.reference_quirks,
            )
        )
