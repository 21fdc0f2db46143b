# SPDX-License-Identifier: Apache-2.0
"""Average pooling of a grid of tokens (Pool, Adaptive pooling, Progressive pooling)."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vtprune.devices import send
from vtprune.errors import BudgetError
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.merging import Merged


def pool_grid(features: Tensor, grid: tuple[int, int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Divide a grid of tokens into exactly ``k`` rectangular cells and average each.

    The rows are cut into horizontal bands. Their number is chosen so that cells are almost square. The ``k`` cells are
    spread over the bands as evenly as possible, and each band cuts the columns into its number of cells. If ``k`` is a
    product of two suitable numbers (64 = 8 x 8 for 24 x 24), this is regular pooling. Otherwise bands differ by one
    cell, and cells by one row or column.

    Args:
        features: ``(tokens, dim)`` in raster order, ``tokens = rows * columns``.
        grid: ``(rows, columns)``.
        k: number of cells, in [0, tokens].

    Returns:
        keep: ``(tokens,)`` bool, the representative of each cell: the token nearest to its centre; of equally near
            tokens the upper left one.
        pooled: ``(tokens, dim)``, the features; that of each representative is replaced by the mean of its cell.
        sources: ``(tokens,)`` long, for each token the representative of its cell; -1 with ``k = 0``.

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
    sizes = send(cells.bincount(minlength=k), features.device)
    cells, centres = send(cells, features.device), send(centres, features.device)
    means = torch.zeros(k, features.shape[1], device=features.device).index_add_(0, cells, features.float())
    means /= sizes.unsqueeze(1)
    keep.index_fill_(0, centres, True)
    pooled = features.index_copy(0, centres, means.to(features.dtype))
    return keep, pooled, centres[cells]


def adaptive_pool(features: Tensor, grid: tuple[int, int], cells: tuple[int, int]) -> Merged:
    """Pool grids of tokens to smaller ones by adaptive averaging.

    This is the part of TokenFLEX (arXiv 2504.03154) that needs no training. TokenFLEX pools to 8, 12 or 16 rows and
    columns. If a side cannot be divided evenly, the averaged windows overlap by a row or column, as in the adaptive
    pooling of ``torch``. The source of a token is then the one cell that it lies in by proportion.

    Args:
        features: ``(images, rows * columns, dim)`` in raster order.
        grid: ``(rows, columns)``.
        cells: number of rows and columns to pool to, at least 1; a side never grows.

    Returns:
        One group an image. A cell takes the place of the token nearest to its centre; of several, the upper left one.
    """
    rows, columns = grid
    images, tokens, dim = features.shape
    if rows * columns != tokens:
        raise ValueError(f"a grid of {rows} x {columns} does not hold {tokens} tokens")
    cells = min(cells[0], rows), min(cells[1], columns)
    pooled = adaptive_avg_pool2d(features.float().mT.unflatten(2, grid), cells).flatten(2).mT
    row_cells, row_centres = _proportional(rows, cells[0], features.device)
    column_cells, column_centres = _proportional(columns, cells[1], features.device)
    places = (row_centres[:, None] * columns + column_centres).flatten()
    sources = places[(row_cells[:, None] * cells[1] + column_cells).flatten()]
    return Merged(pooled.to(features.dtype), places.expand(images, -1), sources.expand(images, -1))


def progressive_counts(frames: int, tokens: int, k: int, *, group: int, ratio: float) -> Tensor:
    """Divide a budget among frames; the first frame of every ``group`` gets more. :func:`pool_grid` meets the counts.

    Inspired by the progressive pooling of Visual Context Window Extension (arXiv 2409.20018). Its authors do not
    publish the grids and group sizes that they used.

    Args:
        frames: number of frames of the video.
        tokens: number of tokens of a frame, which is the most that it can keep.
        k: number of tokens to keep of the whole video.
        group: number of consecutive frames in a group.
        ratio: the first frame of a group gets ``ratio`` times as many tokens as each of the others.

    Returns:
        ``(frames,)`` long; the sum is ``min(k, frames * tokens)``.
    """
    leads = torch.arange(frames) % group == 0
    return apportion(k, torch.where(leads, float(ratio), 1.0), torch.full((frames,), tokens))


def _proportional(length: int, parts: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """``(length,)`` long, the part that each of ``length`` places is in; ``(parts,)`` long, the middle of each part."""
    cells = torch.arange(length, device=device) * parts // length
    begins = -(torch.arange(parts + 1, device=device) * -length // parts)  # rounded up
    return cells, (begins[:-1] + begins[1:] - 1) // 2


def _cells(rows: int, columns: int, k: int) -> tuple[Tensor, Tensor]:
    """``(rows * columns,)`` the cell of every token; ``(k,)`` the token nearest to the centre of every cell."""
    bands = round((k * rows / columns) ** 0.5)
    # A band has at most as many cells as there are columns, and at least one row and one cell.
    bands = min(max(bands, -(-k // columns)), rows, k)
    cells, centres = torch.empty(rows, columns, dtype=torch.long), []
    for (top, bottom), (first, last) in zip(_cuts(rows, bands), _cuts(k, bands), strict=True):
        for cell, (left, right) in zip(range(first, last), _cuts(columns, last - first), strict=True):
            cells[top:bottom, left:right] = cell
            centres.append((top + bottom - 1) // 2 * columns + (left + right - 1) // 2)
    return cells.flatten(), torch.tensor(centres)


def _cuts(length: int, parts: int) -> list[tuple[int, int]]:
    """Begin and end of ``parts`` intervals that divide ``length``; their sizes differ by at most one."""
    return list(pairwise(part * length // parts for part in range(parts + 1)))
