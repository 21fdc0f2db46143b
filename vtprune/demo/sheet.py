# SPDX-License-Identifier: Apache-2.0
"""The picture of what was kept, and which token lies at a point of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

from PIL import Image

from vtprune.eval.pages.kept import draw_dimmed
from vtprune.eval.pages.views import View

_ACROSS = 4
"""Pictures in a row; crops of an image fit, frames of a clip go on below."""


class Sheet:
    """What the encoder saw, in rows of pictures.

    Args:
        view: of the prompt.
        pictures: its pictures, of one height.
    """

    def __init__(self, view: View, pictures: Sequence[Image.Image]):
        self.view, self._pictures = view, pictures
        self._height = pictures[0].height
        self._tokens = {tuple(place): token for token, place in enumerate(view.places) if place is not None}
        numbers = range(len(pictures))
        self._rows = [numbers[start : start + _ACROSS] for start in numbers[::_ACROSS]]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        widths = [sum(self.view.widths[number] for number in row) for row in self._rows]
        return max(widths), self._height * len(self._rows)

    def _corners(self) -> list[tuple[int, int]]:
        """Left and top of each picture."""
        corners = []
        for down, row in enumerate(self._rows):
            lefts = accumulate((self.view.widths[number] for number in row[:-1]), initial=0)
            corners += [(left, down * self._height) for left in lefts]
        return corners

    def draw(self, kept: Iterable[int]) -> Image.Image:
        """The sheet with dropped patches dimmed. kept: visual tokens, counted from 0."""
        strip = draw_dimmed(self.view, self._pictures, kept)
        sheet = Image.new("RGB", self.size, "white")
        ends = list(accumulate(self.view.widths))
        for corner, width, end in zip(self._corners(), self.view.widths, ends, strict=True):
            sheet.paste(strip.crop((end - width, 0, end, self._height)), corner)
        return sheet

    def token_at(self, x: float, y: float) -> int | None:
        """The visual token at a point in pixels; None where there is none."""
        pictures = zip(self._corners(), self.view.widths, self.view.grids, strict=True)
        for number, ((left, top), width, (rows, cols)) in enumerate(pictures):
            if left <= x < left + width and top <= y < top + self._height:
                row, col = int((y - top) / self._height * rows), int((x - left) / width * cols)
                return self._tokens.get((number, row, col))
        return None
