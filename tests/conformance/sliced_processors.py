# SPDX-License-Identifier: Apache-2.0
"""The processors of LFM2-VL, the MiniCPM-Vs and FastVLM, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import (
    AUDIO,
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    PATCH,
    ROW_COLUMN,
    START,
    TILE,
    VIDEO,
)

from .special_tokens import IMAGE_TOKENS, tokenizer

_LFM_TOKENS = {
    **IMAGE_TOKENS,
    "image_start_token": ("<|image_start|>", START),
    "image_end_token": ("<|image_end|>", END),
    "image_thumbnail_token": ("<|img_thumbnail|>", GLOBAL),
} | {
    f"row_{row}_col_{col}": (f"<|img_row_{row}_col_{col}|>", 120 + 6 * row + col)
    for row in (1, 2, 3)
    for col in (1, 2, 3)
}
_MINICPM_TOKENS = {
    "image_token": ("<|image_pad|>", IMAGE),
    "video_token": ("<|video_pad|>", VIDEO),
    "image_start_token": ("<image>", START),
    "image_end_token": ("</image>", END),
    "slice_start_token": ("<slice>", BREAK),
    "slice_end_token": ("</slice>", ROW_COLUMN),
    "image_id_start_token": ("<image_id>", GLOBAL),
    "image_id_end_token": ("</image_id>", AUDIO),
}


def _lfm2_vl():
    images = hf.Lfm2VlImageProcessor(
        encoder_patch_size=PATCH,
        downsample_factor=MERGE,
        tile_size=TILE,
        max_tiles=3,
        min_image_tokens=4,
        max_image_tokens=12,
        max_pixels_tolerance=1.9,
    )
    return hf.Lfm2VlProcessor(images, tokenizer(_LFM_TOKENS))


def _minicpm(name: str, media: str, side: int) -> Callable:
    """media: whose image and video processor it takes. side: of a slice, in pixels."""
    sizes = {"scale_resolution": side, "patch_size": PATCH, "max_slice_nums": 4}

    def make():
        images = getattr(hf, f"{media}ImageProcessor")(**sizes)
        frames = getattr(hf, f"{media}VideoProcessor")(**sizes, slice_mode=False, do_sample_frames=False)
        return getattr(hf, f"{name}Processor")(images, frames, tokenizer(_MINICPM_TOKENS))

    return make


def _fast_vlm():
    images = hf.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 256, "width": 256})
    return hf.LlavaProcessor(images, tokenizer(IMAGE_TOKENS), patch_size=64, vision_feature_select_strategy="full")


PROCESSORS: dict[str, Callable] = {
    "lfm2_vl": _lfm2_vl,
    "minicpmv4_6": _minicpm("MiniCPMV4_6", "MiniCPMV4_6", 64),
    "minicpmv4_7": _minicpm("MiniCPMV4_7", "MiniCPMV4_6", 64),
    "minicpm_ocr": _minicpm("MiniCPMOcr", "MiniCPMOcr", 32),
    "fast_vlm": _fast_vlm,
}
"""Family -> its processor."""
_MINICPM = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
WRITTEN: dict[str, dict[str, str]] = dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), _MINICPM)
