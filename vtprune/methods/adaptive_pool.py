# SPDX-License-Identifier: Apache-2.0
"""Adaptive pooling (TokenFLEX): average the patch grid to a smaller grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.methods.grids import even_cells, pool_crops
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.pooling import adaptive_pool
from vtprune.tokens import Grid, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class AdaptivePool(BeforeLLM):
    """Averages each image's grid down to a smaller grid by adaptive pooling.

    The part of TokenFLEX (arXiv 2504.03154) that needs no training; its projector and its training with several numbers
    of tokens are left out. Stage: before the LLM, on whole images only. The budget is turned into rows and columns
    whose cells are nearest to squares. If a side cannot be divided evenly, the averaged windows overlap by a row or
    column. A budget without such a grid (cells would be more than twice as long as wide) is pooled as `pool` does. A
    mean takes the place of the token nearest to the centre of its cell. A CLS token before the grid is kept and counts.
    Deviation: features are pooled after the projector, not before it. Published settings: 64, 144 or 256 tokens an
    image.

    Fields
        overlap: whether windows may overlap, default True. False: a token counts only in the cell that most of it lies
            in.
    """

    name: ClassVar[str] = "adaptive_pool"
    signal: ClassVar[str] = "position"
    paper: ClassVar[str] = "arXiv 2504.03154"
    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    overlap: bool = True

    def select(self, tokens: VisualTokens) -> Selection:
        budget = tokens.host.budget.tolist()
        return pool_crops(self.name, tokens, lambda group, sizes: apportion(budget[group], sizes, sizes), self._pool)

    def _pool(self, features: Tensor, grid: Grid, k: int) -> tuple[Tensor, Tensor, Tensor]:
        cells = _cells(grid, k)
        if cells is None:
            return even_cells(features, grid, k)
        merged = adaptive_pool(features[None], (grid.rows, grid.cols), cells)
        keep, pooled, sources = (part[0] for part in merged.in_place(features[None]))
        if not self.overlap:
            sums = torch.zeros_like(features, dtype=torch.float32).index_add_(0, sources, features.float())
            pooled[keep] = (sums[keep] / sources.bincount(minlength=len(keep))[keep, None]).to(pooled.dtype)
        return keep, pooled, sources


def _cells(grid: Grid, k: int) -> tuple[int, int] | None:
    """Rows and columns that give `k` cells nearest to squares; None if no cells are near enough."""
    found = [(rows, k // rows) for rows in range(1, grid.rows + 1) if k % rows == 0 and 0 < k // rows <= grid.cols]
    if not found:
        return None

    def elongation(cells: tuple[int, int]) -> float:
        side = grid.rows / cells[0] / (grid.cols / cells[1])
        return max(side, 1 / side)

    best = min(found, key=elongation)
    return best if elongation(best) <= 2 else None
