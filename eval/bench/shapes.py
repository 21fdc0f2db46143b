# SPDX-License-Identifier: Apache-2.0
"""Published models by their shapes alone: built with random weights, fed with random pixels and ids, no hub needed.

A shape states what time and memory depend on: widths, depths, heads, and the number of tokens of an image. The content
of the tokens is random, so a selection means nothing, but its cost is real.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.config import nearest
from vtprune.errors import ConfigError
from vtprune.transformers_private import uninitialised


@dataclass(frozen=True)
class Shape:
    """A model, and the image that it is shown."""

    config: Mapping[str, Any]
    """arguments of `AutoConfig.for_model`, `model_type` included; other fields have transformers' defaults"""
    visual_tokens: int
    """of one image"""
    pixels: tuple[int, ...]
    """shape of the pixels of one image"""
    packed: bool = False
    """whether the pixels of several images are joined along their first axis instead of a new one"""
    per_image: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """further arguments of the model, one row an image"""
    typed: bool = False
    """whether the model takes `mm_token_type_ids`, which tell image tokens from text"""


CLIP_L_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_SO400M_384 = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_QWEN_VIT = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
}
_INTERN_VIT_300M = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "attention_bias": True,
}
_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
_QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
_CUT_CLS = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}

SHAPES: dict[str, Shape] = {
    "llava-1.5-7b": Shape(
        {"model_type": "llava", "vision_config": CLIP_L_336, "text_config": _VICUNA_7B, **_CUT_CLS},
        visual_tokens=576,
        pixels=(3, 336, 336),
    ),
    "llava-1.5-13b": Shape(
        {"model_type": "llava", "vision_config": CLIP_L_336, "text_config": _VICUNA_13B, **_CUT_CLS},
        visual_tokens=576,
        pixels=(3, 336, 336),
    ),
    # 672 x 672 pixels: the overview and four tiles; 48 rows of 48 tokens and a newline
    "llava-next-7b": Shape(
        {"model_type": "llava_next", "vision_config": CLIP_L_336, "text_config": _VICUNA_7B, **_CUT_CLS},
        visual_tokens=576 + 48 * 49,
        pixels=(5, 3, 336, 336),
        per_image={"image_sizes": (672, 672)},
    ),
    # 768 x 768 pixels: the overview and four tiles; 54 rows of 54 tokens and a newline
    "llava-onevision-7b": Shape(
        {
            "model_type": "llava_onevision",
            "vision_config": _SIGLIP_SO400M_384,
            "text_config": _QWEN2_7B | {"vocab_size": 152000},
        },
        visual_tokens=729 + 54 * 55,
        pixels=(5, 3, 384, 384),
        per_image={"image_sizes": (768, 768)},
    ),
    # 1008 x 1008 pixels: 72 x 72 patches, two by two merged
    "qwen2.5-vl-7b": Shape(
        {
            "model_type": "qwen2_5_vl",
            "vision_config": _QWEN_VIT,
            "text_config": {
                **_QWEN2_7B,
                "model_type": "qwen2_5_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            },
            "image_token_id": 151655,
            "video_token_id": 151656,
        },
        visual_tokens=36 * 36,
        pixels=(72 * 72, 3 * 2 * 14 * 14),
        packed=True,
        per_image={"image_grid_thw": (1, 72, 72)},
        typed=True,
    ),
    # four tiles and the thumbnail
    "internvl3-8b": Shape(
        {
            "model_type": "internvl",
            "vision_config": _INTERN_VIT_300M,
            "text_config": _QWEN2_7B | {"vocab_size": 151674},
            "tie_word_embeddings": False,
        },
        visual_tokens=5 * 256,
        pixels=(5, 3, 448, 448),
        packed=True,
    ),
    # no published model: for trying out a command
    "small": Shape(
        {
            "model_type": "llava",
            "vision_config": CLIP_L_336
            | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
            | {"image_size": 84},
            "text_config": _VICUNA_7B
            | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
            | {"num_attention_heads": 4},
            **_CUT_CLS,
        },
        visual_tokens=36,
        pixels=(3, 84, 84),
    ),
}
"""Name -> shape. Sizes from the models' published configurations; the image is one that fills its grid."""


def shape_of(name: str) -> Shape:
    """Raises ConfigError for a name that is not known."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}; {nearest(name, SHAPES)}")
    return SHAPES[name]


def build_model(shape: Shape, layers: int | None, dtype: str, attention: str, device: str) -> Any:
    """The model with random weights, in evaluation mode; `layers` (default all) of its decoder layers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    fields = dict(shape.config)
    if layers is not None:
        fields["text_config"] = dict(fields["text_config"], num_hidden_layers=layers)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    # Buffers (rotary frequencies) are computed while the model is made. Weights are not initialised.
    with torch.device(device), uninitialised():
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention
        )
    _fill(model, device)
    return model.eval()


_BLOCK = (1 << 22) + 15
"""Number of weights that are drawn; all matrices repeat them. It is not a multiple of a row, so that rows differ."""


@torch.no_grad()
def _fill(model: Any, device: str) -> None:
    """Gives every weight a value. To draw billions of numbers would take longer than the measurement."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.empty(_BLOCK, device=device).normal_(std=0.02, generator=generator)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0 if name.endswith("bias") else 1)
            continue
        flat = parameter.view(-1)
        for part in flat.split(_BLOCK):
            part.copy_(drawn[: len(part)])


def random_inputs(shape: Shape, model: Any, batch: int, text_tokens: int, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the model for `batch` prompts without padding: text, one image, text.

    Returns `input_ids` (batch, text_tokens + visual_tokens), the pixels, and what else the model takes.
    """
    generator = torch.Generator().manual_seed(seed)
    placeholder = model.config.image_token_id
    words = min(model.config.get_text_config().vocab_size, 1000)
    text = torch.randint(3, words, (batch, text_tokens), generator=generator)
    text[text == placeholder] = 3
    before, behind = text.tensor_split([text_tokens // 2], 1)
    visual = torch.full((batch, shape.visual_tokens), placeholder)
    ids = torch.cat([before, visual, behind], 1)
    pixels = torch.randn(batch, *shape.pixels, generator=generator).to(model.dtype)
    inputs = {"input_ids": ids, "pixel_values": pixels.flatten(0, 1) if shape.packed else pixels}
    inputs |= {name: torch.tensor([row] * batch) for name, row in shape.per_image.items()}
    if shape.typed:
        inputs["mm_token_type_ids"] = (ids == placeholder).long()
    return {name: value.to(model.device) for name, value in inputs.items()}
