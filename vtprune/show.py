# SPDX-License-Identifier: Apache-2.0
"""Pictures: reading files, and drawing which visual tokens were kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from vtprune.errors import ConfigError
from vtprune.tokens import Grid

_DIM = 0.25
"""Brightness of dropped patches."""


def load_picture(path: Path) -> Image.Image:
    """Read an RGB image from a file. It is turned upright by its EXIF orientation, and 16 bits a channel become 8.

    Raises ConfigError if the file cannot be read.
    """
    try:
        picture = ImageOps.exif_transpose(Image.open(path))
    except (OSError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path}: not a readable image") from error
    if picture.mode.startswith("I"):  # a plain conversion would clip values above 255
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 257).astype(np.uint8))
    return picture.convert("RGB")


def check_target(path: Path) -> None:
    """Raise ConfigError unless a picture can be written to a path."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{path}: the ending names no picture format; use .png, for example")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder does not exist")


def overlay(image: Image.Image, kept: Iterable[int], grid: Grid) -> Image.Image:
    """Draw the image with the patches of dropped visual tokens dimmed.

    Args:
        image: the image as the encoder sees it, after the processor's resizing and cropping.
        kept: indices of the kept tokens within the image's tokens, 0 to `len(grid) - 1`; a LongTensor is fine.
        grid: the layout of the image's tokens. Its prefix tokens (CLS) have no position and are not drawn.

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
