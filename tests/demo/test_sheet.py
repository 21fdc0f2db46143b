# SPDX-License-Identifier: Apache-2.0
"""The sheet: a token is dark, or not, where a click finds it."""

import numpy as np
import pytest
from PIL import Image

from vtprune.demo.sheet import Sheet
from vtprune.eval.pages.views import View


@pytest.fixture
def sheet():
    """Six frames of 2 x 3 tokens in two rows, and a newline."""
    places = [[frame, row, col] for frame in range(6) for row in range(2) for col in range(3)]
    view = View("?", "video", [30] * 6, [[2, 3]] * 6, [*places, None])
    return Sheet(view, [Image.new("RGB", (30, 20), "white")] * 6)


def test_frames_go_on_below(sheet):
    assert sheet.size == (120, 40)
    assert sheet.draw(range(37)).size == (120, 40)


def test_every_token_is_found_where_it_is_dark(sheet):
    for token in range(36):
        pixels = np.asarray(sheet.draw({*range(37)} - {token}).convert("L"))
        ys, xs = np.nonzero(pixels < 200)
        assert {sheet.token_at(x, y) for x, y in zip(xs, ys, strict=True)} == {token}
        assert len(xs) == 100


def test_outside_there_is_no_token(sheet):
    assert [sheet.token_at(*point) for point in [(61, 20), (-1, 3), (3, 40), (120, 3)]] == [None] * 4
