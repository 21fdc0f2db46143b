# SPDX-License-Identifier: Apache-2.0
"""One grid a medium, whose tokens stand for one or several patches: the layout that an adapter claims against the
patches that tokens are found to depend on when pixels change."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import vtprune
from vtprune.tokens import Medium

from .checks import origins


def claimed(media: list[Medium], side: int, rows: int, columns: int) -> Tensor:
    """(tokens, media, rows * columns) bool: the patches that tokens stand for according to their layouts.

    side: of the square of patches that become one token; rows, columns: patches of the (padded) pixels.
    """
    tokens = []
    for number, medium in enumerate(media):
        (grid,) = medium.grids
        assert medium.crops.tolist() == [0] * len(grid) and grid.prefix == 0 and medium.lines is None
        for row in range(grid.rows):
            for column in range(grid.cols):
                patches = torch.zeros(len(media), rows, columns, dtype=torch.bool)
                patches[number, row * side : (row + 1) * side, column * side : (column + 1) * side] = True
                tokens.append(patches.flatten(1))
    return torch.stack(tokens)


@torch.no_grad()
def check_layout(media: list[Medium], encode: Callable[[Tensor], Tensor], pixels: Tensor, patch: int, side: int):
    """encode: pixels (media, 3, height, width) -> (tokens, dim) of a blinkered model. Returns what tokens depend on."""
    depends = origins(encode, pixels, patch)
    expected = claimed(media, side, pixels.shape[-2] // patch, pixels.shape[-1] // patch)
    assert torch.equal(depends, expected)
    return depends


def means(depends: Tensor, patches: Tensor) -> Tensor:
    """(tokens, dim): mean of the patches (media, patches, dim) that each token depends on."""
    weights = depends.flatten(1).to(patches)
    return weights @ patches.flatten(0, 1) / weights.sum(1, keepdim=True)


@torch.no_grad()
def encoder_and_projector(model, encode: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """The encoder's output, and the projector's input."""
    adapter, seen = vtprune.adapter_for(model), {}

    def tower(module, args, output):
        seen["encoder"] = output.last_hidden_state

    def projector(module, args):
        seen["projector"] = args[0]

    handles = [
        adapter.vision_tower().register_forward_hook(tower),
        adapter.projector.register_forward_pre_hook(projector),
    ]
    encode()
    for handle in handles:
        handle.remove()
    return seen["encoder"], seen["projector"]
