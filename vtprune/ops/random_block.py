# SPDX-License-Identifier: Apache-2.0
"""One rectangle of a grid of patches (the baseline block)."""

from math import ceil, floor, sqrt

import torch
from torch import Tensor


def rectangle(rows: int, cols: int, k: int, down: float, right: float) -> Tensor:
    """The patches of a rectangle that has about the shape of the grid (block masking, arXiv 2305.07017).

    Args:
        rows: rows of the grid.
        cols: columns of the grid.
        k: how many patches, in 0..rows * cols. If no such rectangle has k patches, its last row lacks the rest.
        down: how far down the rectangle stands, in [0, 1): 0 at the top.
        right: how far to the right, in [0, 1).

    Returns:
        ``(k,)`` long, ascending places in raster order.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.long)
    width = min(max(ceil(sqrt(k * cols / rows)), ceil(k / rows)), cols)
    height = ceil(k / width)
    top, left = floor(down * (rows - height + 1)), floor(right * (cols - width + 1))
    lines = torch.arange(top, top + height)[:, None] * cols
    return (lines + torch.arange(left, left + width)).flatten()[:k]
