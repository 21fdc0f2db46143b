# SPDX-License-Identifier: Apache-2.0
"""Noise, blur and low contrast in three severities: the kinds of ImageNet-C (arXiv 1903.12261), not its numbers.

Everything is integer arithmetic on frozen random streams, so an image is the same on every machine.
"""

from collections.abc import Callable

import numpy as np


def corrupt(pixels: np.ndarray, corruption: str, severity: int, rng: np.random.RandomState) -> np.ndarray:
    """A corrupted copy of an image, uint8 (height, width, 3).

    corruption: a key of `CORRUPTIONS`. severity: 1 to 3. rng: read by "noise" only. ValueError for anything else.
    """
    if corruption not in CORRUPTIONS or severity not in (1, 2, 3):
        raise ValueError(
            f"corruption {corruption!r} of severity {severity!r}: expected one of {', '.join(CORRUPTIONS)}, 1 to 3"
        )
    change, strengths = CORRUPTIONS[corruption]
    return np.clip(change(pixels.astype(np.int64), strengths[severity - 1], rng), 0, 255).astype(np.uint8)


def _noise(pixels: np.ndarray, deviation: int, rng: np.random.RandomState) -> np.ndarray:
    """Adds noise with this standard deviation to each value. It is a sum of twelve bytes, which is nearly Gaussian and,
    unlike the stream of a Gaussian, needs no logarithm."""
    draws = np.frombuffer(rng.bytes(12 * pixels.size), np.uint8).reshape(12, *pixels.shape)
    return pixels + (draws.sum(0, dtype=np.int64) - 1530) * deviation // 256  # mean 1530, standard deviation 256


def _blur(pixels: np.ndarray, deviation: int, rng: np.random.RandomState) -> np.ndarray:
    """Gaussian blur with this standard deviation in pixels: as many binomial filters of variance 1 as add up to it."""
    shifted = pixels << 8  # places behind the point, so that rounding does not add up
    for _ in range(deviation**2):
        for axis in (0, 1):
            edge = [(0, 0)] * 3
            edge[axis] = (2, 2)
            wide = np.moveaxis(np.pad(shifted, edge, mode="edge"), axis, 0)
            one, four, six = wide[:-4] + wide[4:], wide[1:-3] + wide[3:-1], wide[2:-2]
            shifted = np.moveaxis((one + 4 * four + 6 * six + 8) >> 4, 0, axis)
    return (shifted + 128) >> 8


def _contrast(pixels: np.ndarray, percent: int, rng: np.random.RandomState) -> np.ndarray:
    """Leaves this share of each value's distance from the mean of its channel."""
    mean = pixels.sum((0, 1)) // (pixels.shape[0] * pixels.shape[1])
    return mean + (pixels - mean) * percent // 100


CORRUPTIONS: dict[str, tuple[Callable[[np.ndarray, int, np.random.RandomState], np.ndarray], tuple[int, int, int]]] = {
    "noise": (_noise, (24, 48, 72)),
    "blur": (_blur, (2, 3, 4)),
    "contrast": (_contrast, (45, 30, 20)),
}
"""Name -> function and its strength by severity: deviation in grey levels, deviation in pixels, per cent left."""
