# SPDX-License-Identifier: Apache-2.0
"""Llama 4: square tiles with text between them, four neighbouring patches in one token, over layers with chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import reduce
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.adapters.internvl import square
from vtprune.tokens import Medium


class Llama4(Adapter):
    """`Llama4ForConditionalGeneration` (Llama 4 Scout and Maverick; no paper).

    An image is cut into tiles of one size, followed by the whole image in that size. A separator token comes after each
    tile, and an "image" token before the whole image, so every tile is a separate medium. Tokens of a tile: one grid in
    raster order. The encoder has a CLS token behind the patches, which is cut off; then 2x2 neighbouring patches are
    stacked (pixel shuffle) and mapped to one token by an MLP inside the encoder, the "projector" here. A further
    projection to the width of the language model comes after that. Most layers of the language model attend in chunks,
    and the others scale queries by how many chunks came before, so tokens can be dropped up to the length of a chunk.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llama4",)
    family = "Llama 4"
    layout = "one grid a tile, text between tiles"
    cls_token = "yes"
    cls_is_last = True
    merges_in_encoder = False
    decoder_mlp = "feed_forward"
    marker_columns = (1, 1)  # "image" or a separator; a separator or the end of the image

    @property
    def language_model(self) -> nn.Module:
        return self.base.language_model.model

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_model.model.layers

    @property
    def projector(self) -> nn.Module:
        return self.base.vision_model.vision_adapter

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def _side(self) -> int:
        """Of the square of patches that become one token."""
        return round(1 / self.vision_config.pixel_shuffle_ratio)

    @torch.no_grad()
    def features_of(self, output: Any) -> Tensor:
        encoded = output.last_hidden_state
        # All tiles as one matrix, as the model does it, so that not a bit differs.
        return self.base.multi_modal_projector(encoded.flatten(0, 1)).unflatten(0, encoded.shape[:2])

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        # The model assumes that every tile is a square.
        return [Medium.of_grids(square(len(tile))) for tile in features]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        columns = square(features.shape[1]).cols // self._side
        pattern = "tiles (rows a columns b) dim -> (tiles rows columns) dim"
        return reduce(features, pattern, "mean", columns=columns, a=self._side, b=self._side)
