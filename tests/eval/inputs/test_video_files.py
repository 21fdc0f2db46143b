# SPDX-License-Identifier: Apache-2.0
"""Video files that transformers' own reader gets wrong: no number of frames stated, too few of them, broken ones."""

import functools

import av
import numpy as np
import pytest
import tiny_video
from transformers.video_utils import load_video

from vtprune.errors import ConfigError
from vtprune.eval.inputs import chat_inputs, load_model, read_frames

FRAMES = 12


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(str(tiny_video.save_model(tmp_path_factory.mktemp("model"))))


def write(path, frames: int):
    """Grey frames, each a little lighter; the format is that of the file's name."""
    with av.open(path, "w") as container:
        stream = container.add_stream("libvpx-vp9" if path.suffix == ".webm" else "libx264", rate=10)
        stream.height = stream.width = 64
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            pixels = np.full((64, 64, 3), 20 + 8 * index, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def shown(frames: np.ndarray) -> list[int]:
    """Which frames these are."""
    return ((frames[:, 32, 32, 0].astype(float) - 20) / 8).round().astype(int).tolist()


def every(step):
    return lambda metadata: np.arange(0, metadata.total_num_frames, step).astype(int)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_frames_are_counted_where_a_container_does_not_say(tmp_path, suffix):
    path = write(tmp_path / f"clip{suffix}", FRAMES)
    frames, metadata = read_frames(path, None)
    assert shown(frames) == list(range(FRAMES))
    assert metadata.total_num_frames == FRAMES and metadata.duration == pytest.approx(1.2)
    assert metadata.frames_indices.tolist() == list(range(FRAMES))
    assert shown(read_frames(path, every(3))[0]) == [0, 3, 6, 9]


def test_equal_to_transformers_where_that_works(tmp_path):
    path = write(tmp_path / "clip.mp4", FRAMES)
    frames, metadata = read_frames(path, every(2))
    expected, theirs = load_video(str(path), backend="pyav", sample_indices_fn=lambda metadata: every(2)(metadata))
    assert np.array_equal(frames, expected)
    assert metadata.frames_indices.tolist() == list(theirs.frames_indices)
    assert {**metadata, "frames_indices": None} == {**theirs, "frames_indices": None}


def test_a_clip_shorter_than_asked_gives_frames_twice(tmp_path, loaded):
    short, long = write(tmp_path / "short.mp4", 3), write(tmp_path / "long.mp4", FRAMES)
    sample = functools.partial(loaded[1].video_processor.sample_frames, num_frames=5)
    assert shown(read_frames(short, sample)[0]) == [0, 0, 1, 1, 2]
    batch = chat_inputs(loaded[1], [short, long], ["word1", "word2"], "video")
    assert batch["pixel_values_videos"].shape[:2] == (2, tiny_video.FRAMES)


def test_a_lost_end_is_the_last_frame_there_is(tmp_path):
    path = write(tmp_path / "clip.mp4", FRAMES)
    frames, _ = read_frames(path, lambda metadata: [0, FRAMES - 1, FRAMES + 5])
    assert shown(frames) == [0, FRAMES - 1, FRAMES - 1]


def test_what_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("nothing")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(ConfigError, match=name):
            read_frames(tmp_path / name, None)
