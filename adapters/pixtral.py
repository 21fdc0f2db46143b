# SPDX-License-Identifier: Apache-2.0
"""Pixtral-12B: the class of LLaVA with a tower for images of any size."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.adapters.base import Adapter, stack_sizes
from vtprune.tokens import Grid, Medium


class Pixtral(Adapter):
    """`LlavaForConditionalGeneration` with a Pixtral tower (Pixtral-12B, arXiv 2410.07073).

    Tokens of an image: its patches in raster order, projected one by one; the number of rows and columns depends on the
    image. The text token `[IMG_BREAK]` follows each row, and `[IMG_END]` the last row. The tower runs over the patches
    of all images of a call in one sequence, in which images do not attend to one another. No CLS token.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava/pixtral",)
    family = "Pixtral-12B"
    gated_encoder_mlp = True
    layout = "one grid an image, text after each row"
    marker_columns = (0, 1)  # [IMG_END]
    merges_in_encoder = False

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if config.vision_feature_select_strategy == "default":
            return "its vision_feature_select_strategy cuts off the first patch, as if it were a CLS token"
        return None

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.vision_tower(kind).transformer.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.attention

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [len(grid) for grid in self.patch_grids(inputs)]

    def patch_grids(self, inputs: Mapping[str, Any]) -> list[Grid]:
        """The grid of the encoder's patches of each image of a call."""
        return [Grid(height // self._patch, width // self._patch) for height, width in sizes(inputs)]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(grid) for grid in self.patch_grids(inputs)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        images = zip(inputs["pixel_values"], sizes(inputs), strict=True)
        return [image[:, :height, :width] for image, (height, width) in images]


def sizes(inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width of each image of a call, without the padding to the largest one."""
    pixels, given = inputs["pixel_values"], inputs.get("image_sizes")
    return [tuple(pixels.shape[-2:])] * len(pixels) if given is None else stack_sizes(given)
