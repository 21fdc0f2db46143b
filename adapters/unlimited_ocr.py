# SPDX-License-Identifier: Apache-2.0
"""Unlimited-OCR: a mosaic of tiles, the whole view and a separator, from a SAM and a CLIP as encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.adapters.deepseek_ocr2 import DeepseekOcr2, tiles
from vtprune.tokens import Grid, Medium


class UnlimitedOcr(DeepseekOcr2):
    """`UnlimitedOcrForConditionalGeneration` (Unlimited-OCR; no paper).

    Like DeepSeek-OCR 2, but a CLIP reads what the convolutions leave of the patches, and its patches are the visual
    tokens: the mosaic of all tiles, row by row across tiles, if the image is large, then the whole view, with a newline
    token behind every row, then one separator token. Its CLS token is cut off. The KV cache keeps the whole prompt, and
    a window of what is generated, so tokens can be dropped before the language model only.
    """

    model_types: ClassVar[tuple[str, ...]] = ("unlimited_ocr",)
    family = "Unlimited-OCR"
    layout = "mosaic of tiles, whole view, a newline token a row, a separator token"
    carries_state = True
    gridless = ""
    encoder_uncounted = "it is a SAM, whose layers attend in windows, with convolutions and a CLIP behind it"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.vision_encoder.encoder.layers

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        views = [inputs["pixel_values"], inputs.get("pixel_values_local")]
        return [self._side(pixels) ** 2 + 1 for pixels in views if pixels is not None for _ in range(len(pixels))]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        whole = self._side(inputs["pixel_values"])
        side = self._side(inputs["pixel_values_local"]) if inputs.get("pixel_values_local") is not None else 0
        media = []
        for count, columns in zip(tiles(inputs), _columns(inputs), strict=True):
            numbers = torch.arange(count)[:, None, None].expand(-1, side**2, -1)
            view = torch.full((whole**2, 1), count)
            crops = _in_order(numbers, view, columns, -1)[:, 0]
            newline = crops < 0
            lines = newline.cumsum(0) - newline.long()
            lines[-1] = -1  # the separator ends the whole image
            media.append(Medium(crops, (Grid(side, side),) * count + (Grid(whole, whole),), lines))
        return media

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        # Whole views of all images came first.
        rows, counts = features.flatten(0, -2), tiles(inputs)
        whole = self._side(inputs["pixel_values"]) ** 2
        views, local = rows.split([whole * len(counts), len(rows) - whole * len(counts)])
        by_tile = local.unflatten(0, (sum(counts), -1)) if len(local) else local[None, :0].expand(0, -1, -1)
        parts = zip(by_tile.split(counts), views.split(whole), _columns(inputs), strict=True)
        return torch.cat([_in_order(own, view, columns, 0) for own, view, columns in parts])

    def _side(self, pixels: Tensor) -> int:
        """Visual tokens in a row of each view, newline aside. pixels: (views, 3, side, side)."""
        return -(-(pixels.shape[-1] // self.vision_config.sam_config.patch_size) // 4)  # two convolutions of stride 2


def _columns(inputs: Mapping[str, Any]) -> list[int]:
    """Columns of tiles of each image of a call; any number for an image without tiles."""
    grids = inputs.get("patches_grid")
    return [1] * len(inputs["pixel_values"]) if grids is None else [int(columns) for columns, _ in grids]


def _in_order(own: Tensor, view: Tensor, columns: int, newline: float) -> Tensor:
    """What an image's tiles (tiles, tokens, dim), and its whole view (tokens, dim), have in the order of the prompt:
    (tokens, dim). newline: what newlines and the separator have."""
    whole = pad(_square(view[None]), (0, 0, 0, 1), value=newline).flatten(0, 2)
    parts = [whole, whole.new_full((1, whole.shape[1]), newline)]
    if len(own):
        mosaic = _square(own).unflatten(0, (-1, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
        parts.insert(0, pad(mosaic, (0, 0, 0, 1), value=newline).flatten(0, 1))
    return torch.cat(parts)


def _square(values: Tensor) -> Tensor:
    """(views, tokens, dim) -> (views, side, side, dim)"""
    return values.unflatten(1, (round(values.shape[1] ** 0.5), -1))
