# SPDX-License-Identifier: Apache-2.0
"""Average pooling of a grid of tokens to a given number of tokens."""

from itertools import pairwise

import torch
from torch import Tensor

from vtprune.errors import BudgetError


def pool_grid(features: Tensor, grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a grid of tokens into exactly ``k`` rectangular cells and average each.

    The rows are cut into horizontal bands, as many as give cells of the grid's own aspect ratio, and the ``k`` cells
    are dealt out to the bands as evenly as they go; each band cuts the columns into its number of cells. Where ``k``
    is the product of two suitable numbers (64 = 8 x 8 for 24 x 24) this is an ordinary regular pooling; otherwise
    bands differ by one cell, and cells by one row or column.

    Args:
        features: ``(tokens, dim)`` in raster order, ``tokens = rows * columns``.
        grid: ``(rows, columns)``.
        k: cells, in [0, tokens].

    Returns:
        keep: ``(tokens,)`` bool, the representative of each cell: the token nearest its centre (of equally near
            ones the upper left).
        pooled: ``(tokens, dim)``, the features with each representative's replaced by the mean of its cell.
        sources: ``(tokens,)`` long, for each token its cell's representative; -1 with ``k = 0``.

    Raises:
        BudgetError: ``k`` is out of range.
    """
    rows, columns = grid
    if rows * columns != len(features):
        raise ValueError(f"a grid of {rows} x {columns} does not hold {len(features)} tokens")
    if not 0 <= k <= len(features):
        raise BudgetError(f"cannot pool {len(features)} tokens to {k}")
    keep = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    sources = torch.full((len(features),), -1, device=features.device)
    if k == 0:
        return keep, features, sources
    cells, centres = _cells(rows, columns, k)
    cells, centres = cells.to(features.device), centres.to(features.device)
    means = torch.zeros(k, features.shape[1], device=features.device).index_add_(0, cells, features.float())
    means /= cells.bincount(minlength=k).unsqueeze(1)
    keep[centres] = True
    pooled = features.index_copy(0, centres, means.to(features.dtype))
    return keep, pooled, centres[cells]


def _cells(rows: int, columns: int, k: int) -> tuple[Tensor, Tensor]:
    """Cell of every token, ``(rows * columns,)``, and the token nearest the centre of every cell, ``(k,)``."""
    bands = round((k * rows / columns) ** 0.5)
    # No band can hold more cells than there are columns, and none may stay without a row or without a cell.
    bands = min(max(bands, -(-k // columns)), rows, k)
    cells, centres = torch.empty(rows, columns, dtype=torch.long), []
    for (top, bottom), (first, last) in zip(_cuts(rows, bands), _cuts(k, bands), strict=True):
        for cell, (left, right) in zip(range(first, last), _cuts(columns, last - first), strict=True):
            cells[top:bottom, left:right] = cell
            centres.append((top + bottom - 1) // 2 * columns + (left + right - 1) // 2)
    return cells.flatten(), torch.tensor(centres)


def _cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Begin and end of ``parts`` stretches that make up ``length`` and differ in size by at most one."""
    return list(pairwise(part * length // parts for part in range(parts + 1)))
