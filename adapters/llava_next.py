# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT: an overview of the image, then its tiles as one mosaic with a newline token after each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.adapters.base import stack_sizes
from vtprune.adapters.llava import Llava
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import llava_next_crops


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration` (LLaVA-1.6, built on arXiv 2310.03744) with a CLIP or SigLIP vision tower.

    Tokens of an image: the overview in raster order, then the mosaic of all tiles, row by row across tiles. Tokens in
    the padding around the image are left out. A newline token ends each row. Crops are the overview, and each tile that
    has tokens left. CLIP's CLS token is cut off.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava_next",)
    family = "LLaVA-NeXT"
    layout = "overview, mosaic of tiles, a newline token a row"
    image_grid = None

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        if (reason := super().refuses(config)) is not None:
            return reason
        tower, strategy = config.vision_config.model_type, config.vision_feature_select_strategy
        if (strategy == "default") != bool(cls.towers[tower]):
            return f"with {tower!r}, vision_feature_select_strategy={strategy!r} gives no grid for a mosaic"
        return None

    @property
    def side(self) -> int:
        """Number of patches in a row of a crop, which is also the number in a column."""
        return self.vision_config.image_size // self.vision_config.patch_size

    def crops(self, inputs: Mapping[str, Any]) -> list[int]:
        """Number of crops, overview and tiles, that the encoder processes for each image of a call."""
        pinpoints, size = self.config.image_grid_pinpoints, self.vision_config.image_size
        return [llava_next_crops(image, pinpoints, size) for image in stack_sizes(inputs["image_sizes"])]

    def pack(self, inputs: Mapping[str, Any], values: Tensor, newline: float) -> Sequence[Tensor]:
        """Arrange values (crops of all images, patches, dim) as the model arranges features: (tokens, dim) an image."""
        return self.base.pack_image_features(
            values.split(self.crops(inputs)),
            stack_sizes(inputs["image_sizes"]),
            image_newline=values.new_full(values.shape[-1:], newline),
            **self.pack_options(inputs),
        )[0]

    def pack_options(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Further arguments of the model's `pack_image_features`."""
        return {"vision_feature_select_strategy": self.config.vision_feature_select_strategy}

    def crop_numbers(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """(tokens,) long an image: 0 for the overview, then the tiles, -1 for newlines."""
        numbers = torch.cat([torch.arange(count, dtype=torch.float) for count in self.crops(inputs)])
        packed = self.pack(inputs, numbers[:, None, None].expand(-1, self.side**2, 1), newline=-1)
        return [image[:, 0].round().long() for image in packed]

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        tiled = [count > 1 for count in self.crops(inputs)]
        return [_medium(*image, self.side) for image in zip(self.crop_numbers(inputs), tiled, strict=True)]

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        pixels, counts = inputs["pixel_values"], self.crops(inputs)
        if pixels.ndim == 4:  # the crops of all images, one after another
            return pixels.split(counts)
        return [image[:count] for image, count in zip(pixels, counts, strict=True)]

    def encoder_sequences(self, kind: str, inputs: Mapping[str, Any]) -> list[int]:
        return [self.side**2] * sum(map(len, self.pixels(kind, inputs)))

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        return torch.cat(list(self.pack(inputs, features, newline=0)))

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return torch.cat(list(self.pack(inputs, values, newline=0)))


def _medium(numbers: Tensor, tiled: bool, side: int) -> Medium:
    """numbers: (tokens,) long, the crop of each token, -1 for newlines. tiled: whether there are tiles."""
    newline = numbers < 0
    lines = newline.cumsum(0) - newline.long()
    if tiled:
        lines[numbers == 0] = -1
    # A tile far from the centre may have no tokens left.
    found, crops = numbers.unique(return_inverse=True)
    crops = crops - int(newline.any())
    grids = [Grid(side, side)]
    for crop in range(1, int((found >= 0).sum())):
        rows = lines[crops == crop].unique(return_counts=True)[1]
        grids.append(Grid(len(rows), int(rows[0])))
    return Medium(crops, tuple(grids), lines)
