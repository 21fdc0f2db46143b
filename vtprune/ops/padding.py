# SPDX-License-Identifier: Apache-2.0
"""Which patches of a square-padded image show padding and nothing else."""

import math


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
