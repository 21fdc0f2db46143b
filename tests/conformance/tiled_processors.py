# SPDX-License-Identifier: Apache-2.0
"""The processors of families that cut images into tiles, or resample them, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    ROW_COLUMN,
    START,
    TILE,
)
from vtprune.testing.tiny import step3p7

from .special_tokens import IMAGE_TOKENS, MOLMO_TOKENS, VIDEO_TOKENS, tokenizer

_IDEFICS2_TOKENS = {
    **IMAGE_TOKENS,
    "image_boundary_token": ("<fake_token_around_image>", BREAK),
    "end_of_utterance_token": ("<end_of_utterance>", ROW_COLUMN),
}
_OVIS_TOKENS = {
    "image_token": ("<IMG_ATOM>", IMAGE),
    "image_start_token": ("<IMG_START>", START),
    "image_grid_token": ("<IMG_GRID>", GLOBAL),
    "image_column_token": ("<IMG_COL>", BREAK),
    "image_row_token": ("<IMG_ROW>", NEWLINE),
    "image_end_token": ("<IMG_END>", END),
}
_LLAMA4_TOKENS = {
    "patch_token": ("<|patch|>", IMAGE),
    "image_start_token": ("<|image_start|>", START),
    "image_end_token": ("<|image_end|>", END),
    "image_token": ("<|image|>", GLOBAL),
    "tile_x_separator_token": ("<|tile_x_separator|>", BREAK),
    "tile_y_separator_token": ("<|tile_y_separator|>", ROW_COLUMN),
}
_GOT_TOKENS = {
    "image_token": ("<imgpad>", IMAGE),
    "image_start_token": ("<img>", START),
    "image_end_token": ("</img>", END),
    "message_start_token": ("<|im_start|>", BREAK),
    "message_end_token": ("<|im_end|>", GLOBAL),
}
_STEP_TOKENS = {
    "image_token": ("<im_patch>", IMAGE),
    "image_start_token": ("<im_start>", START),
    "image_end_token": ("<im_end>", END),
    "tile_start_token": ("<patch_start>", BREAK),
    "tile_end_token": ("<patch_end>", GLOBAL),
    "row_token": ("<patch_newline>", ROW_COLUMN),
}


def _square(size: int) -> dict[str, dict[str, int]]:
    return {"size": {"height": size, "width": size}}


def _idefics2():
    images = hf.Idefics2ImageProcessor(size={"longest_edge": TILE, "shortest_edge": 16}, do_image_splitting=False)
    return hf.Idefics2Processor(images, tokenizer(_IDEFICS2_TOKENS), image_seq_len=12)


def _deepseek_vl_hybrid():
    images = hf.DeepseekVLHybridImageProcessor(**_square(TILE), high_res_size={"height": 32, "width": 32}, min_size=4)
    return hf.DeepseekVLHybridProcessor(images, tokenizer(IMAGE_TOKENS), num_image_tokens=(TILE // PATCH) ** 2)


def _got_ocr2():
    images = hf.GotOcr2ImageProcessor(**_square(64))
    processor = hf.GotOcr2Processor(images, tokenizer(_GOT_TOKENS))
    processor.num_image_tokens = 16
    return processor


def _deepseek_ocr2():
    images = hf.DeepseekOcr2ImageProcessor(**_square(64), tile_size=64, min_patches=2, max_patches=3)
    # The model has 144 queries for views as small as these.
    return hf.DeepseekOcr2Processor(images, tokenizer(IMAGE_TOKENS), patch_size=1, downsample_ratio=64 / 12)


def _unlimited_ocr():
    images = hf.UnlimitedOcrImageProcessor(**_square(64), tile_size=32, min_patches=2, max_patches=6)
    return hf.UnlimitedOcrProcessor(images, tokenizer(IMAGE_TOKENS), patch_size=PATCH, downsample_ratio=4)


def _ovis2():
    images = hf.Ovis2ImageProcessor(**_square(TILE), crop_to_patches=True, max_patches=4)
    return hf.Ovis2Processor(images, tokenizer(_OVIS_TOKENS), image_seq_length=(TILE // PATCH // MERGE) ** 2)


def _llama4():
    images = hf.Llama4ImageProcessor(**_square(TILE), max_patches=4)
    return hf.Llama4Processor(images, tokenizer(_LLAMA4_TOKENS), patch_size=PATCH, pixel_shuffle_ratio=1 / MERGE)


def _perception_lm():
    images = hf.PerceptionLMImageProcessor(tile_size=TILE, max_num_tiles=4, vision_input_type="vanilla")
    frames = hf.PerceptionLMVideoProcessor(**_square(TILE))
    words = tokenizer(IMAGE_TOKENS | VIDEO_TOKENS)
    return hf.PerceptionLMProcessor(frames, images, words, patch_size=PATCH, pooling_ratio=MERGE)


def _step3p7():
    images = hf.Step3p7ImageProcessor(
        **_square(step3p7.WHOLE), patch_size=step3p7.TILE, vision_patch_size=PATCH, max_image_size=96
    )
    return hf.Step3p7Processor(images, tokenizer(_STEP_TOKENS))


def _molmo2():
    # Crops of 5x5 patches, of which neighbours share 2.
    shared = {**_square(5 * PATCH), "patch_size": PATCH}
    images = hf.Molmo2ImageProcessor(**shared, overlap_margins=[1, 1], max_crops=4, pooling_size=[2, 2])
    frames = hf.Molmo2VideoProcessor(**shared, pooling_size=[3, 3], num_frames=3)
    return hf.Molmo2Processor(images, frames, tokenizer(MOLMO_TOKENS))


PROCESSORS: dict[str, Callable] = {
    "idefics2": _idefics2,
    "deepseek_vl_hybrid": _deepseek_vl_hybrid,
    "got_ocr2": _got_ocr2,
    "deepseek_ocr2": _deepseek_ocr2,
    "unlimited_ocr": _unlimited_ocr,
    "ovis2": _ovis2,
    "llama4": _llama4,
    "perception_lm": _perception_lm,
    "step3p7": _step3p7,
    "molmo2": _molmo2,
}
"""Family -> its processor."""
WRITTEN: dict[str, dict[str, str]] = {
    "llama4": {"image": "<|image|>"},
    "got_ocr2": {"image": "<img><imgpad></img>"},
    "step3p7": {"image": "<im_patch>"},
    "molmo2": {"image": "<|image|>", "video": "<|video|>"},
}
