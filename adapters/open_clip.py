# SPDX-License-Identifier: Apache-2.0
"""Vision encoders of open_clip: its own `VisionTransformer`, and timm's in a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from vtprune.adapters.encoder import EncoderAdapter, LayerParts, class_names
from vtprune.adapters.layer_attention import LayerAttention, OpenClipAttention, TorchAttention
from vtprune.adapters.timm import TimmViT
from vtprune.errors import UnsupportedModelError

_PACKAGE = "open_clip"


def _visual(model: Any) -> Any:
    """The vision tower of an open_clip model, or what was given."""
    return getattr(model, "visual", model) if class_names(model, _PACKAGE) else model


class OpenClipViT(EncoderAdapter):
    """open_clip's own `VisionTransformer`, alone or as `visual` of a CLIP or CoCa model."""

    family: ClassVar[str] = "VisionTransformer of open_clip"

    @classmethod
    def find(cls, model: Any) -> nn.Module | None:
        visual = _visual(model)
        if "VisionTransformer" not in class_names(visual, _PACKAGE):
            return None
        if not visual.transformer.batch_first:
            raise UnsupportedModelError("this encoder of open_clip runs with batch_first=False; True is supported")
        if any(getattr(layer.attn, "logit_scale", None) is not None for layer in visual.transformer.resblocks):
            raise UnsupportedModelError("this encoder of open_clip has scaled cosine attention, which is not supported")
        return visual

    @property
    def layers(self) -> Sequence[nn.Module]:
        return self.tower.transformer.resblocks

    def parts(self, layer: Any) -> LayerParts:
        kind = TorchAttention if isinstance(layer.attn, nn.MultiheadAttention) else OpenClipAttention
        attention: LayerAttention = kind(layer.attn)
        return LayerParts(layer.ln_1, attention, layer.ln_2, layer.mlp, layer.ls_2)

    @property
    def prefix_tokens(self) -> int:
        return 1

    @property
    def has_cls(self) -> bool:
        return True

    @property
    def patch_embedding(self) -> nn.Module:
        return self.tower.conv1

    @property
    def recomputes(self) -> bool:
        return self.tower.transformer.grad_checkpointing


class OpenClipTimm(TimmViT):
    """timm's `VisionTransformer` in a model of open_clip, such as SigLIP with its attention pooling."""

    family: ClassVar[str] = "VisionTransformer of timm in open_clip"

    @classmethod
    def find(cls, model: Any) -> nn.Module | None:
        visual = _visual(model)
        return super().find(visual.trunk) if "TimmModel" in class_names(visual, _PACKAGE) else None
