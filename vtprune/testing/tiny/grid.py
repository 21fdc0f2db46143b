# SPDX-License-Identifier: Apache-2.0
"""Tiny models of families with one grid, or one bag of tokens, an image or a tile."""

from __future__ import annotations

import torch
import transformers as hf
from torch.nn.functional import pad

from vtprune.testing.configs import TEXT, VISION, WIDTH, clip, llama, mistral, qwen2, siglip
from vtprune.testing.media import (
    BREAK,
    END,
    IMAGE,
    PAD,
    PATCH,
    START,
    TILE,
    Item,
    Layout,
    collate_tiles,
    flat,
    lay_square,
    noise,
    stack,
)
from vtprune.testing.tiny.family import Family

_LATENTS = 12
"""Tokens that a resampler makes of a tile."""
_MAP = (6, 4)
"""Rows and columns of FastVLM's last feature map."""


def _janus(**text):
    vision = dict(hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, mlp_ratio=1.5, projection_dim=WIDTH)
    codes = dict(
        num_embeddings=16,
        base_channels=32,
        channel_multiplier=[1, 1],
        latent_channels=8,
        projection_dim=WIDTH,
        image_token_embed_dim=WIDTH,
        num_res_blocks=1,
    )
    return hf.JanusConfig(
        vision_config=hf.JanusVisionConfig(**vision, image_size=TILE, patch_size=PATCH, num_image_tokens=36),
        vq_config=hf.JanusVQVAEConfig(**codes),
        text_config=llama(**text),
        image_token_id=IMAGE,
    )


def _hybrid(**text):
    high = hf.SamVisionConfig(
        **VISION, image_size=32, patch_size=4, mlp_dim=48, window_size=3, global_attn_indexes=[1, 3], output_channels=8
    )
    return hf.DeepseekVLHybridConfig(
        vision_config=siglip(TILE, PATCH), high_res_vision_config=high, text_config=llama(**text), image_token_id=IMAGE
    )


def _lay_twice(model, tokens, siblings, generator):
    """An image in two sizes."""
    low, high = model.config.vision_config.image_size, model.config.high_res_vision_config.image_size
    pixels = noise(generator, 3, low * low + high * high)
    return Item([IMAGE] * tokens, pixels)


def _collate_twice(samples):
    pixels = torch.stack([item.pixels for item in flat(samples)])
    low = TILE**2
    high = round((pixels.shape[-1] - low) ** 0.5)
    return {
        "pixel_values": pixels[..., :low].unflatten(-1, (TILE, TILE)),
        "high_res_pixel_values": pixels[..., low:].unflatten(-1, (high, high)),
    }


def _fast_vlm(**text):
    small = dict(embed_dims=(8, 8, 8, 32, 32), layers=(1, 1, 1, 1, 1), inference_mode=True)
    vision = hf.TimmWrapperConfig(architecture="fastvit_mci3", model_args=small, hidden_size=64, do_pooling=True)
    return hf.FastVlmConfig(vision_config=vision, text_config=qwen2(**text), image_token_index=IMAGE)


def _lay_map(model, shape, siblings, generator):
    """An image that becomes a feature map of (rows, columns)."""
    rows, columns = shape
    return Item([IMAGE] * (rows * columns), noise(generator, 3, 64 * rows, 64 * columns))


def _idefics2(**text):
    return hf.Idefics2Config(
        vision_config=dict(**VISION, image_size=TILE, patch_size=PATCH),
        perceiver_config=dict(
            hidden_size=WIDTH,
            resampler_n_latents=_LATENTS,
            resampler_depth=2,
            resampler_n_heads=4,
            resampler_head_dim=8,
            num_key_value_heads=2,
        ),
        text_config=mistral(**text),
        image_token_id=IMAGE,
    )


def _lay_marked(model, shape, siblings, generator):
    """Tiles of one size with a text token around each. shape: tiles, height, width."""
    tiles, *size = shape
    return Item([*[BREAK, *[IMAGE] * _LATENTS] * tiles, BREAK], noise(generator, tiles, 3, *size), tuple(size))


def _collate_padded(samples):
    """Tiles padded to the largest, and samples to the same number of tiles."""
    most = max(sum(len(item.pixels) for item in items) for items in samples)
    height, width = (max(item.shape[axis] for item in flat(samples)) for axis in (0, 1))
    none = torch.empty(0, 3, height, width)
    real = [
        [pad(item.pixels, (0, width - item.shape[1], 0, height - item.shape[0])) for item in items] for items in samples
    ]
    pixels = [torch.cat([none, *tiles]) for tiles in real]
    pixels = torch.stack([pad(tiles, (0, 0, 0, 0, 0, 0, 0, most - len(tiles))) for tiles in pixels])
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


def _aria(**text):
    experts = dict(intermediate_size=16, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=2)
    return hf.AriaConfig(
        vision_config=hf.Idefics3VisionConfig(**VISION, image_size=TILE, patch_size=PATCH),
        text_config=hf.AriaTextConfig(**TEXT | experts | text),
        projector_patch_to_query_dict={(TILE // PATCH) ** 2: _LATENTS},
        image_token_index=IMAGE,
        pad_token_id=PAD,
    )


def _lay_bags(model, tiles, siblings, generator):
    """Tiles side by side; below the last one there is padding."""
    pixels = noise(generator, tiles, 3, TILE, TILE)
    pixels[-1, :, 2 * TILE // 3 :] = 0
    return Item([IMAGE] * (_LATENTS * tiles), pixels)


def _collate_masked(samples):
    pixels = collate_tiles(samples)["pixel_values"]
    return {"pixel_values": pixels, "pixel_mask": (pixels != 0).any(1).long()}


def _one_grid(tokens: int, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> dict[str, Layout]:
    return {"image": Layout((tokens,) * 4, lay_square(before, after), stack("pixel_values"))}


FAMILIES = {
    "vipllava": Family(
        "VipLlavaForConditionalGeneration",
        lambda **text: hf.VipLlavaConfig(
            vision_config=clip(42, 7),
            text_config=llama(**text),
            image_token_index=IMAGE,
            vision_feature_layers=[-2, -4, 1],
        ),
        _one_grid(36),
    ),
    "deepseek_vl": Family(
        "DeepseekVLForConditionalGeneration",
        lambda **text: hf.DeepseekVLConfig(
            vision_config=siglip(TILE, PATCH), text_config=llama(**text), image_token_id=IMAGE
        ),
        _one_grid(36),
        kindred=True,
    ),
    "deepseek_vl_hybrid": Family(
        "DeepseekVLHybridForConditionalGeneration",
        _hybrid,
        {"image": Layout((36,) * 4, _lay_twice, _collate_twice)},
        kindred=True,
    ),
    "janus": Family("JanusForConditionalGeneration", _janus, _one_grid(36, (START,), (END,)), kindred=True),
    "fast_vlm": Family(
        "FastVlmForConditionalGeneration",
        _fast_vlm,
        {"image": Layout((_MAP,) * 4, _lay_map, stack("pixel_values"))},
        package="timm",
        kindred=True,
    ),
    "idefics2": Family(
        "Idefics2ForConditionalGeneration",
        _idefics2,
        {"image": Layout(((1, 24, 20), (2, 16, 24), (1, 24, 24), (3, 20, 12)), _lay_marked, _collate_padded)},
        kindred=True,
    ),
    "aria": Family(
        "AriaForConditionalGeneration",
        _aria,
        {"image": Layout((2, 1, 3, 2), _lay_bags, _collate_masked)},
        kindred=True,
    ),
}
