# SPDX-License-Identifier: Apache-2.0
"""Baseline: average pooling of the patch grid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import BeforeLLM
from vtprune.ops.pooling import pool_grid
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Pool(BeforeLLM):
    """Averages rectangular cells of each image's grid down to exactly k tokens (`vtprune.ops.pooling`).

    Stage: before the LLM, on whole images only. A mean stands where the token nearest its cell's centre stood. A CLS
    token before the grid is kept and counts.
    """

    name: ClassVar[str] = "pool"
    signal: ClassVar[str] = "position"

    def select(self, tokens: VisualTokens) -> Selection:
        keep = torch.zeros_like(tokens.valid)
        features = tokens.features.clone()
        sources = torch.full_like(tokens.valid, -1, dtype=torch.long)
        for group, length, k in tokens.each():
            grid = tokens.grids[group]
            if grid is None:
                raise UnsupportedStageError("pool needs whole images laid out as a grid; put it before other methods")
            prefix = min(grid.prefix, k)
            patches = slice(grid.prefix, length)
            kept, pooled, into = pool_grid(tokens.features[group, patches], (grid.rows, grid.cols), k - prefix)
            keep[group, :prefix] = True
            keep[group, patches] = kept
            features[group, patches] = pooled
            sources[group, :prefix] = torch.arange(prefix, device=sources.device)
            sources[group, patches] = torch.where(into >= 0, into + grid.prefix, -1)
        return Selection(keep, features, sources)
