# SPDX-License-Identifier: Apache-2.0
"""Pictures and clips: those that people upload, within limits, and the examples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vtprune.errors import ConfigError
from vtprune.eval.digitscenes import example, video_example
from vtprune.eval.tasks import Kind
from vtprune.show import UNREADABLE, load_picture


@dataclass(frozen=True)
class Limits:
    """The largest upload that is opened."""

    bytes: int = 64 << 20
    pixels: int = 1 << 25
    """of an image, or of one frame"""
    frames: int = 3000
    clip_pixels: int = 1 << 31
    """of all frames of a clip"""


LIMITS = Limits()

_CLIPS = "mov,matroska,avi,mpegts,mpeg,ogg"
"""Containers that hold their frames themselves. Playlists would name other files of this machine, and addresses."""


@dataclass(frozen=True)
class Shown:
    """A picture or a clip that a question is about."""

    kind: Kind
    content: Image.Image | Path
    """An RGB image, or the path of a clip."""
    digest: str
    """of the image or of the file"""
    code: str
    """Python that gives `content`; imports come from `imports`."""
    imports: tuple[str, ...]


def open_example(number: int, kind: Kind) -> Shown:
    """A DigitScenes example: a scene, or a clip."""
    content: Image.Image | Path
    if kind == "video":
        content = video_example(number).video_path()
        code, name = f"video_example({number}).video_path()", "video_example"
    else:
        content = example(number).image
        code, name = f"example({number}).image", "example"
    return Shown(kind, content, f"example {number}", code, (f"from vtprune.eval.digitscenes import {name}",))


def open_upload(path: Path, limits: Limits = LIMITS) -> Shown:
    """What lies in a file that somebody sent.

    Raises ConfigError if it is neither a readable image nor a readable clip, or larger than the limits.
    """
    size = path.stat().st_size
    if size > limits.bytes:
        raise ConfigError(f"the file has {size / 2**20:.1f} MB; at most {limits.bytes / 2**20:.0f} MB are taken")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"Path({path.name!r})"
    try:
        with Image.open(path) as image:
            width, height = image.size
    except UnidentifiedImageError:
        _check_clip(path, limits)
        return Shown("video", path, digest, name, ("from pathlib import Path",))
    except Image.DecompressionBombError:
        width = height = limits.pixels
    except UNREADABLE as error:  # Pillow knows the kind of file, and fails at its head
        raise ConfigError(f"{path}: not a readable image") from error
    _check_size(width, height, limits)
    imports = ("from pathlib import Path", "from vtprune.show import load_picture")
    return Shown("image", load_picture(path), digest, f"load_picture({name})", imports)


def _check_size(width: int, height: int, limits: Limits) -> None:
    if width * height > limits.pixels:
        raise ConfigError(f"the picture is too large; at most {limits.pixels / 1e6:.0f} million pixels are taken")


def _check_clip(path: Path, limits: Limits) -> None:
    import av

    try:
        with av.open(path, options={"format_whitelist": _CLIPS}) as container:
            stream = container.streams.video[0]
            width, height = stream.width, stream.height
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (OSError, ValueError, IndexError, av.FFmpegError) as error:
        raise ConfigError("the file is neither an image nor a clip that can be read") from error
    _check_size(width, height, limits)
    if frames > limits.frames or frames * width * height > limits.clip_pixels:
        raise ConfigError(
            f"the clip has {frames} frames of {width} x {height} pixels; at most {limits.frames} frames and "
            f"{limits.clip_pixels / 1e9:.1f} billion pixels are taken"
        )
