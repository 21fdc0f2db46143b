# SPDX-License-Identifier: Apache-2.0
"""Files of pictures: reading them, and whether one can be written."""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps

from vtprune.errors import ConfigError

UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no pictures, are torn, or are far too large."""


class _FillingUp:
    """Whether Pillow fills up files whose end is missing: not while somebody reads, whatever was set before."""

    def __init__(self) -> None:
        self._lock, self._readers, self._before = threading.Lock(), 0, False

    def begin(self) -> None:
        with self._lock:
            if not self._readers:
                self._before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
            self._readers += 1

    def end(self) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                ImageFile.LOAD_TRUNCATED_IMAGES = self._before


_FILLING_UP = _FillingUp()


@contextmanager
def torn_files_refused() -> Iterator[None]:
    """Other libraries (lmms-eval) tell Pillow to fill up files whose end is missing. Threads may read side by side."""
    _FILLING_UP.begin()
    try:
        yield
    finally:
        _FILLING_UP.end()


@torn_files_refused()
def load_picture(path: Path) -> Image.Image:
    """Read an RGB image from a file. It is turned upright by its EXIF orientation, and 16 bits a channel become 8.

    Raises ConfigError if the file cannot be read, or if how bright its values are is not known: floating-point numbers,
    or more than 16 bits.
    """
    try:
        # Not from the path: Pillow then maps TIFF files into memory, and turns them twice.
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(path.read_bytes())))
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not a readable image") from error
    if picture.mode.startswith("I"):  # a plain conversion would clip values above 255
        values = np.asarray(picture)
        if values.min() < 0 or values.max() > 65535:
            raise ConfigError(f"{path}: more than 16 bits a channel; save the picture with 8 or 16")
        picture = Image.fromarray((values // 257).astype(np.uint8))
    if picture.mode == "F":
        raise ConfigError(f"{path}: floating-point numbers; save the picture with 8 or 16 bits a channel")
    try:
        return picture.convert("RGB")
    except ValueError as error:
        raise ConfigError(f"{path}: pictures of the mode {picture.mode} are not known") from error


def check_target(path: Path) -> None:
    """Raise ConfigError unless a picture can be written to a path."""
    if path.suffix.lower() not in Image.registered_extensions():
        raise ConfigError(f"{path}: the ending names no picture format; use .png, for example")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: the folder does not exist")
