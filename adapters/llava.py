# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, one grid of patch tokens an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.tokens import Grid, Medium


class Llava(Adapter):
    """`LlavaForConditionalGeneration` (LLaVA-1.5, arXiv 2310.03744) with a CLIP or SigLIP vision tower.

    Tokens of an image: the patches in raster order. CLIP puts a CLS token before them. The select strategy "default"
    cuts it off, and "full" passes it to the LLM as one more visual token. SigLIP has no CLS token. With SigLIP,
    "default" cuts off a patch, so the grid is unknown.
    """

    model_types: ClassVar[tuple[str, ...]] = ("llava",)
    family = "LLaVA-1.5"
    layout = "one grid an image"
    cls_token = "with CLIP"
    towers = {"clip_vision_model": 1, "siglip_vision_model": 0}
    """Supported vision towers and their number of CLS tokens."""

    @classmethod
    def refuses(cls, config: Any) -> str | None:
        tower = config.vision_config.model_type
        if tower not in cls.towers:
            return f"its vision tower is {tower!r}; supported: {', '.join(cls.towers)}"
        return None

    @property
    def has_cls(self) -> bool:
        return bool(self.cls_tokens)

    @property
    def cls_tokens(self) -> int:
        """CLS tokens that the tower puts before the patches."""
        return self.towers[self.vision_config.model_type]

    def cuts_cls(self, kind: str) -> bool:
        return self.config.vision_feature_select_strategy == "default"

    @property
    def image_grid(self) -> Grid | None:
        if self.cuts_cls("image") and not self.cls_tokens:
            return None
        side = self.vision_config.image_size // self.vision_config.patch_size
        return Grid(side, side, prefix=0 if self.cuts_cls("image") else self.cls_tokens)

    def media(self, kind: str, inputs: Mapping[str, Any], features: Sequence[Tensor]) -> list[Medium]:
        grid = self.image_grid
        return [
            Medium.of_grids(grid) if grid is not None and len(image) == len(grid) else Medium.without_grid(len(image))
            for image in features
        ]
