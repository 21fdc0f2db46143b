# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Phi-4-multimodal."""

from __future__ import annotations

import torch
import transformers as hf
from torch.nn.functional import pad

from vtprune.testing.configs import TEXT, VISION
from vtprune.testing.media import AUDIO, IMAGE, MERGE, PATCH, Item, Layout, flat, noise
from vtprune.testing.tiny.family import Family

_SIDE = 4
"""Of a crop, in patches."""


def _lay_mosaic(model, shape, siblings, generator):
    """The mosaic of crops without its padding, a separator, the whole view. shape: rows, columns of crops, and of those
    rows and columns of tokens that are no padding."""
    down, across, rows, columns = shape
    side = _SIDE // MERGE
    tokens = rows * (columns + 1) + 1 + side * (side + 1)
    return Item([IMAGE] * tokens, noise(generator, 1 + down * across, 3, _SIDE * PATCH, _SIDE * PATCH), shape)


def _collate(samples):
    items = flat(samples)
    most = max(len(item.pixels) for item in items)
    masks, sizes = [], []
    for item in items:
        down, across, rows, columns = item.shape
        real = torch.zeros(down * _SIDE, across * _SIDE)
        real[: rows * MERGE, : columns * MERGE] = 1
        crops = real.unflatten(0, (down, _SIDE)).unflatten(2, (across, _SIDE)).transpose(1, 2).flatten(0, 1)
        mask = torch.cat([torch.ones(1, _SIDE, _SIDE), crops])
        masks.append(pad(mask, (0, 0, 0, 0, 0, most - len(mask)), value=1))
        sizes.append((down * _SIDE * PATCH, across * _SIDE * PATCH))
    pixels = [pad(item.pixels, (0, 0, 0, 0, 0, 0, 0, most - len(item.pixels))) for item in items]
    return {
        "image_pixel_values": torch.stack(pixels),
        "image_sizes": torch.tensor(sizes),
        "image_attention_mask": torch.stack(masks),
    }


def _config(**text):
    side = _SIDE * PATCH
    return hf.Phi4MultimodalConfig(
        **TEXT | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4}) | text,
        original_max_position_embeddings=512,
        vision_config=hf.Phi4MultimodalVisionConfig(
            **VISION, image_size=side, crop_size=side, patch_size=PATCH, image_token_id=IMAGE
        ),
        audio_config=hf.Phi4MultimodalAudioConfig(
            hidden_size=16,
            intermediate_size=16,
            num_blocks=2,
            num_attention_heads=2,
            ext_pw_out_channel=16,
            depthwise_separable_out_channel=16,
            nemo_conv_channels=16,
            audio_token_id=AUDIO,
        ),
    )


# All have padding: with sdpa, transformers makes the encoder causal in calls without any.
_LAYOUTS = {"image": Layout(((1, 2, 2, 3), (1, 1, 2, 1), (2, 1, 4, 1), (2, 2, 3, 4)), _lay_mosaic, _collate)}

FAMILIES = {
    "phi4_multimodal": Family("Phi4MultimodalForCausalLM", _config, _LAYOUTS, attention_unread=True, kindred=True)
}
