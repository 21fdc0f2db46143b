# SPDX-License-Identifier: Apache-2.0
"""Frames of video files, decoded with PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata

from vtprune.errors import ConfigError


@contextmanager
def decoding_with_pyav(processor: Any) -> Iterator[None]:
    """While open, the processor reads video files with PyAV.

    Processors know torchcodec only, which needs FFmpeg's libraries on the system; PyAV brings these libraries. With one
    decoder everywhere, a file also has the same pixels everywhere.
    """
    video_processor = getattr(processor, "video_processor", None)
    if video_processor is None:
        yield
        return

    def fetch(videos: Sequence[str], sample_indices_fn: Callable[..., Any] | None = None) -> list[tuple]:
        return list(zip(*(read_frames(video, sample_indices_fn) for video in videos), strict=True))

    video_processor.fetch_videos = fetch
    try:
        yield
    finally:
        del video_processor.fetch_videos


def read_frames(path: str | Path, sample: Callable[..., Any] | None) -> tuple[np.ndarray, VideoMetadata]:
    """Frames of a video file that `sample` chooses (default all), uint8 RGB (frames, height, width, 3).

    The result is that of transformers' reader, with three exceptions. Frames are counted if the container does not say
    how many there are (Matroska, WebM). A clip with fewer frames than asked for repeats frames, so that the clips of a
    batch can be stacked. If the end of a file is damaged, its last readable frame stands for the missing ones.
    """
    import av

    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            rate = float(stream.average_rate or 0)
            shape = {"height": stream.height, "width": stream.width}
            metadata = VideoMetadata(
                total, fps=rate, duration=total / rate if rate else 0, video_backend="pyav", **shape
            )
            asked = getattr(sample, "keywords", {}).get("num_frames") or 0  # transformers makes `sample` a partial
            if sample is None:
                indices = list(range(total))
            elif asked > total:
                indices = [index * total // asked for index in range(asked)]
            else:
                indices = [int(index) for index in sample(metadata=metadata)]
            wanted, read = set(indices), {}
            container.seek(0)
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    read[index] = frame.to_ndarray(format="rgb24")
                if len(read) == len(wanted):
                    break
    except (OSError, IndexError, av.FFmpegError) as error:
        raise ConfigError(f"{path}: cannot be read as a video: {error}") from error
    if not read:
        raise ConfigError(f"{path}: no frame of this video can be decoded")
    metadata.frames_indices = np.asarray(indices)
    last = read[max(read)]
    return np.stack([read.get(index, last) for index in indices]), metadata
