# SPDX-License-Identifier: Apache-2.0
"""Files of pictures: reading them, and whether one can be written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vtprune.errors import ConfigError


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
