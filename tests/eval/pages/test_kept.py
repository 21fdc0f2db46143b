# SPDX-License-Identifier: Apache-2.0
"""The picture of what was kept, by the pixels."""

import numpy as np
import pytest
from PIL import Image
from test_views import processor_of
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.eval import inputs
from vtprune.eval.pages.kept import draw_kept, dropped_boxes
from vtprune.eval.pages.views import View
from vtprune.testing import families

GREY = 200


def view(widths, grids, places):
    return View("what?", "image", widths, grids, places)


def grid_places(rows, cols, picture=0):
    return [[picture, row, col] for row in range(rows) for col in range(cols)]


def bright(image, box):
    values = np.asarray(image.crop(box)).astype(int)
    assert values.min() == values.max()  # no patch is half dim
    return values.max() == GREY


def test_dropped_patches_are_dim_beside_the_whole_picture():
    picture = Image.new("RGB", (40, 30), (GREY,) * 3)
    shown = draw_kept(view([40], [[3, 4]], grid_places(3, 4)), [picture], [0, 5])
    assert shown.size == (40 + 8 + 40, 30)
    assert bright(shown, (0, 0, 40, 30))
    kept = [
        4 * row + col
        for row in range(3)
        for col in range(4)
        if bright(shown, (48 + 10 * col, 10 * row, 58 + 10 * col, 10 * row + 10))
    ]
    assert kept == [0, 5]


def test_crops_stand_side_by_side_and_what_is_wide_has_the_other_below():
    pictures = [Image.new("RGB", (20, 20), (GREY,) * 3) for _ in range(2)]
    places = [*grid_places(2, 2), *grid_places(1, 2, picture=1), None]  # a newline token has no place
    shown = draw_kept(view([20, 20], [[2, 2], [1, 2]], places), pictures, [3, 4, 6])
    assert shown.size == (40, 20 + 8 + 20)
    boxes = [(10, 38, 20, 48), (20, 28, 30, 48)]  # the last patch of the first crop, the left half of the second
    for left in range(0, 40, 10):
        for top in (28, 38):
            inside = any(a <= left and top >= b and left < c and top < d for a, b, c, d in boxes)
            assert bright(shown, (left, top, left + 10, top + 10)) == inside


def test_neighbours_that_were_dropped_are_one_box():
    assert list(dropped_boxes(view([40], [[2, 4]], grid_places(2, 4)), [1], 20)) == [
        (0, 0, 10, 10),
        (20, 0, 20, 10),
        (0, 10, 40, 10),
    ]


@pytest.mark.parametrize("kept, dim", [(range(4), 0), ([], 4)])
def test_all_and_nothing(kept, dim):
    picture = Image.new("RGB", (20, 20), (GREY,) * 3)
    shown = draw_kept(view([20], [[2, 2]], grid_places(2, 2)), [picture], kept)
    places = [(28 + x, y, 38 + x, y + 10) for x in (0, 10) for y in (0, 10)]
    assert sum(not bright(shown, box) for box in places) == dim


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_next", "idefics3", "internvl"])
def test_the_command_draws_grids_of_any_size_mosaics_and_tiles(family, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "load_model", lambda *args, **kwargs: (families.shared(family), processor_of(family)))
    Image.fromarray(np.random.RandomState(0).randint(100, 256, (24, 54, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    chosen = ["--model", "any", "--method", "uniform", "--keep-ratio", "0.5", "--prompt", "t", "--max-new-tokens", "1"]
    shown = tmp_path / "kept.png"
    result = CliRunner().invoke(app, ["run", *chosen, "--image", str(tmp_path / "a.png"), "--show", str(shown)])
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(shown).convert("L")).astype(int)
    axis = int((picture[picture.shape[0] // 2] < 250).any())  # below one another, the gap is in the middle row
    middle = picture.shape[axis] // 2
    whole, _, dimmed = np.split(picture, [middle - 4, middle + 4], axis)
    assert len(whole) >= 336
    assert 0.4 < (dimmed < 0.5 * whole).mean() < 0.6
