# SPDX-License-Identifier: Apache-2.0
"""Baseline: average cells of the patch grid, and frames of a video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM
from vtprune.methods.grids import even_cells, pool_crops
from vtprune.ops.largest_remainder import share_out
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pool(BeforeLLM):
    """Averages rectangular cells of each image's grid down to exactly k tokens (`vtprune.ops.pooling`).

    Stage: before the LLM, on whole images only. A mean takes the place of the token nearest to the centre of its cell.
    A CLS token before the grid is kept and counts. With frames > 1, consecutive frames are averaged first, position by
    position, and a mean takes the place of the middle frame. The budget is then at most the number of tokens left.

    Fields
        frames: number of consecutive frames of a video that are averaged before pooling, >= 1, default 1. More than one
            needs scope="image".
    """

    name: ClassVar[str] = "pool"
    signal: ClassVar[str] = "position"
    merges: ClassVar[bool] = True
    needs_grid: ClassVar[bool] = True

    frames: Annotated[int, Ge(1)] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.frames > 1 and self.scope == "crop":
            raise ConfigError(f"pool: frames={self.frames} needs scope='image': a single frame has no neighbours")

    def select(self, tokens: VisualTokens) -> Selection:
        budget = tokens.host.budget.tolist()

        def counts(group: int, sizes: Tensor) -> Tensor:
            return share_out(sizes, min(budget[group], int(sizes.sum())))

        return pool_crops(self.name, tokens, counts, even_cells, frames=self.frames)
