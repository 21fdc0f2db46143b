# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL and Janus: a SigLIP tower, or two encoders, and one grid of patch tokens an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class DeepseekVL(Adapter):
    """`DeepseekVLForConditionalGeneration` (DeepSeek-VL 1.3B, arXiv 2403.05525).

    Tokens of an image: the patches in raster order, projected one by one. No CLS token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl",)
    family = "DeepSeek-VL"
    layout = "one grid an image"

    def vision_tower(self, kind: str = "image") -> nn.Module:
        return self.base.vision_model

    @property
    def projector(self) -> nn.Module:
        return self.base.aligner

    @property
    def image_grid(self) -> Grid:
        side = self.vision_config.image_size // self._patch
        return Grid(side, side)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        height, width = inputs["pixel_values"].shape[-2:]
        return [Medium.of_grids(Grid(height // self._patch, width // self._patch)) for _ in features]


class DeepseekVLHybrid(DeepseekVL):
    """`DeepseekVLHybridForConditionalGeneration` (DeepSeek-VL 7B, arXiv 2403.05525).

    Like DeepSeek-VL, but a token is made of a patch of SigLIP and of the place of the same part of the image in a SAM
    encoder, which sees it in a higher resolution. What methods read of the encoder is SigLIP's.
    """

    model_types: ClassVar[tuple[str, ...]] = ("deepseek_vl_hybrid",)
    family = "DeepSeek-VL, hybrid"
    merges_in_encoder = False
    unmerged = "each visual token is also made of a place in a second encoder"
    encoder_uncounted = "beside SigLIP there is a SAM encoder, which attends within windows"


class Janus(DeepseekVL):
    """`JanusForConditionalGeneration` (Janus-Pro, arXiv 2501.17811), where it reads images.

    Like DeepSeek-VL with an encoder of its own, and "start of image" and "end of image" around an image. Where it
    generates images, its prompts have no visual tokens.
    """

    model_types: ClassVar[tuple[str, ...]] = ("janus",)
    family = "Janus"
    marker_columns = (1, 1)  # <begin_of_image>, <end_of_image>
