# SPDX-License-Identifier: Apache-2.0
"""Reading order of the tokens of an image that was cut into crops."""

from torch import Tensor


def mosaic_order(crops: Tensor, patches: Tensor, tiles_across: int, side: int) -> Tensor:
    """Order of chosen tokens of a LLaVA-NeXT image: the overview first, then the tiles as one large grid.

    Args:
        crops: ``(tokens,)`` long, the crop of each token: 0 is the overview, tile ``t`` (row-major) is ``t + 1``.
        patches: ``(tokens,)`` long, raster index of each token in its crop of ``side * side`` patches.
        tiles_across: tiles in a row of the grid of tiles.
        side: patches in a row of a crop.

    Returns:
        ``(tokens,)`` long permutation: tokens of the overview in raster order, then the tiles' tokens in raster
        order of the whole mosaic (a row of patches runs through all tiles of a row before the next one starts).
    """
    tile = (crops - 1).clamp_min(0)
    row = tile // tiles_across * side + patches // side
    column = tile % tiles_across * side + patches % side
    # One key a token; every key of a tile's token lies above those of the overview.
    mosaic_key = row * (tiles_across * side) + column
    return (mosaic_key + (crops > 0) * side * side * tiles_across).argsort(stable=True)
