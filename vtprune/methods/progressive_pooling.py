# SPDX-License-Identifier: Apache-2.0
"""Progressive pooling (Visual Context Window Extension): average to fine grids in some frames, coarse in others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.methods.grids import even_cells, pool_crops
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.pooling import progressive_counts
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class ProgressivePooling(BeforeLLM):
    """Averages cells of each frame's grid, with smaller cells in the first frame of every group of frames.

    Inspired by the progressive pooling of Visual Context Window Extension (arXiv 2409.20018). Its authors have
    published neither code nor the grids and group sizes that they used. The extension of the context window is left
    out. Stage: before the LLM, on whole images only. Images, also tiled ones, are pooled evenly. Deviation: budgets are
    met exactly, so the cells of a frame may differ by a row or a column. A mean takes the place of the token nearest to
    the centre of its cell. A CLS token before a grid is kept and counts.

    Fields
        frames: number of consecutive frames in a group, >= 1, default 2 (in the paper's figure fine and coarse frames
            alternate).
        ratio: the first frame of a group gets this many times the tokens of another frame, >= 1, default 4 (twice as
            many rows and columns).
        scope: "image" (default); with "crop" every frame has the same budget.
    """

    name: ClassVar[str] = "progressive_pooling"
    signal: ClassVar[str] = "position"
    paper: ClassVar[str] = "arXiv 2409.20018"
    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    frames: Annotated[int, Ge(1)] = 2
    ratio: Annotated[float, Ge(1)] = 4.0
    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        budget = tokens.host.budget.tolist()

        def counts(group: int, sizes: Tensor) -> Tensor:
            if tokens.kinds[group] == "video" and len(sizes):
                return progressive_counts(len(sizes), int(sizes[0]), budget[group], group=self.frames, ratio=self.ratio)
            return apportion(budget[group], sizes, sizes)

        return pool_crops(self.name, tokens, counts, even_cells)
