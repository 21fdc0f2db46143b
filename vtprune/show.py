# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was kept."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageEnhance

from vtprune.tokens import Grid

_DIM = 0.25
"""Brightness of dropped patches."""


def overlay(image: Image.Image, kept: Iterable[int], grid: Grid) -> Image.Image:
    """The image with the patches of kept visual tokens as they are and those of dropped ones dimmed.

    Args:
        image: what the encoder saw, i.e. after the processor's resizing and cropping.
        kept: indices of the kept tokens within the image's tokens, 0 to `len(grid) - 1`; a LongTensor is fine.
        grid: the layout of the image's tokens; its prefix tokens (CLS) have no place and are not drawn.

    Returns:
        RGB image of the same size.

    Raises:
        ValueError: an index outside the grid.
    """
    image = image.convert("RGB")
    mask = Image.new("L", (grid.cols, grid.rows), 0)
    for index in map(int, kept):
        if not 0 <= index < len(grid):
            raise ValueError(f"token {index} is outside the grid of {len(grid)} tokens")
        if index >= grid.prefix:
            row, col = divmod(index - grid.prefix, grid.cols)
            mask.putpixel((col, row), 255)
    mask = mask.resize(image.size, Image.Resampling.NEAREST)
    return Image.composite(image, ImageEnhance.Brightness(image).enhance(_DIM), mask)
