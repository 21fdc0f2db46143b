# SPDX-License-Identifier: Apache-2.0
"""Tiny vision encoders with random weights, one for each class and option that sessions support."""

from __future__ import annotations

import functools
from collections.abc import Callable

import open_clip
import torch
import transformers
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer as OpenClipTransformer
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIDE, PATCH, WIDTH, HEADS, DEPTH = 24, 4, 32, 4, 4
PATCHES = (SIDE // PATCH) ** 2

_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
_TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
_TIMM = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": 2,
    "num_classes": 5,
}
_OPEN_CLIP = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "width": WIDTH,
    "layers": DEPTH,
    "heads": HEADS,
    "mlp_ratio": 2.0,
    "output_dim": 12,
}


def _transformers(name: str, **more) -> Callable[[], nn.Module]:
    def make():
        model = getattr(transformers, name)
        config = model.config_class
        if config in (transformers.CLIPConfig, transformers.SiglipConfig):
            return model(config(vision_config=_VISION, text_config=_TEXT, projection_dim=12, num_labels=5))
        return model(config(**_VISION, num_labels=5, **more))

    return make


def _timm(**more) -> Callable[[], nn.Module]:
    return lambda: VisionTransformer(**_TIMM | more)


def _open_clip(**more) -> Callable[[], nn.Module]:
    return lambda: OpenClipTransformer(**_OPEN_CLIP | more)


def _open_clip_model() -> nn.Module:
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": WIDTH // HEADS}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    return open_clip.CLIP(12, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


def _open_clip_timm() -> nn.Module:
    """SigLIP as open_clip builds it: a timm trunk without a CLS token, and attention pooling."""
    tower = TimmModel("vit_tiny_patch16_224", 12, pool="", proj="linear")
    tower.trunk = VisionTransformer(**_TIMM | {"num_classes": 0, "class_token": False, "global_pool": "map"})
    tower.head = nn.Linear(WIDTH, 12)
    return tower


_MAKERS: dict[str, Callable[[], nn.Module]] = {
    "clip": _transformers("CLIPVisionModel"),
    "clip-model": _transformers("CLIPModel"),
    "clip-projection": _transformers("CLIPVisionModelWithProjection"),
    "clip-classes": _transformers("CLIPForImageClassification"),
    "siglip": _transformers("SiglipVisionModel"),
    "siglip-model": _transformers("SiglipModel"),
    "siglip-classes": _transformers("SiglipForImageClassification"),
    "vit": _transformers("ViTModel"),
    "vit-classes": _transformers("ViTForImageClassification"),
    "dinov2": _transformers("Dinov2Model", drop_path_rate=0.1),
    "dinov2-swiglu": _transformers("Dinov2Model", use_swiglu_ffn=True),
    "dinov2-classes": _transformers("Dinov2ForImageClassification"),
    "dinov2-registers": _transformers("Dinov2WithRegistersModel", num_register_tokens=3),
    "dinov2-registers-classes": _transformers("Dinov2WithRegistersForImageClassification"),
    "timm": _timm(),
    "timm-options": _timm(init_values=0.1, qk_norm=True, reg_tokens=4, drop_path_rate=0.1, pre_norm=True),
    "timm-mean": _timm(global_pool="avg", class_token=False),
    "timm-mean-cls": _timm(global_pool="avg"),
    "timm-map": _timm(global_pool="map", class_token=False),
    "timm-distilled": lambda: VisionTransformerDistilled(**_TIMM),
    "open_clip": _open_clip(ls_init_value=0.1),
    "open_clip-mean": _open_clip(pool_type="avg", final_ln_after_pool=True),
    "open_clip-attention": _open_clip(attentional_pool=True, attn_pooler_queries=3, attn_pooler_heads=2),
    "open_clip-norms": _open_clip(qk_norm=True, scale_attn=True, scale_fc=True),
    "open_clip-model": _open_clip_model,
    "open_clip-timm": _open_clip_timm,
}
NAMES = list(_MAKERS)


def make(name: str, seed: int = 0) -> nn.Module:
    """A model with random weights, norms and LayerScale included."""
    torch.manual_seed(seed)
    model = _MAKERS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1 and parameter.shape[0] > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(noise * 0.2)
    return model


shared = functools.cache(make)


def pixels(images: int = 2, seed: int = 0) -> Tensor:
    """(images, 3, height, width)"""
    return torch.randn(images, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def encode(model: nn.Module, images: Tensor, **options) -> dict[str, Tensor]:
    """Everything that a model makes of images, by name."""
    if hasattr(model, "get_image_features"):
        output = model.get_image_features(pixel_values=images, **options)
    elif hasattr(model, "encode_image"):
        output = model.encode_image(images)
    else:
        output = model(images, **options)
    if torch.is_tensor(output):
        return {"output": output}
    if isinstance(output, tuple):
        return {str(i): value for i, value in enumerate(output)}
    return {name: value for name, value in output.items() if torch.is_tensor(value)}


__all__ = ["NAMES", "PATCHES", "encode", "make", "pixels", "shared"]
