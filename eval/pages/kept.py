# SPDX-License-Identifier: Apache-2.0
"""Which patches of a view were dropped, and the picture of that which `vtprune run --show` writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from PIL import Image, ImageEnhance

from vtprune.eval.pages.views import View, side_by_side

HEIGHTS = (336, 672)
"""Least and largest height in pixels of the pictures that are drawn."""
_DIM = 0.25
"""Brightness of dropped patches."""
_GAP = 8
"""Pixels between the two pictures."""

Box = tuple[float, float, float, float]
"""Left, top, width and height, in pixels of the view's pictures side by side."""


def dropped_boxes(view: View, kept: Iterable[int], height: float) -> Iterator[Box]:
    """The places of the visual tokens that were dropped. Neighbours in a row are one box.

    Args:
        view: of the example.
        kept: its visual tokens that were kept, counted from 0.
        height: of the pictures in pixels.
    """
    alive = set(kept)
    dark = {tuple(place) for token, place in enumerate(view.places) if place is not None and token not in alive}
    lefts = accumulate(view.widths, initial=0)
    for number, (left, width, (rows, cols)) in enumerate(zip(lefts, view.widths, view.grids, strict=False)):
        across, down = width / cols, height / rows
        for row in range(rows):
            for start, end in _runs([(number, row, col) in dark for col in range(cols)]):
                yield left + start * across, row * down, (end - start) * across, down


def draw_kept(view: View, pictures: Sequence[Image.Image], kept: Iterable[int]) -> Image.Image:
    """What the encoder saw, and the same with dropped patches dimmed: beside it, or below it if that is wide."""
    whole, dimmed = side_by_side(pictures), draw_dimmed(view, pictures, kept)
    wide = whole.width > 1.5 * whole.height
    across, down = (0, whole.height + _GAP) if wide else (whole.width + _GAP, 0)
    both = Image.new("RGB", (whole.width + across, whole.height + down), "white")
    both.paste(whole, (0, 0))
    both.paste(dimmed, (across, down))
    return both


def draw_dimmed(view: View, pictures: Sequence[Image.Image], kept: Iterable[int]) -> Image.Image:
    """What the encoder saw, pictures side by side, with dropped patches dimmed."""
    whole = side_by_side(pictures)
    dark, dimmed = ImageEnhance.Brightness(whole).enhance(_DIM), whole.copy()
    for left, top, width, height in dropped_boxes(view, kept, whole.height):
        box = (round(left), round(top), round(left + width), round(top + height))
        dimmed.paste(dark.crop(box), box)
    return dimmed


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of True."""
    start = None
    for index, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = index
        elif not flag and start is not None:
            yield start, index
            start = None
