# SPDX-License-Identifier: Apache-2.0
"""FastV: keep the tokens that the prompt's last token attends to most in an early layer of the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from vtprune.methods.base import Scorer, Share
from vtprune.methods.schedules import CutOnce
from vtprune.signals import LastQueryAttention
from vtprune.tokens import ModelShape, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastV(Scorer, CutOnce):
    """Drops visual tokens once, before layer K, by the last prompt token's attention in layer K-1 (arXiv 2403.06764).

    Stage: inside the LLM. Attention is averaged over heads. Original positions are kept, as in the reference.
    Deviations: tokens are chosen for every sample, among all its visual tokens (the reference applies the choice of the
    first sample to the whole batch); the attention row is recomputed from queries and keys, so the attention back end
    does not change.

    Fields
        layer: K, 0-based, in 1..depth-1; default None: 2 of 32 layers, rescaled to the model's depth, at least 1.
        share: share of the visual tokens that is left from layer K on if no budget is given, in [0, 1], default 0.5.
    """

    name: ClassVar[str] = "fastv"
    signal: ClassVar[str] = "attention in the LLM"
    paper: ClassVar[str] = "arXiv 2403.06764"
    text_aware: ClassVar[bool] = True

    share: Share = 0.5
    positions: Literal["original", "compact"] = "original"

    def signals(self, shape: ModelShape):
        return (LastQueryAttention(self.cuts(shape)[0] - 1),)

    def scores(self, tokens: VisualTokens) -> Tensor:
        return tokens[LastQueryAttention(tokens.layer - 1)].mean(1)
