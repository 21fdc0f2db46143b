# SPDX-License-Identifier: Apache-2.0
"""Pooling of grids, for the methods that pool: the crops of a group are pooled, and give one selection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.ops.pooling import pool_grid
from vtprune.tokens import Grid, Merging, Selection, VisualTokens

Pooling = Callable[[Tensor, Grid, int], tuple[Tensor, Tensor, Tensor]]
"""Features (rows * columns, dim), their grid, number of tokens to leave -> keep, features, sources of a `Selection`."""


def pool_crops(
    name: str, tokens: VisualTokens, counts: Callable[[int, Tensor], Tensor], pooling: Pooling, frames: int = 1
) -> Selection:
    """Pool every crop of every group separately, or the mean of consecutive frames of a video.

    Tokens before a grid (a CLS token) are kept first, and count. A mean over frames takes the place of the middle
    frame.

    Args:
        name: name of the method, for the error.
        tokens: the groups.
        counts: a function of the group's number and the (parts,) long sizes of what is pooled. It gives (parts,) long,
            how many tokens to leave of each part.
        pooling: the pooling of one grid.
        frames: number of consecutive frames of a video that are averaged, position by position, and pooled as one grid.

    Raises:
        UnsupportedStageError: tokens of a crop are missing, or it has no grid.
    """
    merging, host = Merging(tokens), tokens.host
    for group, length, _ in tokens.each():
        grids = tokens.layouts[group] if length else ()
        if None in grids:
            raise UnsupportedStageError(f"{name} needs whole images laid out as a grid; put it before other methods")
        crops = host.places(group) if length else []
        step = frames if tokens.kinds[group] == "video" else 1
        starts = range(0, len(crops), step)
        budgets = counts(group, torch.tensor([len(crops[start]) for start in starts], dtype=torch.long)).tolist()
        for start, count in zip(starts, budgets, strict=True):
            places, grid = send(torch.stack(crops[start : start + step]), tokens.features.device), grids[start]
            means = tokens.features[group, places].float().mean(0).to(tokens.features.dtype)
            kept, pooled, into = _behind_prefix(means, grid, count, pooling)
            middle = places[(len(places) - 1) // 2]
            merging.put(group, middle, kept, pooled, into)
            merging.send(group, places, torch.where(into >= 0, middle[into], -1).expand_as(places))
    return merging.selection


def _behind_prefix(features: Tensor, grid: Grid, k: int, pooling: Pooling) -> tuple[Tensor, Tensor, Tensor]:
    """Pool a grid that has tokens without a position before it: features (tokens, dim) -> keep, features, sources."""
    prefix = min(grid.prefix, k)
    kept, pooled, into = pooling(features[grid.prefix :], grid, k - prefix)
    first = torch.arange(grid.prefix, device=into.device)
    return (
        torch.cat([first < prefix, kept]),
        torch.cat([features[: grid.prefix], pooled]),
        torch.cat([torch.where(first < prefix, first, -1), torch.where(into >= 0, into + grid.prefix, -1)]),
    )


def even_cells(features: Tensor, grid: Grid, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `Pooling` into exactly `k` rectangles by `pool_grid`."""
    return pool_grid(features, (grid.rows, grid.cols), k)
