# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: images of 256 tokens with attention in both directions, in a decoder with sliding windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import gemma3_blocks


class Gemma3(Adapter):
    """`Gemma3ForConditionalGeneration` (arXiv 2503.19786).

    Tokens of an image: one grid in raster order; the projector averages 4x4 patches of the SigLIP encoder to one token.
    "Start of image" and "end of image" are around the image, and blank lines around these. With "pan and scan", the
    crops of an image are separate images. No CLS token. The tokens of an image attend to one another in both
    directions; in sliding layers only within the window. Sliding and full layers have different rotary embeddings.
    """

    model_types: ClassVar[tuple[str, ...]] = ("gemma3", "shieldgemma2")
    family = "Gemma 3"
    layout = "one grid an image"
    window_cuts_blocks = True
    marker_columns = (2, 2)  # a blank line, "start of image"; "end of image", a blank line

    def blocks(self, inputs: Mapping[str, Any]) -> Tensor | None:
        types = inputs.get("token_type_ids")
        return None if types is None else gemma3_blocks(types)

    @property
    def image_grid(self) -> Grid:
        side = self.projector.tokens_per_side
        return Grid(side, side)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(self.image_grid) for _ in features]

    def patch_values(self, kind: str, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
        return self.projector_inputs(kind, inputs, values)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        side = self.projector.patches_per_image
        grid = features.mT.unflatten(-1, (side, side))
        return self.projector.avg_pool(grid).flatten(2).mT.flatten(0, 1)
