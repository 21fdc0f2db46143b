# SPDX-License-Identifier: Apache-2.0
"""Aya Vision and Command A Vision: square tiles with text between them, four neighbouring patches in one token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.adapters.internvl import square
from vtprune.tokens import Medium


class AyaVision(Adapter):
    """`AyaVisionForConditionalGeneration` (arXiv 2505.08751), a SigLIP tower over Cohere 2.

    An image is cut into tiles of one size. If there are several, a thumbnail of the whole image follows them. A text
    token with the tile's number comes before each tile, so every tile is a separate medium. Tokens of a tile: one grid
    in raster order. The projector stacks neighbouring patches, `downsample_factor` in each direction (pixel shuffle),
    and projects them to one token. No CLS token. "Start of image" and "end of image" are around an image.
    """

    model_types: ClassVar[tuple[str, ...]] = ("aya_vision",)
    family = "Aya Vision"
    layout = "one grid a tile, text between tiles"
    marker_columns = (2, 1)  # <|START_OF_IMG|> and the tile's number, or that alone; <|END_OF_IMG|>

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        tower = config.vision_config.model_type
        if tower != "siglip_vision_model":
            return f"its vision tower is {tower!r}; supported: siglip_vision_model"
        if getattr(config, "vision_feature_select_strategy", "full") != "full":
            return "its vision_feature_select_strategy cuts off the first patch, as if it were a CLS token"
        return None

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        # The model assumes that every tile is a square.
        return [Medium.of_grids(square(len(tile))) for tile in features]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values.contiguous())

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        stacked = self.projector.pixel_shuffle(features).flatten(0, 2)
        return stacked.unflatten(-1, (-1, features.shape[-1])).mean(-2)


class Cohere2Vision(AyaVision):
    """`Cohere2VisionForConditionalGeneration` (Command A Vision; no paper).

    Like Aya Vision, but a line break follows each tile, and tiles have no numbers.
    """

    model_types: ClassVar[tuple[str, ...]] = ("cohere2_vision",)
    family = "Command A Vision"
    marker_columns = (1, 2)  # "start of image"; line break, "end of image"
