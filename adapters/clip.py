# SPDX-License-Identifier: Apache-2.0
"""Vision encoders of transformers: CLIP, SigLIP, ViT and DINOv2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import nn

from vtprune.adapters.encoder import EncoderAdapter, LayerParts, class_names
from vtprune.adapters.layer_attention import TransformersAttention


class _Names(NamedTuple):
    """Names of parts in a layer of one class."""

    first_norm: str
    attention: str
    second_norm: str
    end: str


_LAYERS = {
    "CLIPEncoderLayer": _Names("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "SiglipEncoderLayer": _Names("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    "ViTLayer": _Names("layernorm_before", "attention", "layernorm_after", "dropout"),
    "Dinov2Layer": _Names("norm1", "attention", "norm2", "drop_path"),
    "Dinov2WithRegistersLayer": _Names("norm1", "attention", "norm2", "drop_path"),
}
_TOWERS = {"CLIPVisionModel", "SiglipVisionModel", "ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"}
_AROUND = {
    "CLIPModel",
    "CLIPVisionModelWithProjection",
    "CLIPForImageClassification",
    "SiglipModel",
    "SiglipForImageClassification",
    "ViTForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
}
"""Models with one of these encoders as a child, which ask of its output neither a length nor places."""


class TransformersEncoder(EncoderAdapter):
    """`CLIPVisionModel`, `SiglipVisionModel`, `ViTModel`, `Dinov2Model` and `Dinov2WithRegistersModel`, alone or in a
    model of image and text, or with a head for classes."""

    family: ClassVar[str] = "CLIP, SigLIP, ViT and DINOv2 of transformers"

    @classmethod
    def find(cls, model: Any) -> nn.Module | None:
        if _TOWERS.intersection(class_names(model, "transformers")):
            return model
        if not _AROUND.intersection(class_names(model, "transformers")):
            return None
        return next(child for child in model.children() if _TOWERS.intersection(class_names(child, "transformers")))

    @property
    def layers(self) -> Sequence[nn.Module]:
        holder = getattr(self.tower, "encoder", self.tower)  # ViT has none
        return getattr(holder, "layers", None) or holder.layer

    def parts(self, layer: Any) -> LayerParts:
        names = _LAYERS[type(layer).__name__]
        return LayerParts(
            first_norm=getattr(layer, names.first_norm),
            attention=TransformersAttention(getattr(layer, names.attention)),
            second_norm=getattr(layer, names.second_norm),
            mlp=layer.mlp,
            end=getattr(layer, names.end),
        )

    @property
    def prefix_tokens(self) -> int:
        return int(self.has_cls) + getattr(self.tower.config, "num_register_tokens", 0)

    @property
    def has_cls(self) -> bool:
        return "SiglipVisionModel" not in class_names(self.tower, "transformers")

    @property
    def patch_embedding(self) -> nn.Module:
        embeddings = self.tower.embeddings
        return embeddings.patch_embedding if hasattr(embeddings, "patch_embedding") else embeddings.patch_embeddings

    @property
    def recomputes(self) -> bool:
        return any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers)
