# SPDX-License-Identifier: Apache-2.0
"""Frames as mp4 files, so that the ordinary way of a video into a model is what runs: decode, then sample frames."""

import hashlib
import os
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
from huggingface_hub import cached_assets_path

FRAMES_PER_SECOND = 12

_OPTIONS = {"crf": "4", "preset": "veryfast", "threads": "1"}  # nearly lossless


def write_once(frames: np.ndarray, folder: Path | None = None) -> Path:
    """The file that holds `frames`, uint8 RGB (frames, height, width, 3), named after them; written unless it is there.

    A killed or concurrent run leaves no half of a file: it gets its name when it is complete.
    """
    folder = folder or cached_assets_path(library_name="vtprune", namespace="digitscenes_video")
    path = Path(folder) / f"{hashlib.sha256(repr(_OPTIONS).encode() + frames.tobytes()).hexdigest()[:32]}.mp4"
    if not path.exists():
        with NamedTemporaryFile(dir=folder, suffix=".mp4", delete=False) as part:
            pass
        try:
            _write(frames, part.name)
            os.replace(part.name, path)
        except BaseException:
            os.unlink(part.name)
            raise
    return path


def _write(frames: np.ndarray, path: str) -> None:
    import av

    with av.open(path, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_OPTIONS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"  # no colour is shared between pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
