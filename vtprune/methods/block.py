# SPDX-License-Identifier: Apache-2.0
"""Baseline: keep one rectangle of each image or frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import BeforeLLM
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.random_block import rectangle
from vtprune.ops.seeded_random import seeded_uniform
from vtprune.signals import SampleKeys
from vtprune.tokens import Grid, ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Block(BeforeLLM):
    """Keeps one rectangle of each crop's grid, at a random place (the block masking of CLIPA, arXiv 2305.07017).

    Stage: before the LLM, on whole images only. The rectangle has about the shape of the grid; where no rectangle has
    exactly k patches, its last row is shorter. A CLS token before the grid is kept first, and counts. The place depends
    on the seed, the pixels and the prompt's text, so the frames of a video have different ones. Deviation: CLIPA masks
    at the encoder's input, to train; here the encoder has seen the whole image.

    Fields
        seed: seed of the place, >= 0, default 0.
    """

    name: ClassVar[str] = "block"
    signal: ClassVar[str] = "none"
    paper: ClassVar[str] = "arXiv 2305.07017"
    needs_grid: ClassVar[bool] = True

    seed: Annotated[int, Ge(0)] = 0

    def signals(self, shape: ModelShape):
        return (SampleKeys(),)

    def select(self, tokens: VisualTokens) -> Selection:
        most = max(map(len, tokens.layouts), default=0)
        draws = seeded_uniform(tokens[SampleKeys()], self.seed, 2 * most).view(-1, most, 2).tolist()
        kept, host = [], tokens.host
        for group, length, k in tokens.each():
            grids = tokens.layouts[group] if length else ()
            if None in grids:
                raise UnsupportedStageError(
                    f"{self.name} needs whole images laid out as a grid; put it before other methods"
                )
            counts = share_out(torch.tensor([len(grid) for grid in grids], dtype=torch.long), k).tolist()
            parts = [
                places[_of_grid(grid, count, *draw)]
                for places, grid, count, draw in zip(host.places(group), grids, counts, draws[group], strict=False)
            ]
            kept.append(torch.cat([torch.empty(0, dtype=torch.long), *parts]))
        return Selection.of_indices(tokens, kept)


def _of_grid(grid: Grid, k: int, down: float, right: float) -> Tensor:
    """(k,) long: places of the tokens kept of a crop, those before its grid first."""
    prefix = min(grid.prefix, k)
    patches = rectangle(grid.rows, grid.cols, k - prefix, down, right)
    return torch.cat([torch.arange(prefix), patches + grid.prefix])
