# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from vtprune.errors import ConfigError
from vtprune.show import check_target, load_picture


def test_a_picture_is_read_upright(tmp_path):
    picture = Image.new("RGB", (20, 10), "black")
    picture.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the first row is the right side
    picture.save(tmp_path / "turned.png", exif=exif)
    read = load_picture(tmp_path / "turned.png")
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
