# SPDX-License-Identifier: Apache-2.0
"""FastVLM: a FastViT-HD of timm, and one grid of tokens an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class FastVLM(Adapter):
    """`FastVlmForConditionalGeneration` (arXiv 2412.13303).

    The encoder halves rows and columns several times, mixes with convolutions first and with attention last, and has no
    CLS token. Tokens of an image: the places of its last feature map in raster order, projected one by one.
    """

    model_types: ClassVar[tuple[str, ...]] = ("fast_vlm",)
    family = "FastVLM"
    layout = "one grid an image"
    merges_in_encoder = False
    layers_unread = "it is a network of timm with convolutions, whose layers hold no sequence of patches"
    encoder_uncounted = "it is a network of timm with convolutions"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.timm_model.stages

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [len(self._grid(inputs))] * len(inputs["pixel_values"])

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(self._grid(inputs)) for _ in features]

    def _grid(self, inputs: Mapping[str, Any]) -> Grid:
        # Each halving pads what is odd.
        step = self.base.vision_tower.timm_model.feature_info[-1]["reduction"]
        height, width = inputs["pixel_values"].shape[-2:]
        return Grid(-(-height // step), -(-width // step))
