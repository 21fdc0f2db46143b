# SPDX-License-Identifier: Apache-2.0
"""The processors of families that pack patches as Qwen-VL does, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import END, IMAGE, MERGE, PATCH, START, VIDEO, VIDEO_END, VIDEO_START

from .special_tokens import QWEN_TOKENS, tokenizer

_PATCHES = {"patch_size": PATCH, "merge_size": MERGE}
_GLM_TOKENS = {
    "image_token": ("<|image|>", IMAGE),
    "video_token": ("<|video|>", VIDEO),
    "image_start_token": ("<|begin_of_image|>", START),
    "image_end_token": ("<|end_of_image|>", END),
    "video_start_token": ("<|begin_of_video|>", VIDEO_START),
    "video_end_token": ("<|end_of_video|>", VIDEO_END),
}


def _sizes(least: int, most: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def _glm():
    images = hf.Glm46VImageProcessor(**_PATCHES, **_sizes(600, 4000))
    frames = hf.Glm46VVideoProcessor(**_PATCHES, **_sizes(300, 100_000), do_sample_frames=False)
    return hf.Glm46VProcessor(images, tokenizer(_GLM_TOKENS), frames)


def _paddleocr():
    return hf.PaddleOCRVLProcessor(
        hf.PaddleOCRVLImageProcessor(**_PATCHES, **_sizes(300, 2000)), tokenizer(QWEN_TOKENS)
    )


def _cosmos3_edge():
    images = hf.Cosmos3EdgeImageProcessor(**_PATCHES, **_sizes(300, 2000))
    frames = hf.Cosmos3EdgeVideoProcessor(**_PATCHES, **_sizes(300, 100_000), return_metadata=True)
    processor = hf.Cosmos3EdgeProcessor(images, tokenizer(QWEN_TOKENS), frames)
    processor.return_mm_token_type_ids = True  # its model needs them
    return processor


def _video_llama3():
    images = hf.VideoLlama3ImageProcessor(patch_size=PATCH, merge_size=1, **_sizes(300, 1000))
    frames = hf.VideoLlama3VideoProcessor(**_PATCHES, **_sizes(300, 100_000), use_token_compression=False)
    return hf.VideoLlama3Processor(images, tokenizer(QWEN_TOKENS), frames)


PROCESSORS: dict[str, Callable] = {
    "video_llama3": _video_llama3,
    "cosmos3_edge": _cosmos3_edge,
    "glm46v": _glm,
    "paddleocr_vl": _paddleocr,
}
WRITTEN: dict[str, dict[str, str]] = {
    "glm46v": {
        "image": "<|begin_of_image|><|image|><|end_of_image|>",
        "video": "<|begin_of_video|><|video|><|end_of_video|>",
    },
    "cosmos3_edge": {"image": "<|vision_start|><|image_pad|><|vision_end|>", "video": "<|video_pad|>"},
    "video_llama3": {"image": "<|image_pad|>", "video": "<|video_pad|>"},
    "paddleocr_vl": {"image": "<|vision_start|><|image_pad|><|vision_end|>"},
}
