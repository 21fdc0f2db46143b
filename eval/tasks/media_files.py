# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos of own data: whether they can be read, and what is in them."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from PIL import Image

from vtprune.errors import ConfigError
from vtprune.eval.tasks.base import Kind, file_digest
from vtprune.show import UNREADABLE, torn_files_refused

_SMALL = (64, 64)
"""JPEG files are decoded at about this size to check them, which takes a part of the time."""


def look_at(paths: Iterable[Path], kind: Kind) -> None:
    """Reads files side by side, so that `problem_of` and `digest_of` know them."""
    with torn_files_refused(), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda path: _looked(path, kind), dict.fromkeys(paths)))


def problem_of(path: Path, kind: Kind) -> str | None:
    """What is wrong with a file; None if it is a picture or a video that can be read."""
    with torn_files_refused():
        return _looked(path, kind)[1]


def digest_of(path: Path, kind: Kind) -> str:
    """Hash of the content of a picture, or of the size and the first MiB of a video.

    Raises ConfigError if the file cannot be read any more.
    """
    with torn_files_refused():
        digest, problem = _looked(path, kind)
    if digest is None:
        raise ConfigError(f"{path}: {problem}")
    return digest


def _looked(path: Path, kind: Kind) -> tuple[str | None, str | None]:
    """(digest, None) or (None, problem)"""
    try:
        state = path.stat()
    except OSError as error:
        return None, "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
    if not path.is_file():
        return None, "not a file"
    return _read(path, kind, state.st_mtime_ns, state.st_size)


@cache
def _read(path: Path, kind: Kind, changed: int, size: int) -> tuple[str | None, str | None]:
    """As `_looked`; a file that changes while the process runs is read again."""
    try:
        return (_read_picture if kind == "image" else _read_video)(path), None
    except (ConfigError, *UNREADABLE):
        return None, f"not a readable {'picture' if kind == 'image' else 'video'}"


def _read_picture(path: Path) -> str:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as picture:
        picture.draft("RGB", _SMALL)
        picture.load()  # shows whether the end of the file is missing
    return hashlib.sha256(content).hexdigest()


def _read_video(path: Path) -> str:
    from vtprune.eval.inputs.videos import read_frames  # which knows tasks, and transformers

    read_frames(path, lambda metadata: [0])
    return file_digest(path)
