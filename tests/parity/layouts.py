# SPDX-License-Identifier: Apache-2.0
"""How references order their results, which says which token a recorded row belongs to. The library does not use it."""

import math

import torch
from torch import Tensor

NEWLINE = -1


def reading_order(part: Tensor, *, by_part: bool = False) -> Tensor:
    """Flat indices of a video's kept tokens in the order of reading.

    Args:
        part: ``(frames, positions)`` long, below 0 for tokens that are not kept.
        by_part: within a frame sort by ``part`` before position. HoliTom (arXiv 2505.21334) does so where frames have
            no newlines, and a segment's merged tokens lead its first frame; the default is the order of the grid.

    Returns:
        ``(kept,)`` long.
    """
    frames = part.shape[0]
    kept = (part.flatten() >= 0).nonzero()[:, 0]
    if not by_part or not len(kept):
        return kept
    frame = torch.arange(frames, device=part.device)[:, None].expand_as(part).flatten()[kept]
    parts = part.flatten()[kept]
    return kept[(frame * (parts.max() + 1) + parts).argsort(stable=True)]


def with_newlines(order: Tensor, columns: int | None = None) -> Tensor:
    """Insert newlines into flat indices.

    Args:
        order: ``(kept,)`` long; ascending if ``columns`` is given.
        columns: of each frame's grid: a newline follows every row of which a token is left, and no other. None:
            there is one newline, at the end of the video.

    Returns:
        ``(kept + newlines,)`` long, ``NEWLINE`` (-1) where a newline stands: append the newline to the features, and
        this indexes them.
    """
    if columns is None:
        return torch.nn.functional.pad(order, (0, 1), value=NEWLINE)
    rows = order // columns
    # Number of rows that have begun up to each token; the newline of its own row comes later.
    begun = (rows.diff(prepend=rows[:1]) != 0).cumsum(0)
    newlines = int(begun[-1]) + 1 if len(order) else 0
    filled = order.new_full((len(order) + newlines,), NEWLINE)
    filled[torch.arange(len(order), device=order.device) + begun] = order
    return filled


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


def padding_patches(
    width: int, height: int, image_size: int = 336, patch_size: int = 14, overlap: bool = False
) -> list[int]:
    """Patches that lie in the border added to make an image square (LLaVA-1.5's ``image_aspect_ratio="pad"``).

    Args:
        width: of the original image, in pixels.
        height: of the original image, in pixels.
        image_size: side of the padded, resized square, in pixels.
        patch_size: side of a patch, in pixels.
        overlap: also name the patches that are padding only in part.

    Returns:
        Ascending raster indices into the ``(image_size // patch_size) ** 2`` patches; empty for a square image.
    """
    side = image_size // patch_size
    content = round(min(width, height) * (image_size / max(width, height)))
    before = (image_size - content) // 2
    after = image_size - content - before
    to_patches = math.ceil if overlap else math.floor
    first, last = to_patches(before / patch_size), side - to_patches(after / patch_size)
    border = [line for line in range(side) if line < first or line >= last]
    if width > height:
        return [row * side + column for row in border for column in range(side)]
    return [row * side + column for row in range(side) for column in border]
