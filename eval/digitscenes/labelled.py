# SPDX-License-Identifier: Apache-2.0
"""DigitScenes images with one digit, for zero-shot classification: what digit, and what colour."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .corruptions import corrupt
from .scenes import COLOURS, IMAGE_SIZE, SPLITS, background, digit_images, digit_ink, paint

CLASSES = {"digit": tuple(map(str, range(10))), "colour": tuple(COLOURS)}
"""Names of the classes of both tasks."""

TEMPLATES = {
    "digit": ("the digit {}", "a photo of the digit {}", "an image of a {}"),
    "colour": ("a {} digit", "a photo of a {} digit", "an image of a {} digit"),
}
"""Prompts of both tasks, with {} for the class."""

LABELLED_SIZE = 1000
"""Images in a set by default."""

SMALLEST, LARGEST = 30, 44
"""Side of the digit's box in pixels."""


@dataclass(frozen=True)
class LabelledImage:
    """An image with one digit.

    image: RGB, 168 x 168. digit, colour: the right classes, names in `CLASSES`. index: its place in the set; every
    image has a scene of its own, so scores are independent.
    """

    image: Image.Image
    digit: str
    colour: str
    index: int


def draw_labelled(
    rng: np.random.RandomState,
    split: str,
    bend: Callable[[np.random.RandomState, np.ndarray], np.ndarray] | None = None,
) -> tuple[np.ndarray, int, str, np.ndarray]:
    """Pixels, uint8 (168, 168, 3), value and colour of one digit of `split`, and its box: x, y, side in pixels.

    bend: changes the ink of the digit, int32 (side, side), 0..255.
    """
    value, colour = int(rng.randint(10)), list(COLOURS)[rng.randint(len(COLOURS))]
    size = rng.randint(SMALLEST, LARGEST + 1)
    x, y = rng.randint(0, IMAGE_SIZE - size + 1, 2)
    images = digit_images(split)[value]
    ink = digit_ink(images[rng.randint(len(images))], size)
    pixels = background(rng)
    paint(pixels[y : y + size, x : x + size], bend(rng, ink) if bend else ink, colour)
    return pixels, value, colour, np.array([x, y, size])


def labelled_images(
    split: str = "test", limit: int = LABELLED_SIZE, seed: int = 0, corruption: str | None = None, severity: int = 1
) -> list[LabelledImage]:
    """The first `limit` images of the set that `split` and `seed` name; the same on every machine.

    split: "train", "validation" or "test"; no handwritten digit image is in two of them. A larger `limit` extends the
    set without changing its beginning. corruption, severity: as in `corruptions.corrupt`; the scenes stay the same.
    """
    examples = []
    for index in range(limit):
        pixels, value, colour, _ = draw_labelled(_numbers(seed, split, index, 1), split)
        if corruption is not None:
            pixels = corrupt(pixels, corruption, severity, _numbers(seed, split, index, 2))
        examples.append(LabelledImage(Image.fromarray(pixels), str(value), colour, index))
    return examples


def _numbers(seed: int, split: str, index: int, use: int) -> np.random.RandomState:
    """Numbers of an image's own. Four words, where the scenes with questions have three: other images."""
    return np.random.RandomState([seed, list(SPLITS).index(split), index, use])
