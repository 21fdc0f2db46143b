# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from PIL import Image

from vtprune.show import overlay
from vtprune.tokens import Grid


def test_kept_patches_stay_as_they_are_and_dropped_ones_are_dim():
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    shown = overlay(image, torch.tensor([0, 5]), Grid(rows=3, cols=4))  # patches of 10 x 10 pixels

    assert shown.size == image.size
    for row in range(3):
        for col in range(4):
            box = (10 * col, 10 * row, 10 * col + 10, 10 * row + 10)
            before, after = image.crop(box), shown.crop(box)
            if 4 * row + col in (0, 5):
                assert after.tobytes() == before.tobytes()
            else:
                assert max(after.tobytes()) < 0.3 * max(before.tobytes())


def test_prefix_tokens_have_no_place():
    image = Image.new("RGB", (20, 10), "white")
    shown = overlay(image, [0, 2], Grid(rows=1, cols=2, prefix=1))
    assert shown.getpixel((5, 5))[0] < 128
    assert shown.getpixel((15, 5)) == (255, 255, 255)


def test_token_outside_the_grid():
    with pytest.raises(ValueError, match="token 12 is outside the grid of 12 tokens"):
        overlay(Image.new("RGB", (8, 8)), [12], Grid(rows=3, cols=4))
