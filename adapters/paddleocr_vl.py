# SPDX-License-Identifier: Apache-2.0
"""PaddleOCR-VL: images of any size from a tower like SigLIP's, with 2x2 patches merged before the LLM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from vtprune.adapters.qwen_vl import Qwen2VL, patch_grids


class PaddleOcrVL(Qwen2VL):
    """`PaddleOCRVLForConditionalGeneration` (arXiv 2510.14528).

    Tokens of an image as in Qwen2-VL, but the patches of an image come in raster order, and the projector puts
    neighbours together. No videos.
    """

    model_types: ClassVar[tuple[str, ...]] = ("paddleocr_vl",)
    family = "PaddleOCR-VL"
    kinds = ("image",)
    layout = "one grid an image"

    def encoder_layers(self, kind: str = "image") -> Sequence[nn.Module]:
        return self.base.visual.vision_model.encoder.layers

    def encoder_attention(self, layer: Any) -> nn.Module:
        return layer.self_attn

    @property
    def projector(self) -> nn.Module:
        return self.base.projector

    def pixels(self, kind: str, inputs: Mapping[str, Any]) -> Iterable[Tensor]:
        grids = patch_grids(kind, inputs)
        for patches, (frames, rows, _) in zip(super().pixels(kind, inputs), grids.tolist(), strict=True):
            yield rearrange(patches, "(t r c) ch p q -> t ch (r p) (c q)", t=frames, r=rows)

    def projector_inputs(self, kind: str, inputs: Mapping[str, Any], features: Tensor) -> Tensor:
        side, grids = self.vision_config.spatial_merge_size, patch_grids(kind, inputs)
        return torch.cat(
            [
                patches.view(frames, rows // side, side, columns // side, side, -1).mean((2, 4)).flatten(0, 2)
                for patches, (frames, rows, columns) in zip(
                    features.split(grids.prod(1).tolist()), grids.tolist(), strict=True
                )
            ]
        )
