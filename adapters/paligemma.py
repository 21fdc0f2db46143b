# SPDX-License-Identifier: Apache-2.0
"""PaliGemma and PaliGemma 2: images come first, and all tokens of the prompt attend to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium
from vtprune.transformers_private import cache_of


class PaliGemma(Adapter):
    """`PaliGemmaForConditionalGeneration` (arXiv 2407.07726; PaliGemma 2, arXiv 2412.03555).

    Tokens of an image: the patches of the SigLIP encoder in raster order, projected one by one. Images come before all
    text, which begins with "bos". No CLS token. The whole prompt is one block whose tokens attend to one another in
    both directions, also beyond the window of PaliGemma 2's sliding layers. Generated tokens (in training, the answer)
    are causal. Positions count from 1.
    """

    model_types: ClassVar[tuple[str, ...]] = ("paligemma",)
    family = "PaliGemma"
    layout = "one grid an image"
    marker_columns = (0, 1)  # "bos", which begins the text

    def blocks(self, inputs: Mapping[str, Any]) -> Tensor | None:
        types, cache = inputs.get("token_type_ids"), cache_of(inputs)
        # Given encoded images and a cache that is not empty, the model handles a prompt as a continuation.
        continued = cache is not None and cache.is_initialized and inputs.get("pixel_values") is None
        return None if types is None or continued else torch.where(types == 0, 0, -1)

    @property
    def image_grid(self) -> Grid:
        side = self.vision_config.image_size // self.vision_config.patch_size
        return Grid(side, side)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        return [Medium.of_grids(self.image_grid) for _ in features]
