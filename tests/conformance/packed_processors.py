# SPDX-License-Identifier: Apache-2.0
"""The processors of families that pack patches as Qwen-VL does, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import (
    AUDIO,
    END,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    ROW_COLUMN,
    START,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
)

from .special_tokens import IMAGE_TOKENS, QWEN_TOKENS, VIDEO_TOKENS, tokenizer

_PATCHES = {"patch_size": PATCH, "merge_size": MERGE}
_GLM_TOKENS = {
    "image_token": ("<|image|>", IMAGE),
    "video_token": ("<|video|>", VIDEO),
    "image_start_token": ("<|begin_of_image|>", START),
    "image_end_token": ("<|end_of_image|>", END),
    "video_start_token": ("<|begin_of_video|>", VIDEO_START),
    "video_end_token": ("<|end_of_video|>", VIDEO_END),
}

_KIMI_TOKENS = {
    "image_token": ("<|media_pad|>", IMAGE),
    "video_token": ("<|kimi_k25_video_placeholder|>", VIDEO),
    "media_begin_token": ("<|media_begin|>", START),
    "media_content_token": ("<|media_content|>", ROW_COLUMN),
    "media_end_token": ("<|media_end|>", END),
}
_MUSE_TOKENS = {
    "image_token": ("<|patch|>", IMAGE),
    "video_token": ("<|video|>", VIDEO),
    "image_start_token": ("<|image_start|>", START),
    "image_end_token": ("<|image_end|>", END),
    "video_start_token": ("<|vid_start|>", VIDEO_START),
    "video_end_token": ("<|vid_end|>", VIDEO_END),
    "separator_token": ("<|vid_frame_separator|>", NEWLINE),
}
_DOTS_TOKENS = {
    "image_token": ("<|imgpad|>", IMAGE),
    "video_token": ("<|video_pad|>", VIDEO),
    "audio_token": ("<|audio_comp_pad|>", AUDIO),
    "image_start_token": ("<|img|>", START),
    "image_end_token": ("<|endofimg|>", END),
}
_NEMOTRON_TOKENS = {
    **IMAGE_TOKENS,
    **VIDEO_TOKENS,
    "image_start_token": ("<img>", START),
    "image_end_token": ("</img>", END),
}
_ERNIE_TOKENS = {
    "image_token": ("<|IMAGE_PLACEHOLDER|>", IMAGE),
    "image_start_token": ("<|IMAGE_START|>", START),
    "image_end_token": ("<|IMAGE_END|>", END),
    "video_token": ("<|VIDEO_PLACEHOLDER|>", VIDEO),
    "video_start_token": ("<|VIDEO_START|>", VIDEO_START),
    "video_end_token": ("<|VIDEO_END|>", VIDEO_END),
}


def _sizes(least: int, most: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": least, "longest_edge": most}}


def _glm():
    images = hf.Glm46VImageProcessor(**_PATCHES, **_sizes(600, 4000))
    frames = hf.Glm46VVideoProcessor(**_PATCHES, **_sizes(300, 100_000), do_sample_frames=False)
    return hf.Glm46VProcessor(images, tokenizer(_GLM_TOKENS), frames)


def _glm5_next():
    images = hf.Glm5NextImageProcessor(**_PATCHES, **_sizes(600, 4000))
    frames = hf.Glm5NextVideoProcessor(**_PATCHES, **_sizes(300, 100_000), do_sample_frames=False)
    return hf.Glm5NextProcessor(images, tokenizer(_GLM_TOKENS), frames)


def _kimi_k25():
    images = hf.Kimi_K25ImageProcessor(**_PATCHES, max_patches=150)
    frames = hf.Kimi_K25VideoProcessor(**_PATCHES, do_sample_frames=False)
    return hf.Kimi_K25Processor(images, tokenizer(_KIMI_TOKENS), frames)


def _muse():
    images = hf.MuseGlimmerImageProcessor(**_PATCHES, max_image_tokens=20)
    frames = hf.MuseGlimmerVideoProcessor(**_PATCHES, return_metadata=True, do_sample_frames=False)
    return hf.MuseGlimmerProcessor(images, frames, tokenizer(_MUSE_TOKENS))


def _like_qwen(name: str) -> Callable:
    def make():
        images = hf.Qwen2VLImageProcessor(**_PATCHES, **_sizes(300, 2000))
        frames = hf.Qwen2VLVideoProcessor(**_PATCHES, **_sizes(300, 100_000), cap_pixels_per_frame=False)
        return getattr(hf, name)(images, tokenizer(QWEN_TOKENS), frames)

    return make


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


def _lfm3_vl():
    images = hf.Qwen2VLImageProcessor(**_PATCHES, **_sizes(300, 2000))
    frames = hf.Qwen3VLVideoProcessor(**_PATCHES, **_sizes(300, 2000), cap_pixels_per_frame=False)
    return hf.Lfm3VlProcessor(images, tokenizer(QWEN_TOKENS), frames)


def _dots3_note():
    images = hf.Qwen2VLImageProcessor(**_PATCHES, temporal_patch_size=1, **_sizes(300, 2000))
    frames = hf.Qwen3VLVideoProcessor(**_PATCHES, temporal_patch_size=1, **_sizes(300, 4000))
    return hf.Dots3NoteProcessor(images, tokenizer(_DOTS_TOKENS), frames, hf.Dots3NoteFeatureExtractor())


def _hy_v4_vl():
    images = hf.HYV4VLImageProcessor(**_PATCHES, **_sizes(300, 2000))
    frames = hf.HYV4VLVideoProcessor(**_PATCHES, **_sizes(300, 20_000))
    return hf.HYV4VLProcessor(images, tokenizer(QWEN_TOKENS), frames)


def _nemotron():
    patches = {"patch_size": PATCH, "downsample_ratio": 1 / MERGE}
    normal = {"norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
    return hf.NemotronH_Omni_Reasoning_V3Processor(
        hf.NemotronH_Omni_Reasoning_V3ImageProcessor(**patches, min_num_patches=16, max_num_patches=100),
        hf.NemotronH_Omni_Reasoning_V3VideoProcessor(**patches, **normal, video_target_num_patches=24),
        tokenizer(_NEMOTRON_TOKENS),
        hf.ParakeetFeatureExtractor(),
    )


def _ernie4_5_vl():
    # It would write times onto frames, with a font that checkpoints bring along.
    few = {"min_frames": 2, "max_frames": 8}
    frames = hf.Ernie4_5_VLMoeVideoProcessor(**_PATCHES, **_sizes(300, 2000), **few, draw_on_frames=False)
    images = hf.Ernie4_5_VLMoeImageProcessor(**_PATCHES, **_sizes(300, 2000))
    return hf.Ernie4_5_VLMoeProcessor(images, tokenizer(_ERNIE_TOKENS), frames)


PROCESSORS: dict[str, Callable] = {
    "video_llama3": _video_llama3,
    "cosmos3_edge": _cosmos3_edge,
    "glm46v": _glm,
    "lfm3_vl": _lfm3_vl,
    "dots3_note": _dots3_note,
    "hy_v4_vl": _hy_v4_vl,
    "paddleocr_vl": _paddleocr,
    "glm5_next": _glm5_next,
    "kimi_k25": _kimi_k25,
    "muse_glimmer": _muse,
    "exaone4_5": _like_qwen("Exaone4_5_Processor"),
    "hyperclovax_vision_v2": _like_qwen("HyperCLOVAXVisionV2Processor"),
    "nemotron_h_omni": _nemotron,
    "ernie4_5_vl": _ernie4_5_vl,
}
_GLM = {
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
    "video": "<|begin_of_video|><|video|><|end_of_video|>",
}
_QWEN = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}
WRITTEN: dict[str, dict[str, str]] = {
    "glm46v": _GLM,
    "glm5_next": _GLM,
    "kimi_k25": {
        "image": "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>",
        "video": "<|kimi_k25_video_placeholder|>",
    },
    "muse_glimmer": {"image": "<|patch|>", "video": "<|video|>"},
    "exaone4_5": {**_QWEN, "video": "<|vision_start|><|video_pad|><|vision_end|>"},
    "lfm3_vl": {**_QWEN, "video": "<|video_pad|>"},
    "dots3_note": {
        "image": "<|img|><|imgpad|><|endofimg|>",
        "video": "<|img|><|video_pad|><|endofimg|>",
    },
    "hy_v4_vl": {**_QWEN, "video": "<|vision_start|><|video_pad|><|vision_end|>"},
    "hyperclovax_vision_v2": {**_QWEN, "video": "<|vision_start|><|video_pad|><|vision_end|>"},
    "cosmos3_edge": {"image": "<|vision_start|><|image_pad|><|vision_end|>", "video": "<|video_pad|>"},
    "video_llama3": {"image": "<|image_pad|>", "video": "<|video_pad|>"},
    "ernie4_5_vl": {
        "image": "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>",
        "video": "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>",
    },
    "paddleocr_vl": {"image": "<|vision_start|><|image_pad|><|vision_end|>"},
}
