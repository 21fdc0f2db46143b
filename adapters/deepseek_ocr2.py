# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-OCR 2: tiles, the whole view and a separator, from a SAM and a language model as encoder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Medium


class DeepseekOcr2(Adapter):
    """`DeepseekOcr2ForConditionalGeneration` (arXiv 2601.20552).

    Tokens of an image: its tiles if it is large, then the whole view, then one separator token. The encoder is a SAM,
    whose patches convolutions make 16 times fewer, and behind it a language model. That reads these patches, and a
    fixed number of learned queries behind them; the queries' outputs are the visual tokens. They are in the order in
    which the encoder reads the image, and stand for no place, so that there is no grid. Tiles and whole views differ in
    size and are encoded one after the other.
    """

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_ocr2",)
    family = "DeepSeek-OCR 2"
    layout = "tiles, whole view, a separator token; learned queries without a grid"
    merges_in_encoder = False
    layers_unread: ClassVar[str] = "it runs twice a call, on whole views and on tiles"
    gridless = "learned queries, which stand for no place, become the visual tokens"
    unmerged = layers_unread
    encoder_uncounted = "it is a SAM, whose layers attend in windows, with convolutions and a language model behind it"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.vision_encoder.layers

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        views = [inputs["pixel_values"], inputs.get("pixel_values_local")]
        lengths = [(len(pixels), sum(self._patches_and_queries(pixels))) for pixels in views if pixels is not None]
        return [length for count, length in lengths for _ in range(count)]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        whole = self._patches_and_queries(inputs["pixel_values"])[1]
        tile = 0 if (local := inputs.get("pixel_values_local")) is None else self._patches_and_queries(local)[1]
        return [_medium([tile] * count + [whole]) for count in tiles(inputs)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        whole = inputs["pixel_values"]
        local = inputs.get("pixel_values_local", whole[:0])
        # Of two sizes.
        images = zip(whole, local.split(tiles(inputs)) if len(local) else [local] * len(whole), strict=True)
        return [torch.cat([image.flatten(), own.flatten()]) for image, own in images]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        # Whole views of all images came first.
        rows, counts = features.flatten(0, -2), tiles(inputs)
        whole = self._patches_and_queries(inputs["pixel_values"])[1]
        views, local = rows.split([whole * len(counts), len(rows) - whole * len(counts)])
        each = len(local) // max(sum(counts), 1)
        parts = zip(local.split([each * count for count in counts]), views.split(whole), strict=True)
        return torch.cat([row for own, view in parts for row in (own, view, rows.new_zeros(1, rows.shape[1]))])

    def _patches_and_queries(self, pixels: Tensor) -> tuple[int, int]:
        """Patches of SAM, and queries, that the encoder reads of each view. pixels: (views, 3, side, side)."""
        tower = self.base.vision_tower
        side = pixels.shape[-1] // self.vision_config.sam_config.patch_size
        patches = (-(-side // 4)) ** 2  # two convolutions with stride 2
        few = tower.query_768_resolution.num_embeddings
        return patches, few if patches <= few else tower.query_1024_resolution.num_embeddings


def tiles(inputs: Mapping[str, Any]) -> list[int]:
    """Number of tiles of each image of a call."""
    counts = inputs.get("num_local_patches")
    if counts is None or inputs.get("pixel_values_local") is None:
        return [0] * len(inputs["pixel_values"])
    return [int(count) for count in counts]


def _medium(lengths: list[int]) -> Medium:
    """Crops of so many tokens, and one separator behind all of them."""
    crops = torch.cat([torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.tensor([-1])])
    return Medium(crops, (None,) * len(lengths), torch.zeros_like(crops))
