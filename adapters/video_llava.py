# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA: an encoder for images, and one for frames of videos, whose CLS tokens also go to the LLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import PIXELS
from vtprune.adapters.llava import Llava
from vtprune.tokens import Grid, Medium


class VideoLlava(Llava):
    """`VideoLlavaForConditionalGeneration` (arXiv 2311.10122) with CLIP or SigLIP vision towers.

    It has two towers of the same kind, one for images and one for frames. Tokens of an image: as in LLaVA-1.5. Tokens
    of a video: for each frame the CLS token, which is never cut off here, and then the patches in raster order. No
    newline tokens.
    """

    model_types: ClassVar[tuple[str, ...]] = ("video_llava",)
    family = "Video-LLaVA"
    kinds = ("image", "video")
    layout = "images: one grid; videos: CLS token and one grid a frame"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.image_tower if kind == "image" else self.base.video_tower

    def cuts_cls(self, kind: str) -> bool:
        return kind == "image" and super().cuts_cls(kind)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        if kind == "image":
            return super().media(kind, inputs, features)
        side = self.vision_config.image_size // self.vision_config.patch_size
        videos, frames = inputs[PIXELS[kind]].shape[:2]
        return [Medium.of_grids(*[Grid(side, side, prefix=self.cls_tokens)] * frames)] * videos

    def pixel_argument(self, kind: str, inputs: Mapping[str, Any]) -> Tensor | None:
        # The processor gives the pixels of images another name, which the model accepts up to transformers 5.21.
        pixels = super().pixel_argument(kind, inputs)
        return inputs.get("pixel_values_images") if pixels is None and kind == "image" else pixels

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels = self.pixel_argument(kind, inputs)
        assert pixels is not None, "asked for the pixels of a call that encoded none"
        return pixels

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> Sequence[int | tuple[int, ...]]:
        return super().encoder_sequences(kind, {PIXELS[kind]: self.pixels(kind, inputs)})
