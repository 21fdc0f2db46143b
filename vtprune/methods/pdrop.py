# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: halve the visual tokens at the end of every stage of the LLM, by the last token's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.methods.base import Scorer, Share
from vtprune.methods.schedules import Staged
from vtprune.signals import InstructionAttention
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Scorer, Staged):
    """Drops visual tokens in stages by the attention of the prompt's last token (arXiv 2410.17247).

    Stage: inside the LLM. The score of a token is the attention that the last token pays to it in the layer that runs
    next, averaged over heads. Positions are renumbered after every stage, as in the reference.
    Deviations: attention is computed in float32; grouped-query attention, padding on both sides and several images
    work, and images compete with one another; of equal scores the earlier token stays; dropping tokens in training,
    which the reference also does, is left out.

    Fields
        layers: cuts on the input of these decoder layers, 0-based, ascending; default None: (8, 16, 24) of 32 layers,
            rescaled to the model's depth.
        schedule: share of the entering visual tokens that is left after each cut, in [0, 1], not increasing; default
            (0.5, 0.25, 0.125). With a budget the schedule is scaled to meet it.
    """

    name: ClassVar[str] = "pdrop"
    signal: ClassVar[str] = "attention in the LLM"
    paper: ClassVar[str] = "arXiv 2410.17247"
    text_aware: ClassVar[bool] = True
    published_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    schedule: tuple[Share, ...] = (0.5, 0.25, 0.125)
    positions: Literal["original", "compact"] = "compact"

    def signals(self, shape: ModelShape):
        return (InstructionAttention(last_only=True),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[InstructionAttention(last_only=True)]
