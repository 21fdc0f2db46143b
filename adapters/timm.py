# SPDX-License-Identifier: Apache-2.0
"""timm's `VisionTransformer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vtprune.adapters.encoder import EncoderAdapter, LayerParts, class_names
from vtprune.adapters.layer_attention import TimmAttention
from vtprune.errors import UnsupportedModelError


class TimmViT(EncoderAdapter):
    """timm's `VisionTransformer` (DeiT and DINOv2 among them) with its pre-norm `Block`: LayerScale, norms of queries
    and keys, register and distillation tokens, and any pooling."""

    family: ClassVar[str] = "VisionTransformer of timm"

    @classmethod
    def find(cls, model: Any) -> nn.Module | None:
        if "VisionTransformer" not in class_names(model, "timm"):
            return None
        for layer in model.blocks:
            kinds = type(layer).__name__, type(layer.attn).__name__ if hasattr(layer, "attn") else "none"
            if kinds != ("Block", "Attention"):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has layers of class {kinds[0]} with attention of class {kinds[1]}; of "
                    "timm's, Block with Attention is supported"
                )
        return model

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.tower.blocks

    def parts(self, layer: Any) -> LayerParts:
        return LayerParts(layer.norm1, TimmAttention(layer.attn), layer.norm2, layer.mlp, layer.drop_path2)

    @property
    def prefix_tokens(self) -> int:
        return self.tower.num_prefix_tokens

    @property
    def has_cls(self) -> bool:
        return self.tower.cls_token is not None

    @property
    def patch_embedding(self) -> nn.Module:
        return self.tower.patch_embed

    @property
    def recomputes(self) -> bool:
        return self.tower.grad_checkpointing
