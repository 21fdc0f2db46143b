# SPDX-License-Identifier: Apache-2.0
"""Images cut into tiles: the patch of each token, found by changing pixels, and what follows from it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.tokens import Grid, Medium

from .checks import blinkered, origins

TILE, PATCH, SIDE = 24, 8, 3
"""Sides of a crop and of a patch in pixels, and of a crop in patches."""

# height and width of the image, the resolution it is padded to, and tiles of which something is left
IMAGES = [
    ((24, 32), (24, 48), [1, 2]),
    ((32, 24), (48, 24), [1, 2]),
    ((46, 30), (48, 48), [1, 2, 3, 4]),
    ((48, 48), (48, 48), [1, 2, 3, 4]),
    ((8, 48), (72, 72), [4, 5, 6]),  # a strip through the middle row of tiles
    ((48, 8), (72, 72), [2, 5, 8]),
    ((20, 20), (24, 24), [1]),
    ((1, 1000), (48, 48), []),  # a strip of less than a row of patches, which the model cuts off completely
]
every_image = pytest.mark.parametrize(("size", "resolution", "visible"), IMAGES)


def encoded(name: str, size: tuple[int, int], resolution: tuple[int, int]):
    """A blinkered model that pads images to `resolution`, its adapter, and the arguments for one image."""
    model = blinkered(name)
    model.config.image_grid_pinpoints = [list(resolution)]
    crops = resolution[0] * resolution[1] // TILE**2 + 1
    pixels = torch.randn(1, crops, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))
    return model, vtprune.adapter_for(model), {"pixel_values": pixels, "image_sizes": torch.tensor([size])}


@torch.no_grad()
def features(model, inputs: dict[str, Tensor]) -> list[Tensor]:
    """(tokens, dim) an image."""
    return model.model.get_image_features(**inputs, return_dict=True).pooler_output


def traced(model, inputs: dict[str, Tensor]) -> Tensor:
    """(tokens, crops, patches) bool: what each token of the only image depends on."""

    def encode(pixels):
        return features(model, inputs | {"pixel_values": pixels[None]})[0]

    return origins(encode, inputs["pixel_values"][0], PATCH)


def places(depends: Tensor) -> list[tuple[int, int] | None]:
    """(crop, patch) that each token stands for, None for newlines. depends: what `traced` returned."""
    found = [token.nonzero().tolist() for token in depends]
    assert all(len(patches) <= 1 for patches in found)
    return [tuple(patches[0]) if patches else None for patches in found]


def check_mosaic(medium: Medium, stands_for: list, visible: list[int], tiles_across: int) -> None:
    """A medium against the crop and patch that each token of an image stands for."""
    assert stands_for[: SIDE**2] == [(0, patch) for patch in range(SIDE**2)]
    numbers = {None: -1} | {crop: number for number, crop in enumerate([0, *visible])}
    assert medium.crops.tolist() == [numbers[place and place[0]] for place in stands_for]
    assert len(medium.grids) == len(visible) + 1
    newline = 0
    for token, place in enumerate(stands_for):
        crop, patch = place or (None, None)
        if crop == 0:
            assert medium.lines[token] == -1
        else:
            assert medium.lines[token] == newline
        newline += place is None
    rows = {(crop - 1) // tiles_across * SIDE + patch // SIDE for crop, patch in filter(None, stands_for) if crop}
    assert newline == len(rows)
    for number, crop in enumerate([0, *visible]):
        patches = [place[1] for place in stands_for if place and place[0] == crop]
        assert patches == sorted(patches)
        rows, columns = (sorted({of(patch, SIDE) for patch in patches}) for of in (int.__floordiv__, int.__mod__))
        assert patches == [row * SIDE + column for row in rows for column in columns]
        assert medium.grids[number] == Grid(len(rows), len(columns))
