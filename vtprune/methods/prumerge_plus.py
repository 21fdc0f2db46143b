# SPDX-License-Identifier: Apache-2.0
"""PruMerge+: PruMerge, with tokens at an even stride besides the outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.methods.prumerge import PruMerge
from vtprune.ops.outlier_merging import even_steps
from vtprune.ops.selection import evenly_among, top_k_mask
from vtprune.tokens import VisualTokens


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(PruMerge):
    """PruMerge that also keeps tokens at an even stride, about three for each outlier (arXiv 2403.15388).

    All else is as in `prumerge`, and so are the fields. Deviations besides those: with a budget, a quarter of the kept
    tokens are the most salient ones, and the others are spread evenly over the rest, so that the budget is met exactly
    (the reference has no such form; its form for training keeps some tokens twice); few tokens or many outliers work
    (the reference fails).
    """

    name: ClassVar[str] = "prumerge_plus"
    signal: ClassVar[str] = "CLS attention and keys in the encoder, position"

    def _adaptive(self, attention: Tensor, tokens: VisualTokens, outliers: Tensor) -> Tensor:
        salient = super()._adaptive(attention, tokens, outliers)
        return salient | (even_steps(outliers, tokens.lengths, tokens.valid.shape[1]) & tokens.valid)

    def _counted(self, attention: Tensor, tokens: VisualTokens, counts: Tensor) -> Tensor:
        salient = torch.where(counts < tokens.host.lengths, (counts + 3) // 4, counts)
        kept = top_k_mask(attention.float(), tokens.valid, salient)
        return kept | evenly_among(tokens.valid & ~kept, counts - salient)
