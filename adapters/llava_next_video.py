# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT-Video: images as in LLaVA-NeXT, and videos as frames that are pooled before the projector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtprune.adapters.base import PIXELS
from vtprune.adapters.llava_next import LlavaNext
from vtprune.tokens import Grid, Medium


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration` (LLaVA-NeXT-Video, built on arXiv 2310.03744).

    Images are as in LLaVA-NeXT. Tokens of a video: one grid a frame in raster order, frame after frame, without newline
    tokens. The resampler pools the patches of each frame before the projector, usually 2x2 patches to their mean.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next_video",)
    family = "LLaVA-NeXT-Video"
    kinds = ("image", "video")
    layout = "images: as LLaVA-NeXT; videos: one pooled grid a frame"

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        if kind == "image":
            return super().media(kind, inputs, features)
        side, frames = self.side // self.config.spatial_pool_stride, inputs[PIXELS[kind]].shape[1]
        return [Medium.of_grids(*[Grid(side, side)] * frames) for _ in features]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return super().pixels(kind, inputs) if kind == "image" else inputs[PIXELS[kind]]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return super().projector_inputs(kind, inputs, features) if kind == "image" else features.flatten(0, 1)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        if kind == "image":
            return super().patch_values(kind, inputs, values)
        frames = values.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        pooled = avg_pool2d(frames, self.config.spatial_pool_stride)
        return pooled.flatten(2).transpose(1, 2).flatten(0, 1)
