# SPDX-License-Identifier: Apache-2.0
"""Progressive pooling: the first of every few frames on a fine grid, the others on a coarse one."""

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
    """Averages cells of each frame's grid, finer in the first frame of every group of consecutive ones.

    Inspired by the progressive pooling of Visual Context Window Extension (arXiv 2409.20018), whose authors have not
    published code, nor the grids and group sizes they ran; the extension of the context window is not part of it.
    Stage: before the LLM, on whole images only. Images, tiled ones too, are pooled evenly. Deviation: budgets are met
    exactly, so cells of a frame may differ by a row or a column. A mean stands where the token nearest its cell's
    centre stood; a CLS token before a grid is kept and counts.

    Fields
        frames: consecutive frames in a group, >= 1, default 2 (the figure of the paper alternates).
        ratio: how many times as many tokens the first frame of a group gets, >= 1, default 4 (twice as many rows and
            columns).
        scope: "image" (default); with "crop" every frame has the same budget.
    """

    name: ClassVar[str] = "progressive_pooling"
    signal: ClassVar[str] = "position"
    paper: ClassVar[str] = "arXiv 2409.20018"

    frames: Annotated[int, Ge(1)] = 2
    ratio: Annotated[float, Ge(1)] = 4.0
    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        budget = tokens.budget.tolist()

        def counts(group: int, sizes: Tensor) -> Tensor:
            if tokens.kinds[group] == "video" and len(sizes):
                return progressive_counts(len(sizes), int(sizes[0]), budget[group], group=self.frames, ratio=self.ratio)
            return apportion(budget[group], sizes, sizes)

        return pool_crops(self.name, tokens, counts, even_cells)
