# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the thinkers of Qwen-Omni."""

from __future__ import annotations

import transformers as hf

from vtprune.testing.configs import EXPERTS, MROPE, TEXT, WIDTH
from vtprune.testing.media import AUDIO, AUDIO_END, AUDIO_START, END, IMAGE, START, VIDEO, Layout, lay_patches
from vtprune.testing.tiny.family import Family
from vtprune.testing.tiny.qwen_vl import CLIPS, IMAGES, VISION_3, WINDOWS, collate_timed

_AUDIO = dict(encoder_layers=1, encoder_attention_heads=4, encoder_ffn_dim=48, d_model=WIDTH, output_dim=WIDTH)
_IDS = dict(
    vision_start_token_id=START,
    vision_end_token_id=END,
    audio_start_token_id=AUDIO_START,
    audio_end_token_id=AUDIO_END,
    position_id_per_seconds=3,
)


def _collate_omni(samples):
    """Videos of different frame rates, under another name than in Qwen2.5-VL."""
    arguments = collate_timed(samples)
    return arguments | {"video_second_per_grid": arguments.pop("second_per_grid_ts")}


_LAYOUTS = {"image": IMAGES, "video": Layout(CLIPS, lay_patches(VIDEO), _collate_omni)}

FAMILIES = {
    "qwen2_5_omni": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        lambda **text: hf.Qwen2_5OmniThinkerConfig(
            vision_config=WINDOWS,
            text_config=TEXT | MROPE | text,
            audio_config=_AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            audio_token_index=AUDIO,
            **_IDS,
        ),
        _LAYOUTS,
        kindred=True,
    ),
    "qwen3_omni": Family(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        lambda **text: hf.Qwen3OmniMoeThinkerConfig(
            vision_config=VISION_3 | dict(deepstack_visual_indexes=[0, 1, 2]),
            text_config=TEXT | MROPE | EXPERTS | dict(head_dim=8) | text,
            audio_config=_AUDIO | dict(downsample_hidden_size=8),
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            audio_token_id=AUDIO,
            **_IDS,
        ),
        _LAYOUTS,
        kindred=True,
    ),
}
