# SPDX-License-Identifier: Apache-2.0
"""HunYuan-VL: images of any size, a newline token after each row, a begin and an end token around all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import rotary_embedding


class HunYuanVL(Adapter):
    """`HunYuanVLForConditionalGeneration` (HunyuanOCR, arXiv 2511.19575).

    The patches of all images of a call are packed in one sequence, row by row. The merger, which runs once an image,
    makes one token of neighbouring patches, `spatial_merge_size` in each direction. Tokens of an image: a begin token,
    one grid in raster order with a newline token after each row, and an end token. No CLS token. Positions have three
    or four axes, of which the last one counts the images of all prompts of a call: the model itself gives a prompt
    other logits in a batch than alone.
    """

    model_types: ClassVar[tuple[str, ...]] = ("hunyuan_vl",)
    family = "HunYuan-VL"
    layout = "one grid an image, a newline token a row, begin and end tokens"
    marker_columns = (1, 1)  # "start of image", "end of image"
    merges_in_encoder = False

    @property
    def projector(self) -> nn.Module:
        return self.base.vision_tower.patch_merger

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers

    @property
    def position_axes(self) -> int:
        return len(self.language_model.config.rope_parameters["mrope_section"])

    def rope(self, layer: int, hidden: Tensor, positions: Tensor) -> Any:
        # Four rows are four axes; none is for masks.
        return rotary_embedding(self.language_model, self.rope_kinds[layer], hidden, positions)

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [rows * columns for _, rows, columns in inputs["image_grid_thw"].tolist()]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        side = self.vision_config.spatial_merge_size
        return [_medium(rows // side, columns // side) for _, rows, columns in inputs["image_grid_thw"].tolist()]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        images = inputs["pixel_values"].split(self.encoder_sequences(kind, inputs))
        side = self._patch
        return [
            patches.view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4).reshape(-1, rows * side, columns * side)
            for patches, (_, rows, columns) in zip(images, inputs["image_grid_thw"].tolist(), strict=True)
        ]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        images = features.flatten(0, -2).split(self.encoder_sequences(kind, inputs))
        side = self.vision_config.spatial_merge_size
        tokens = []
        for patches, (_, rows, columns) in zip(images, inputs["image_grid_thw"].tolist(), strict=True):
            merged = avg_pool2d(patches.T.unflatten(1, (rows, columns)), side)
            tokens.append(pad(pad(merged, (0, 1)).flatten(1), (1, 1)).T)
        return torch.cat(tokens)


def _medium(rows: int, columns: int) -> Medium:
    """Of a grid with a newline token after each row, one token before it and one behind it."""
    crops = pad(torch.zeros(rows, columns, dtype=torch.long), (0, 1), value=-1).flatten()
    lines = torch.arange(rows).repeat_interleave(columns + 1)
    return Medium(pad(crops, (1, 1), value=-1), (Grid(rows, columns),), pad(lines, (1, 1), value=-1))
