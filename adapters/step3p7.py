# SPDX-License-Identifier: Apache-2.0
"""Step 3.7: tiles of an image, then the whole image, with marks between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class Step3p7(Adapter):
    """`Step3p7ForConditionalGeneration` (Step 3.7 Flash; no paper).

    A large image is cut into square tiles of one size. Tokens of an image: one grid a tile, then one of the whole image
    in another size; "patch start", "patch end" and "patch newline" are around tiles, "image start" and "image end"
    around the whole image. Two convolutions make one token of about 4x4 patches, which overlap with those of its
    neighbours. The encoder runs twice, on whole images and on tiles. No CLS token. Heads of sliding and full layers of
    the language model differ in number, and so do their rotary embeddings.
    """

    model_types: ClassVar[tuple[str, ...]] = ("step3p7",)
    family = "Step 3.7"
    layout = "one grid a tile, then one of the whole image, text between them"
    merges_in_encoder = False
    layers_unread = "convolutions make tokens of patches that overlap"
    features_unread = "the encoder and its projector run twice, on whole images and on tiles"
    marker_columns = (1, 1)  # "patch start" or "image start"; "image end"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_model.layers

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [
            (crop.shape[-2] // self._patch) * (crop.shape[-1] // self._patch)
            for crops in (inputs["pixel_values"], inputs.get("pixel_values_local"))
            if crops is not None
            for crop in crops
        ]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        whole, tiles = inputs["pixel_values"], inputs.get("pixel_values_local")
        of_tile = [] if tiles is None else [self._grid(tiles)]
        return [Medium.of_grids(*of_tile * count, self._grid(whole)) for count in self._tiles(inputs)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        whole, tiles, counts = inputs["pixel_values"], inputs.get("pixel_values_local"), self._tiles(inputs)
        if tiles is None:
            return whole[:, None]
        # In one size, to be drawn side by side.
        tiles = interpolate(tiles, whole.shape[-2:], mode="nearest")
        return [torch.cat([own, image[None]]) for own, image in zip(tiles.split(counts), whole, strict=True)]

    def _tiles(self, inputs: Mapping[str, Any]) -> list[int]:
        """Number of tiles of each image."""
        counts = inputs.get("num_local_patches")
        return [0] * len(inputs["pixel_values"]) if counts is None else torch.as_tensor(counts).tolist()

    def _grid(self, crops: Any) -> Grid:
        """The grid of each of some crops (crops, 3, height, width)."""
        # Each convolution halves rows and columns, and rounds up.
        return Grid(*(-(-(length // self._patch) // 4) for length in crops.shape[-2:]))
