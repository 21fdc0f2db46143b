# SPDX-License-Identifier: Apache-2.0
"""Baseline: average pooling of the patch grid, and of a video's frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.base import BeforeLLM
from vtprune.ops.pooling import pool_grid
from vtprune.ops.video_merging import share_out
from vtprune.tokens import Grid, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pool(BeforeLLM):
    """Averages rectangular cells of each image's grid down to exactly k tokens (`vtprune.ops.pooling`).

    Stage: before the LLM, on whole images only. A mean stands where the token nearest its cell's centre stood. A CLS
    token before the grid is kept and counts. Over time, frames are averaged first, position by position; a mean then
    stands in the middle one of its frames. What is left of the video then bounds the budget.

    Fields
        frames: consecutive frames of a video averaged before their grid is, >= 1, default 1; more need scope="image".
    """

    name: ClassVar[str] = "pool"
    signal: ClassVar[str] = "position"

    frames: Annotated[int, Ge(1)] = 1

    def __post_init__(self):
        super().__post_init__()
        if self.frames > 1 and self.scope == "crop":
            raise ConfigError(f"pool: frames={self.frames} needs scope='image': a single frame has no neighbours")

    def select(self, tokens: VisualTokens) -> Selection:
        keep, features = torch.zeros_like(tokens.valid), tokens.features.clone()
        sources = torch.full_like(tokens.valid, -1, dtype=torch.long)
        for group, length, k in tokens.each():
            clips = self._clips(tokens, group, length)
            sizes = torch.tensor([places.shape[1] for places, _ in clips], dtype=torch.long)
            counts = share_out(sizes, min(k, int(sizes.sum())))
            for (places, grid), count in zip(clips, counts.tolist(), strict=True):
                means = tokens.features[group, places].float().mean(0).to(features.dtype)
                kept, pooled, into = _pool(means, grid, count)
                middle = places[(len(places) - 1) // 2]
                keep[group, middle] = kept
                features[group, middle] = pooled
                sources[group, places] = torch.where(into >= 0, middle[into], -1)
        return Selection(keep, features, sources)

    def _clips(self, tokens: VisualTokens, group: int, length: int) -> list[tuple[Tensor, Grid]]:
        """What is pooled together: places in the group (frames, tokens of a frame), and the grid of a frame."""
        layouts = tokens.layouts[group]
        if length and None in layouts:
            raise UnsupportedStageError("pool needs whole images laid out as a grid; put it before other methods")
        places = torch.arange(length, device=tokens.valid.device)
        crops = [places[tokens.crops[group, :length] == crop] for crop in range(len(layouts) if length else 0)]
        step = self.frames if tokens.kinds[group] == "video" else 1
        return [(torch.stack(crops[first : first + step]), layouts[first]) for first in range(0, len(crops), step)]


def _pool(features: Tensor, grid: Grid, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """`pool_grid` behind tokens without a place, which stay: features (tokens, dim) -> keep, pooled, sources."""
    prefix = min(grid.prefix, k)
    kept, pooled, into = pool_grid(features[grid.prefix :], (grid.rows, grid.cols), k - prefix)
    first = torch.arange(grid.prefix, device=into.device)
    return (
        torch.cat([first < prefix, kept]),
        torch.cat([features[: grid.prefix], pooled]),
        torch.cat([torch.where(first < prefix, first, -1), torch.where(into >= 0, into + grid.prefix, -1)]),
    )
