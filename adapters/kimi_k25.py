# SPDX-License-Identifier: Apache-2.0
"""Kimi K2.5 and K2.6: images of any size and chunks of video, with 2x2 patches merged before the LLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.base import PIXELS, Adapter
from vtprune.adapters.qwen_vl import patch_grids
from vtprune.tokens import Grid, Medium


class KimiK25(Adapter):
    """`Kimi_K25ForConditionalGeneration` (Kimi K2.5, arXiv 2602.02276).

    The patches of all media of a call are packed in one sequence, in raster order. A video comes in chunks of a few
    frames, and text with a time stamp comes before each of them, so every chunk is a separate medium. The patches of a
    chunk see one another across its frames. Tokens of an image or a chunk: one grid in raster order; the tower averages
    each patch over the frames, and the projector makes one token of `merge_kernel_size` neighbours. No CLS token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("kimi_k25",)
    family = "Kimi K2.5"
    kinds = ("image", "video")
    merges_in_encoder = False
    layout = "one grid an image or chunk of a video, text between chunks"
    marker_columns = (3, 1)  # "media begin", the kind of medium, "media content"; "media end"

    STAMP = 7
    """Tokens of a time stamp such as "00:00:01.500"."""

    def markers(self, ids: Tensor | None, images: Tensor) -> Tensor:
        found = super().markers(ids, images)
        if ids is None:
            return found
        video = (ids.to(images.device) == self.config.video_token_id) & (images >= 0)
        for distance in range(1, self.marker_columns[0] + self.STAMP + 1):
            found[:, :-distance] |= video[:, distance:]
        return found & (images < 0)

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.vision_tower(kind).layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attn

    @property
    def projector(self) -> Any:
        return self.base.mm_projector

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return patch_grids(kind, inputs).prod(1).tolist()

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        down, across = self.vision_config.merge_kernel_size
        return [
            Medium.of_grids(Grid(rows // down, columns // across))
            for _, rows, columns in patch_grids(kind, inputs).tolist()
        ]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return inputs[PIXELS[kind]].split(patch_grids(kind, inputs).prod(1).tolist())

    def pictures(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[Sequence[Tensor]]:
        grids = patch_grids(kind, inputs).tolist()
        return [
            [rearrange(own, "(t r c) ch p q -> t ch (r p) (c q)", t=frames, r=rows).float().mean(0)]
            for own, (frames, rows, _) in zip(self.pixels(kind, inputs), grids, strict=True)
        ]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        down, across = self.vision_config.merge_kernel_size
        means = []
        patches = values.flatten(0, 1).split(patch_grids(kind, inputs).prod(1).tolist())
        for medium, (frames, rows, columns) in zip(patches, patch_grids(kind, inputs).tolist(), strict=True):
            cells = medium.unflatten(0, (frames, rows // down, down, columns // across, across))
            means.append(cells.mean((0, 2, 4)).flatten(0, 1))
        return torch.cat(means)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.mean(1)  # (tokens, patches of a token, dim)
