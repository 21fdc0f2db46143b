# SPDX-License-Identifier: Apache-2.0
"""DigitScenes images: handwritten digits, tinted, on a noisy blocky background.

Everything is drawn in integer arithmetic from `numpy.random.RandomState`, whose streams are frozen, so a seed gives the
same pixels on every machine.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 168
"""Height and width of a scene in pixels."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (230, 210, 40),
    "purple": (160, 60, 200),
    "orange": (245, 140, 30),
    "cyan": (40, 200, 210),
    "white": (240, 240, 240),
}
"""Name and RGB value of the eight tints."""

SPLITS = {"train": slice(0, 1300), "validation": slice(1300, 1400), "test": slice(1400, None)}
"""Which of scikit-learn's 1,797 digit images (after one fixed shuffle) each split may draw."""

INK = 96
"""Ink from which on a pixel counts as the digit's."""

_MIN_DIGITS, _MAX_DIGITS = 2, 6
_MIN_DIGIT_SIZE, _MAX_DIGIT_SIZE = 28, 36  # pixels
_GAP = 2  # pixels between the boxes of two digits
_BLOCK = 28  # pixels, side of a background block


@dataclass(frozen=True)
class Digit:
    """One digit of a scene: its value, its colour, its square box (left, top, side) in pixels, and which of the split's
    handwritten images of that value it is."""

    value: int
    colour: str
    x: int
    y: int
    size: int
    image: int

    @property
    def centre(self) -> tuple[float, float]:
        """(x, y) of the middle of the box in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    pixels: uint8 (IMAGE_SIZE, IMAGE_SIZE, 3).
    mask: uint8 (IMAGE_SIZE, IMAGE_SIZE), `i + 1` on the ink of `digits[i]`, 0 elsewhere.
    digits: 2 to 6 digits, no value and no colour twice.
    """

    pixels: np.ndarray
    mask: np.ndarray
    digits: tuple[Digit, ...]


@cache
def digit_images(split: str) -> tuple[tuple[np.ndarray, ...], ...]:
    """The handwritten digits of a split: for each value 0..9 its images, uint8 (8, 8). No image is in two splits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.images))[SPLITS[split]]
    grey = (data.images * 255 / 16).astype(np.uint8)
    return tuple(tuple(grey[i] for i in order if data.target[i] == value) for value in range(10))


def draw_scene(rng: np.random.RandomState, split: str) -> Scene:
    """Draws a random scene with digit images of `split` ("train", "validation" or "test")."""
    boxes = _place(rng, rng.randint(_MIN_DIGITS, _MAX_DIGITS + 1))
    values = rng.permutation(10)[: len(boxes)]
    colours = rng.permutation(len(COLOURS))[: len(boxes)]
    pixels = background(rng)
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    digits = []
    for i, (value, colour, (x, y, size)) in enumerate(zip(values, colours, boxes, strict=True)):
        name = list(COLOURS)[colour]
        images = digit_images(split)[value]
        image = rng.randint(len(images))
        ink = digit_ink(images[image], size)
        region = (slice(y, y + size), slice(x, x + size))
        paint(pixels[region], ink, name)
        mask[region][ink >= INK] = i + 1
        digits.append(Digit(int(value), name, int(x), int(y), int(size), int(image)))
    return Scene(pixels, mask, tuple(digits))


def _place(rng: np.random.RandomState, count: int) -> list[tuple[int, int, int]]:
    """`count` boxes (x, y, size) that do not touch."""
    while True:
        boxes: list[tuple[int, int, int]] = []
        for _ in range(60):
            size = rng.randint(_MIN_DIGIT_SIZE, _MAX_DIGIT_SIZE + 1)
            x, y = rng.randint(0, IMAGE_SIZE - size + 1, 2)
            if all(
                x >= bx + bs + _GAP or bx >= x + size + _GAP or y >= by + bs + _GAP or by >= y + size + _GAP
                for bx, by, bs in boxes
            ):
                boxes.append((x, y, size))
                if len(boxes) == count:
                    return boxes


def digit_ink(image: np.ndarray, size: int) -> np.ndarray:
    """A handwritten digit, uint8 (8, 8), enlarged: how much ink is where, 0..255, int32 (size, size)."""
    shape = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
    return np.minimum(np.asarray(shape, np.int32) * 13 // 10, 255)


def paint(region: np.ndarray, ink: np.ndarray, colour: str) -> None:
    """Tints a view of pixels, uint8 (size, size, 3), in place."""
    tint = ink[..., None] * np.array(COLOURS[colour], np.int32)
    region[:] = (region * (255 - ink[..., None]) + tint) // 255  # int32 until it is stored


def background(rng: np.random.RandomState, size: int = IMAGE_SIZE, strokes: tuple[int, int] = (3, 9)) -> np.ndarray:
    """Dark blocks, pixel noise, and thin short strokes that belong to no digit; uint8 (size, size, 3).

    strokes: how many, from the first number to below the second.
    """
    side = size // _BLOCK
    blocks = rng.randint(0, 90, (side, side, 3)).astype(np.uint8).repeat(_BLOCK, 0).repeat(_BLOCK, 1)
    noise = np.frombuffer(rng.bytes(blocks.size), np.uint8).reshape(blocks.shape) & 15
    image = Image.fromarray(blocks + noise)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.randint(*strokes)):
        x, y = rng.randint(0, size, 2).tolist()
        dx, dy = rng.randint(-16, 17, 2).tolist()
        pen.line((x, y, x + dx, y + dy), fill=tuple(rng.randint(60, 256, 3).tolist()), width=int(rng.randint(1, 3)))
    return np.array(image)
