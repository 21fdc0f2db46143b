# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which tokens stand in the rectangle."""

import pytest
import torch

import vtprune
from vtprune.signals import SampleKeys
from vtprune.tokens import Grid, VisualTokens


def kept(*grids: Grid | None, k: int, seed: int = 0, key: int = 5) -> list[int]:
    crops = torch.cat([torch.full((len(grid) if grid else 9,), index) for index, grid in enumerate(grids)])[None]
    tokens = VisualTokens(
        features=torch.zeros(1, crops.shape[1], 2),
        valid=torch.ones_like(crops, dtype=torch.bool),
        budget=torch.tensor([k]),
        signals={SampleKeys(): [key]},
        crops=crops,
        layouts=(grids,),
        kinds=("image",),
    )
    return vtprune.Block(keep_tokens=k, seed=seed).select(tokens).keep[0].nonzero()[:, 0].tolist()


def box(places: list[int], cols: int) -> tuple[int, int]:
    """Height and width of the smallest rectangle around places."""
    rows, columns = [p // cols for p in places], [p % cols for p in places]
    return max(rows) - min(rows) + 1, max(columns) - min(columns) + 1


def test_nine_of_a_square_are_three_by_three():
    chosen = kept(Grid(7, 7), k=9)
    assert len(chosen) == 9 and box(chosen, 7) == (3, 3)


def test_seed_and_pixels_move_it():
    places = {tuple(kept(Grid(7, 7), k=9, seed=seed, key=key)) for seed in range(4) for key in range(4)}
    assert len(places) > 5
    assert kept(Grid(7, 7), k=9, seed=3) == kept(Grid(7, 7), k=9, seed=3)


def test_a_cls_token_is_kept_first():
    assert kept(Grid(3, 3, prefix=1), k=1) == [0]
    chosen = kept(Grid(3, 3, prefix=1), k=5)
    assert chosen[0] == 0 and box([place - 1 for place in chosen[1:]], 3) == (2, 2)


def test_the_crops_of_an_image_share_the_budget():
    chosen = kept(Grid(4, 4), Grid(4, 4), k=8)
    first, second = [p for p in chosen if p < 16], [p - 16 for p in chosen if p >= 16]
    assert len(first) == len(second) == 4 and box(first, 4) == box(second, 4) == (2, 2)


def test_without_a_grid_it_is_refused():
    with pytest.raises(vtprune.UnsupportedStageError, match="block needs whole images laid out as a grid"):
        kept(None, k=3)
