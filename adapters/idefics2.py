# SPDX-License-Identifier: Apache-2.0
"""Idefics2 and Aria: a resampler makes a fixed number of tokens of each tile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Medium


class Resampled(Adapter):
    """What Idefics2 and Aria share: each visual token is made of all patches of its tile, so its place is unknown."""

    merges_in_encoder = False
    layers_unread: ClassVar[str] = "a resampler makes each visual token of all patches"
    features_unread = layers_unread
    gridless = layers_unread


class Idefics2(Resampled):
    """`Idefics2ForConditionalGeneration` (arXiv 2405.02246).

    An image is one tile, or four and the whole image in a smaller size. Tokens of a tile: as many as the perceiver has
    latents. A text token is before, between and behind tiles, so every tile is a separate medium. Samples with fewer
    tiles are padded with all-zero tiles, which the model ignores, and smaller tiles with pixels that are masked. No CLS
    token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("idefics2",)
    family = "Idefics2"
    layout = "64 resampled tokens a tile, text between tiles"
    marker_columns = (1, 1)  # "around image"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.base.connector

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        if inputs.get("pixel_attention_mask") is None:
            return super().encoder_sequences(kind, {"pixel_values": self.pixels(kind, inputs)})
        # Those that pad a smaller tile are masked. They are of the batch: a tile alone has none.
        real, side = self._real(inputs["pixel_values"].flatten(0, 1)), self._patch
        masks = inputs["pixel_attention_mask"].flatten(0, 1)[real].unfold(1, side, side).unfold(2, side, side)
        return masks.flatten(3).any(3).flatten(1).sum(1).tolist()

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        tiles = inputs["pixel_values"].flatten(0, 1)
        return tiles[self._real(tiles)]

    @staticmethod
    def _real(tiles: Tensor) -> Tensor:
        """(tiles,) bool: which are no padding. tiles: (tiles, 3, height, width)."""
        return (tiles != 0).flatten(1).any(1)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        tokens = self.config.perceiver_config.resampler_n_latents
        # One part of the features a sample; up to transformers 5.18 one a tile.
        return [Medium.without_grid(tokens) for part in features for _ in range(len(part) // tokens)]


class Aria(Resampled):
    """`AriaForConditionalGeneration` (arXiv 2410.05993).

    An image is one tile, or several side by side. Tokens of a tile: 128, or 256 of a large one. Padding inside a tile
    is masked. No CLS token. The language model is a mixture of experts.
    """

    model_types: ClassVar[tuple[str, ...]] = ("aria",)
    family = "Aria"
    layout = "128 or 256 resampled tokens a tile, tiles side by side"
    tiles_adjoin = True

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.without_grid(len(tile)) for tile in features]
