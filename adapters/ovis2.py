# SPDX-License-Identifier: Apache-2.0
"""Ovis 2: square tiles with indicator tokens between them, tokens mixed from a visual vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from einops import reduce
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class Ovis2(Adapter):
    """`Ovis2ForConditionalGeneration` (arXiv 2405.20797).

    The whole image comes first, then its tiles, all of one size, row by row. Indicator tokens are before and behind
    each of them, so every tile is a separate medium; their embeddings come with the image's. Tokens of a tile: one grid
    in raster order. The encoder stacks neighbouring patches, `hidden_stride` in each direction, and a head, the
    "projector" here, gives each token a distribution over a visual vocabulary. The token is the mean of the
    vocabulary's embeddings under it. No CLS token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("ovis2",)
    family = "Ovis 2"
    layout = "one grid a tile, text between tiles"
    gated_encoder_mlp = True
    marker_columns = (1, 1)  # an indicator each

    @property
    def marker_token_ids(self) -> tuple[int, ...]:
        return tuple(self.config.visual_indicator_token_ids)

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.transformer.encoder.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attention

    @property
    def projector(self) -> nn.Module:
        return self.base.vision_tower.head_linear

    @property
    def image_grid(self) -> Grid:
        side = self.vision_config.image_size // self._patch // self.vision_config.hidden_stride
        return Grid(side, side)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(self.image_grid) for _ in features]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        grid, stride = self.image_grid, self.vision_config.hidden_stride
        pattern = "tiles (rows a columns b) dim -> (tiles rows columns) dim"
        return reduce(values, pattern, "mean", rows=grid.rows, columns=grid.cols, a=stride, b=stride)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.unflatten(-1, (-1, self.vision_config.hidden_size)).mean(-2).flatten(0, 1)
