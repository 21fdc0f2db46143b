# SPDX-License-Identifier: Apache-2.0
"""InternVL and Qianfan-OCR: square tiles side by side, four neighbouring patches in one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class InternVL(Adapter):
    """`InternVLForConditionalGeneration` (InternVL3, arXiv 2504.10479; InternVL 2.5, arXiv 2412.05271).

    An image is cut into tiles of one size. If there are several, a thumbnail of the whole image follows them. Their
    tokens have no text between them. Tokens of a tile: one grid in raster order. The encoder has a CLS token, which is
    cut off; then 2x2 neighbouring patches are stacked (pixel shuffle) and projected to one token. "Start of image" and
    "end of image" are around an image. Frames of videos come as images with text between them ("Frame2:"), which is
    part of the prompt's text.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    family = "InternVL"
    layout = "one grid a tile, tiles side by side"
    cls_token = "yes"
    tiles_adjoin = True
    marker_columns = (1, 1)  # <img>, </img>

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if config.vision_feature_select_strategy != "default":
            return "its vision_feature_select_strategy keeps the CLS token, which is then mixed with patches"
        return None

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.encoder.layer

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attention

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def _patch(self) -> int:
        return self.vision_config.patch_size[0]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        # The model assumes that every tile is a square.
        return [Medium.of_grids(square(len(tile))) for tile in features]

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return features.unflatten(-1, (-1, self.vision_config.hidden_size)).mean(-2).flatten(0, 1)

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        side = square(values.shape[1]).rows
        grid = values.contiguous().unflatten(1, (side, side))
        stacked = self.base.pixel_shuffle(grid, self.config.downsample_ratio)
        return stacked.unflatten(-1, (-1, values.shape[-1])).mean(-2).flatten(0, 2)


class QianfanOcr(InternVL):
    """`QianfanOCRForConditionalGeneration` (arXiv 2603.13398): InternVL's layout, over Qwen 3."""

    model_types: ClassVar[tuple[str, ...]] = ("qianfan_ocr",)
    family = "Qianfan-OCR"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.vision_tower.layers


def square(tokens: int) -> Grid:
    """The grid of a square image with this number of tokens."""
    side = round(tokens**0.5)
    return Grid(side, side)
