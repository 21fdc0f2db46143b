# SPDX-License-Identifier: Apache-2.0
"""LLaVA-OneVision: images as in LLaVA-NeXT, resized if large, and videos as frames pooled after the projector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.adapters.base import PIXELS
from vtprune.adapters.llava_next import LlavaNext
from vtprune.tokens import Grid, Medium

_UNLIMITED = "anyres_max_1000000"
"""A `vision_aspect_ratio` that leaves every mosaic as it is."""


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration` (arXiv 2408.03326), usually with a SigLIP vision tower.

    Images are as in LLaVA-NeXT, but the features of a mosaic larger than `vision_aspect_ratio` allows are resized. Its
    tokens then belong to no single tile, and the whole mosaic is one crop. If a prompt has several images, each is an
    overview and one newline token. Tokens of a video: one grid a frame in raster order, resized to half its height and
    width after the projector, frame after frame, and one newline token at the end of the video.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    family = "LLaVA-OneVision"
    kinds = ("image", "video")
    layout = "images: as LLaVA-NeXT, large ones resized; videos: one pooled grid a frame, one newline token"

    def crops(self, inputs: Mapping[str, Any]) -> list[int]:
        per_prompt = inputs.get("batch_num_images")
        counts = super().crops(inputs)
        if per_prompt is None:
            return counts
        tiled = [n == 1 for n in torch.as_tensor(per_prompt).tolist() for _ in range(n)]
        return [count if tile else 1 for count, tile in zip(counts, tiled, strict=True)]

    def pack_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": inputs.get("vision_aspect_ratio") or self.config.vision_aspect_ratio}

    def without_resizing(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**inputs, "vision_aspect_ratio": _UNLIMITED}

    def crop_numbers(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        whole = super().crop_numbers(self.without_resizing(inputs))
        packed = super().crop_numbers(inputs)
        return [
            image if len(image) == len(unresized) else image.clamp(max=1)
            for image, unresized in zip(packed, whole, strict=True)
        ]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        if kind == "image":
            return super().media(kind, inputs, features)
        side, frames = ceil(self.side / 2), inputs[PIXELS[kind]].shape[1]
        content = Medium.of_grids(*[Grid(side, side)] * frames)
        lines = torch.zeros(len(content) + 1, dtype=torch.long)
        return [Medium(pad(content.crops, (0, 1), value=-1), content.grids, lines)] * len(features)

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        return super().pixels(kind, inputs) if kind == "image" else inputs[PIXELS[kind]]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        if kind == "image":
            return super().projector_inputs(kind, inputs, features)
        pooled = self.base.apply_pooling(features)
        videos = pooled.unflatten(0, inputs[PIXELS[kind]].shape[:2]).flatten(1, 2)
        return pad(videos, (0, 0, 0, 1)).flatten(0, 1)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)
