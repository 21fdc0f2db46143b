# SPDX-License-Identifier: Apache-2.0
"""LFM2-VL and LFM3-VL: language models of short convolutions and attention, with 2x2 patches merged before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.base import Adapter, stack_sizes
from vtprune.adapters.qwen_vl import Qwen3VL
from vtprune.errors import UnsupportedStageError
from vtprune.tokens import Grid, Medium


class Lfm2VL(Adapter):
    """`Lfm2VlForConditionalGeneration` (LFM2-VL, arXiv 2511.23404).

    A large image is cut into tiles of one size, followed by the whole image in a smaller size. Text tokens with the row
    and column come before each tile, so every tile is a separate medium. Tokens of a tile: one grid in raster order, of
    half the rows and columns of its patches (`downsample_factor`). The encoder (SigLIP 2) runs on all tiles of a call,
    padded to the most patches of one. No CLS token. Most layers of the language model are short convolutions over
    the tokens.
    """

    model_types: ClassVar[tuple[str, ...]] = ("lfm2_vl",)
    family = "LFM2-VL"
    layout = "one grid a tile, text between tiles"
    merges_in_encoder = False  # the padding of tiles of different sizes is masked
    carries_state = True
    marker_columns = (1, 1)  # "start of image", or the row and column of a tile; "end of image"

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        # One token is between two tiles; before the first one of several come two.
        found = super().markers(ids, images)
        for row, numbers in enumerate(images.tolist()):
            runs = [c for c in range(1, len(numbers)) if numbers[c] >= 0 and numbers[c] != numbers[c - 1]]
            for start, following in zip(runs, runs[1:], strict=False):
                is_tile = numbers[following - 2] == numbers[start]
                if is_tile and start >= 2 and numbers[start - 2] < 0:
                    found[row, start - 2] = True
        return found

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(grid) for grid in self._grids(inputs)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        sizes = stack_sizes(inputs["spatial_shapes"])
        return [
            patches[: rows * columns] for patches, (rows, columns) in zip(inputs["pixel_values"], sizes, strict=True)
        ]

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        sizes = stack_sizes(inputs["spatial_shapes"])
        pattern = "(r c) (p q ch) -> ch (r p) (c q)"
        return [
            [rearrange(tile, pattern, r=rows, p=self._patch, q=self._patch)]
            for tile, (rows, _) in zip(self.pixels(kind, inputs), sizes, strict=True)
        ]

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [inputs["pixel_values"].shape[1]] * len(inputs["pixel_values"])

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        # The squares of all tiles stand side by side, padded to the same number a tile.
        factor, grids = self.config.downsample_factor, self._grids(inputs)
        slots = inputs["pixel_values"].shape[1] // factor**2
        if features.shape[:3] != (1, factor, factor * slots * len(grids)):
            raise UnsupportedStageError(
                "this release of transformers projects the tiles of LFM2-VL one by one, so what the projector reads "
                "cannot be told by token; take a newer one, or a method that reads nothing of it: divprune, cdpruner"
            )
        squares = features[0].unflatten(1, (-1, factor)).mean((0, 2)).unflatten(0, (len(grids), -1))
        return torch.cat([tile[: len(grid)] for tile, grid in zip(squares, grids, strict=True)])

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        side, sizes = self.config.downsample_factor, stack_sizes(inputs["spatial_shapes"])
        found = []
        for patches, (rows, columns), grid in zip(values, sizes, self._grids(inputs), strict=True):
            whole = patches[: rows * columns].unflatten(0, (rows, columns))[: grid.rows * side, : grid.cols * side]
            found.append(whole.unflatten(1, (-1, side)).unflatten(0, (-1, side)).mean((1, 3)).flatten(0, 1))
        return torch.cat(found)

    def _grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        side = self.config.downsample_factor
        return [Grid(rows // side, columns // side) for rows, columns in stack_sizes(inputs["spatial_shapes"])]


class Lfm3VL(Qwen3VL):
    """`Lfm3VlForConditionalGeneration` (no paper).

    Images and videos are laid out as those of Qwen3-VL. The encoder's layers are convolutions over the grid of an image
    or a frame, and attention in some. Positions have one axis. Most layers of the language model are short convolutions
    over the tokens.
    """

    model_types: ClassVar[tuple[str, ...]] = ("lfm3_vl",)
    family = "LFM3-VL"
    carries_state = True
    layers_unread = "most of its layers are convolutions, without attention"
    encoder_uncounted = "most of its layers are convolutions"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_tower

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    @property
    def projector(self) -> nn.Module:
        return self.base.multi_modal_projector
