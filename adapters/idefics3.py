# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM: square tiles with text between them, several patches in one token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class Idefics3(Adapter):
    """`Idefics3ForConditionalGeneration` (arXiv 2408.12637), `SmolVLMForConditionalGeneration` (arXiv 2504.05299).

    An image is cut into tiles of one size, followed by the whole image in a smaller size. Text tokens with the row and
    column come before each tile, so every tile is a separate medium. Tokens of a tile: one grid in raster order; the
    connector stacks neighbouring patches, `scale_factor` in each direction (pixel shuffle), and projects them to one
    token. Samples with fewer tiles are padded with all-zero tiles, which the model ignores. No CLS token. Frames of
    videos come as tiles.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics3", "smolvlm")
    family = "Idefics3, SmolVLM"
    layout = "one grid a tile, text between tiles"
    marker_columns = (2, 1)  # "around image", the position of the tile; "around image" or the end of a row of tiles
    merges_in_encoder = False  # the padding of images of different sizes is masked

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    @property
    def projector(self) -> Any:
        return self.base.connector

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        return super().encoder_sequences(kind, {"pixel_values": self.pixels(kind, inputs)})

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = inputs["pixel_values"].shape[-1] // self._patch // self.config.scale_factor
        grid = Grid(side, side)
        return [Medium.of_grids(grid) for sample in features for _ in range(len(sample) // len(grid))]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        tiles = inputs["pixel_values"].flatten(0, 1)
        return tiles[(tiles != 0).flatten(1).any(1)]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values.contiguous())

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        stacked = self.projector.pixel_shuffle(features, self.config.scale_factor)
        return stacked.unflatten(-1, (-1, features.shape[-1])).mean(-2).flatten(0, 1)
