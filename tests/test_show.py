# SPDX-License-Identifier: Apache-2.0
import io
import random

import numpy as np
import pytest
from PIL import Image, ImageFile

from vtprune.errors import ConfigError
from vtprune.eval.tasks.media_files import problem_of
from vtprune.show import check_target, load_picture, torn_files_refused


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
def test_a_picture_is_read_upright(tmp_path, ending):
    picture = Image.new("RGB", (20, 10), "black")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    picture.save(tmp_path / f"turned.{ending}", exif=exif, lossless=True)
    read = load_picture(tmp_path / f"turned.{ending}")
    assert read.size == (10, 20) and read.getpixel((9, 0)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "CMYK", "RGBA", "I;16"])
def test_pictures_of_any_mode_keep_their_brightness(tmp_path, mode):
    if mode == "I;16":
        values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
        Image.fromarray(values).save(tmp_path / "grey.png")
        expected = (values // 257).astype(int)
    else:
        grey = Image.linear_gradient("L").resize((8, 8))
        suffix = "tif" if mode == "CMYK" else "png"
        grey.convert("RGB").convert(mode).save(tmp_path / f"grey.{suffix}")
        expected = np.asarray(grey.convert("RGB").convert(mode).convert("RGB")).astype(int)[..., 0]
    (file,) = tmp_path.iterdir()
    read = load_picture(file)
    assert read.mode == "RGB"
    assert abs(np.asarray(read).astype(int)[..., 0] - expected).max() <= 1


def test_what_is_no_picture_is_named(tmp_path):
    (tmp_path / "note.png").write_text("no picture")
    for name in ("note.png", "missing.png"):
        with pytest.raises(ConfigError, match=f"{name}: not a readable image"):
            load_picture(tmp_path / name)


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    check_target(tmp_path / "kept.PNG")
    with pytest.raises(ConfigError, match="the ending names no picture format"):
        check_target(tmp_path / "kept")
    with pytest.raises(ConfigError, match="the folder does not exist"):
        check_target(tmp_path / "missing" / "kept.png")


_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F"),
    "JPEG": ("L", "RGB", "CMYK"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "RGB", "RGBA"),
}
_SIZES = ((1, 1), (1, 200), (200, 1), (17, 9), (64, 48))


def _odd_file(draw: random.Random) -> tuple[bytes, str, bool, tuple[int, int]]:
    """Content and format of a file, whether nothing was done to it, and the size of its picture when it is upright."""
    form = draw.choice(list(_MODES))
    mode, size = draw.choice(_MODES[form]), draw.choice(_SIZES)
    grey = Image.frombytes("L", size, draw.randbytes(size[0] * size[1]))
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    exif, options = Image.Exif(), {}
    if form in ("JPEG", "PNG", "WEBP", "TIFF"):
        exif[0x0112] = draw.randint(0, 9)
        options["exif"] = exif
    file = io.BytesIO()
    picture.save(file, form, **options)
    content, damage = bytearray(file.getvalue()), draw.random()
    if damage < 0.3:
        content = content[: draw.randrange(len(content))]
    elif damage < 0.65:
        for _ in range(draw.choice([1, 5, 50])):
            content[draw.randrange(len(content))] = draw.randrange(256)
    elif damage < 0.7:
        content = bytearray(draw.randbytes(100))
    turned = exif.get(0x0112, 1) in (5, 6, 7, 8)
    return bytes(content), form, damage >= 0.7 and mode != "F", size[::-1] if turned else size


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
def test_1000_odd_files_are_read_or_refused(tmp_path):
    draw, read = random.Random(19), 0
    for number in range(1_000):
        content, form, whole, size = _odd_file(draw)
        path = tmp_path / f"{number}.{form.lower()}"
        path.write_bytes(content)
        try:
            picture = load_picture(path)
        except ConfigError as error:
            assert not whole and str(path) in str(error), f"{path}: {error}"
        else:
            read += 1
            assert picture.mode == "RGB" and (picture.size == size or not whole)
            assert problem_of(path, "image") is None
    assert 300 < read < 800


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.full((2, 2), 0.5, np.float32), "floating-point numbers"),
        (np.full((2, 2), 70_000, np.int32), "more than 16 bits"),
        (np.full((2, 2), -1, np.int32), "more than 16 bits"),
    ],
)
def test_values_of_unknown_brightness_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "depth.tiff")
    with pytest.raises(ConfigError, match=words):
        load_picture(tmp_path / "depth.tiff")


def test_threads_that_read_side_by_side_refuse_torn_files(monkeypatch):
    """The first one that is done must not let Pillow fill up what the other one reads."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    first, second = torn_files_refused(), torn_files_refused()
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    second.__exit__(None, None, None)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
