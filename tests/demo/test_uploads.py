# SPDX-License-Identifier: Apache-2.0
"""Uploads: images and clips within the limits, messages for all else."""

import dataclasses

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtprune.demo.uploads import LIMITS, open_example, open_upload
from vtprune.errors import ConfigError
from vtprune.eval.digitscenes import example, video_example


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    example(3).image.save(path)
    return path


@pytest.fixture
def clip(tmp_path):
    return video_example(3).video_path(tmp_path)


def test_an_image_is_read(picture):
    shown = open_upload(picture)
    assert shown.kind == "image" and shown.code == "load_picture(Path('scene.png'))"
    assert np.array_equal(np.asarray(shown.content), np.asarray(example(3).image))


def test_a_clip_is_known_by_its_content(clip):
    renamed = clip.rename(clip.with_suffix(".png"))
    shown = open_upload(renamed)
    assert shown.kind == "video" and shown.content == renamed


def test_examples_are_scenes_or_clips():
    assert open_example(3, "image").content == example(3).image
    assert open_example(3, "video").content == video_example(3).video_path()


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [("bytes", 100, "at most 0 MB"), ("pixels", 168 * 168 - 1, "picture is too large")],
)
def test_images_have_limits(picture, limit, value, says):
    with pytest.raises(ConfigError, match=says):
        open_upload(picture, dataclasses.replace(LIMITS, **{limit: value}))
    assert open_upload(picture, dataclasses.replace(LIMITS, pixels=168 * 168))


def test_a_bomb_is_not_opened(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("1", (200, 200)).save(tmp_path / "bomb.png")
    with pytest.raises(ConfigError, match="picture is too large"):
        open_upload(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("limit", "value", "says"),
    [("frames", 10, "at most 10 frames"), ("pixels", 100, "too large"), ("clip_pixels", 10**5, "0.0 billion pixels")],
)
def test_clips_have_limits(clip, limit, value, says):
    with pytest.raises(ConfigError, match=says):
        open_upload(clip, dataclasses.replace(LIMITS, **{limit: value}))


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n%s\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("content", [PLAYLIST, b"ffconcat version 1.0\nfile %s\n"], ids=["m3u8", "ffconcat"])
@pytest.mark.parametrize("ending", ["mp4", "m3u8"])
def test_a_file_cannot_name_others(clip, content, ending):
    named = clip.rename(clip.with_name("other.mp4"))
    playlist = clip.with_suffix(f".{ending}")
    playlist.write_bytes(content % named.name.encode())
    with pytest.raises(ConfigError, match="neither an image nor a clip"):
        open_upload(playlist)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"GIF89a", b"P6\n10"])
def test_what_is_neither_is_refused(tmp_path, content):
    (tmp_path / "file.png").write_bytes(content)
    with pytest.raises(ConfigError, match="neither an image nor a clip|not a readable image"):
        open_upload(tmp_path / "file.png")


@pytest.mark.parametrize("filled", [False, True])
def test_torn_images_are_refused(picture, monkeypatch, filled):
    """Also where another library has told Pillow to fill them up."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", filled)
    picture.write_bytes(picture.read_bytes()[:3000])
    with pytest.raises(ConfigError, match="not a readable image"):
        open_upload(picture)
