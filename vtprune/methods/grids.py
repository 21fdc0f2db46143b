# SPDX-License-Identifier: Apache-2.0
"""What methods that pool grids share: the crops of a group, and a selection made of what was pooled in each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtprune.errors import UnsupportedStageError
from vtprune.tokens import Grid, Selection, VisualTokens

Pooling = Callable[[Tensor, Grid, int], tuple[Tensor, Tensor, Tensor]]
"""Features (rows * columns, dim), their grid and how many to leave -> keep, features and sources, as a `Selection`."""


def pool_crops(name: str, tokens: VisualTokens, counts: Callable[[int, Tensor], Tensor], pooling: Pooling) -> Selection:
    """Pool every crop of every group by itself.

    Tokens before a grid (a CLS token) are kept first, and count.

    Args:
        name: of the method, for the error.
        counts: number of a group, (crops,) long sizes of its crops -> (crops,) long, how many to leave of each.

    Raises:
        UnsupportedStageError: tokens of a crop are missing, or it has no grid.
    """
    keep, features = torch.zeros_like(tokens.valid), tokens.features.clone()
    sources = torch.full_like(tokens.valid, -1, dtype=torch.long)
    for group, length, _ in tokens.each():
        grids = tokens.layouts[group] if length else ()
        if None in grids:
            raise UnsupportedStageError(f"{name} needs whole images laid out as a grid; put it before other methods")
        left = counts(group, torch.tensor([len(grid) for grid in grids], dtype=torch.long)).tolist()
        for crop, (grid, count) in enumerate(zip(grids, left, strict=True)):
            places = (tokens.crops[group, :length] == crop).nonzero()[:, 0]
            prefix, patches = places[: min(grid.prefix, count)], places[grid.prefix :]
            kept, pooled, into = pooling(tokens.features[group, patches], grid, count - len(prefix))
            keep[group, prefix], keep[group, patches] = True, kept
            features[group, patches] = pooled
            sources[group, prefix] = prefix
            sources[group, patches] = torch.where(into >= 0, patches[into], -1)
    return Selection(keep, features, sources)
