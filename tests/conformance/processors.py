# SPDX-License-Identifier: Apache-2.0
"""The processor of each family, as transformers has it, for the models of `families`, and requests to call it with."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image

from vtprune.testing import families
from vtprune.testing.media import MERGE, PATCH, TILE

from . import gemma_processors as gemma
from . import grid_processors as grid
from . import packed_processors as packed
from . import sliced_processors as sliced
from . import tiled_processors as tiled
from .special_tokens import (
    AYA_TOKENS,
    COHERE_TOKENS,
    GEMMA_TOKENS,
    HUNYUAN_TOKENS,
    IDEFICS_TOKENS,
    IMAGE_TOKENS,
    INTERN_TOKENS,
    PIXTRAL_TOKENS,
    QWEN_TOKENS,
    VIDEO_TOKENS,
    tokenizer,
)

# -- processors -------------------------------------------------------------------------------------------------------


def _square(size: int) -> dict[str, dict[str, int]]:
    return {"size": {"height": size, "width": size}}


def _cropped(size: int) -> dict[str, dict[str, int]]:
    return {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}


def _clip_tokens(patch: int) -> dict:
    return {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _llava():
    return hf.LlavaProcessor(hf.CLIPImageProcessor(**_cropped(42)), tokenizer(IMAGE_TOKENS), **_clip_tokens(7))


def _llava_next():
    tiles = hf.LlavaNextImageProcessor(**_cropped(TILE), image_grid_pinpoints=_pinpoints("llava_next"))
    return hf.LlavaNextProcessor(tiles, tokenizer(IMAGE_TOKENS), **_clip_tokens(8))


def _llava_next_video():
    tiles = hf.LlavaNextImageProcessor(**_cropped(32), image_grid_pinpoints=_pinpoints("llava_next_video"))
    frames = hf.LlavaNextVideoVideoProcessor(**_cropped(32))
    return hf.LlavaNextVideoProcessor(frames, tiles, tokenizer(IMAGE_TOKENS | VIDEO_TOKENS), **_clip_tokens(8))


def _llava_onevision():
    tiles = hf.LlavaOnevisionImageProcessor(**_square(TILE), image_grid_pinpoints=_pinpoints("llava_onevision"))
    return hf.LlavaOnevisionProcessor(
        tiles,
        tokenizer(IMAGE_TOKENS | VIDEO_TOKENS),
        hf.LlavaOnevisionVideoProcessor(**_square(TILE)),
        num_image_tokens=(TILE // 8) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def _video_llava():
    images, frames = hf.VideoLlavaImageProcessor(**_cropped(32)), hf.VideoLlavaVideoProcessor(**_cropped(32))
    return hf.VideoLlavaProcessor(images, frames, tokenizer(IMAGE_TOKENS | VIDEO_TOKENS), **_clip_tokens(8))


def _qwen(processor: type, videos: type) -> Callable:
    patches = {"patch_size": PATCH, "merge_size": MERGE, "size": {"shortest_edge": 300, "longest_edge": 2000}}
    frames = videos(**patches, cap_pixels_per_frame=False)
    return lambda: processor(hf.Qwen2VLImageProcessor(**patches), tokenizer(QWEN_TOKENS), frames)


def _internvl():
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(**_square(TILE), max_patches=4),
        tokenizer(INTERN_TOKENS),
        hf.InternVLVideoProcessor(**_square(TILE)),
        image_seq_length=(TILE // PATCH // MERGE) ** 2,
    )


def _idefics3():
    tiles = hf.Idefics3ImageProcessor(size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE})
    return hf.Idefics3Processor(tiles, tokenizer(IDEFICS_TOKENS), image_seq_len=(TILE // PATCH // MERGE) ** 2)


def _granite4_vision():
    tiles = hf.LlavaNextImageProcessor(**_cropped(32), image_grid_pinpoints=_pinpoints("granite4_vision"))
    return hf.Granite4VisionProcessor(
        tiles, tokenizer(IMAGE_TOKENS), patch_size=4, vision_feature_select_strategy="full", downsample_rate="2/4"
    )


def _granite_docling():
    tiles = hf.GraniteDoclingImageProcessor(**_square(TILE), max_patches=2)  # rows and columns that have tokens
    return hf.GraniteDoclingProcessor(tiles, tokenizer(IDEFICS_TOKENS), image_seq_len=(TILE // PATCH // MERGE) ** 2)


def _gemma3():
    return hf.Gemma3Processor(hf.Gemma3ImageProcessor(**_square(32)), tokenizer(GEMMA_TOKENS), image_seq_length=16)


def _paligemma():
    images = hf.SiglipImageProcessor(**_square(35))
    images.image_seq_length = 25
    return hf.PaliGemmaProcessor(images, tokenizer(IMAGE_TOKENS))


def _pixtral(merge: int) -> Callable:
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=PATCH)
    return lambda: hf.PixtralProcessor(images, tokenizer(PIXTRAL_TOKENS), patch_size=PATCH, spatial_merge_size=merge)


def _lighton_ocr():
    images = hf.PixtralImageProcessor(size={"longest_edge": 56}, patch_size=PATCH)
    return hf.LightOnOcrProcessor(images, tokenizer(PIXTRAL_TOKENS), patch_size=PATCH, spatial_merge_size=MERGE)


def _aya_vision():
    tiles = hf.GotOcr2ImageProcessor(**_square(TILE), max_patches=4)
    return hf.AyaVisionProcessor(
        tiles, tokenizer(AYA_TOKENS), patch_size=PATCH, img_size=TILE, downsample_factor=MERGE, image_token="<image>"
    )


def _cohere2_vision():
    tiles = hf.Cohere2VisionImageProcessor(**_square(TILE), max_patches=4, patch_size=TILE // PATCH // MERGE)
    return hf.Cohere2VisionProcessor(tiles, tokenizer(COHERE_TOKENS))


def _hunyuan_vl():
    images = hf.HunYuanVLImageProcessor(
        patch_size=PATCH, merge_size=MERGE, size={"shortest_edge": 300, "longest_edge": 2000}
    )
    return hf.HunYuanVLProcessor(images, tokenizer(HUNYUAN_TOKENS))


def _pinpoints(name: str) -> list[list[int]]:
    return families.shared(name).config.image_grid_pinpoints


_PROCESSORS: dict[str, Callable] = {
    "llava": _llava,
    "pixtral": _pixtral(1),
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "video_llava": _video_llava,
    "qwen2_vl": _qwen(hf.Qwen2VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen2_5_vl": _qwen(hf.Qwen2_5_VLProcessor, hf.Qwen2VLVideoProcessor),
    "qwen3_vl": _qwen(hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor),
    "internvl": _internvl,
    "idefics3": _idefics3,
    "granite4_vision": _granite4_vision,
    "granite_docling": _granite_docling,
    "gemma3": _gemma3,
    "paligemma": _paligemma,
    "paligemma2": _paligemma,
    "mistral3": _pixtral(MERGE),
    "lighton_ocr": _lighton_ocr,
    "aya_vision": _aya_vision,
    "cohere2_vision": _cohere2_vision,
    "hunyuan_vl": _hunyuan_vl,
    **packed.PROCESSORS,
    **grid.PROCESSORS,
    **tiled.PROCESSORS,
    **sliced.PROCESSORS,
    **gemma.PROCESSORS,
}

# -- requests ---------------------------------------------------------------------------------------------------------

# Placeholders as people, or chat templates, write them.
_DEFAULT = {"image": "<image>", "video": "<video>"}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
_WRITTEN: dict[str, dict[str, str]] = {
    "pixtral": {"image": "[IMG]"},
    "mistral3": {"image": "[IMG]"},
    "lighton_ocr": {"image": "[IMG]"},
    "hunyuan_vl": {"image": "<image_start><image><image_end>"},
    "internvl": {"image": "<IMG_CONTEXT>", "video": "<video>"},
    "gemma3": {"image": "<start_of_image>"},
    "qwen2_vl": {"image": _QWEN_IMAGE, "video": _QWEN_VIDEO},
    "qwen2_5_vl": {"image": _QWEN_IMAGE, "video": _QWEN_VIDEO},
    "qwen3_vl": {"image": _QWEN_IMAGE, "video": "<|video_pad|>"},
    **packed.WRITTEN,
    **tiled.WRITTEN,
    **sliced.WRITTEN,
    **gemma.WRITTEN,
    **grid.WRITTEN,
}


@dataclass(frozen=True)
class Request:
    """One prompt with its media."""

    text: str
    """with {image} and {video} for the media"""
    images: tuple[tuple[int, int], ...] = ()
    """width and height of each"""
    videos: tuple[tuple[int, int, int], ...] = ()
    """frames, width and height of each"""


@dataclass(frozen=True)
class Case:
    """A family, the requests of a batch, and how its processor is called with them."""

    family: str
    requests: tuple[Request, ...]
    nested: bool = False
    """whether images come as a list a prompt; some processors tell by this which images belong together"""
    fps: float | None = None
    """of videos that come as one array with metadata; None: as lists of images"""
    options: dict[str, Any] = field(default_factory=dict)
    """further arguments of the call"""

    def inputs(self, *numbers: int, **options) -> hf.BatchFeature:
        """What the processor makes of some of the requests."""
        requests = [self.requests[number] for number in numbers]
        text = [request.text.format(**_WRITTEN.get(self.family, _DEFAULT)) for request in requests]
        images = [[picture(*size) for size in request.images] for request in requests]
        videos = [[picture(*size, i) for i in range(count)] for request in requests for count, *size in request.videos]
        media: dict[str, Any] = {}
        if any(images):
            media["images"] = images if self.nested else [image for own in images for image in own]
        if videos:
            media["videos"] = videos
        if videos and self.fps is not None:
            media["videos"] = [np.stack([np.asarray(frame) for frame in video]) for video in videos]
            media["video_metadata"] = [{"fps": self.fps, "total_num_frames": len(video)} for video in videos]
        return processor(self.family)(text=text, **media, return_tensors="pt", **self.options, **options).to(
            torch.float32
        )


ALIKE = {
    "smolvlm": "idefics3",
    "cohere_compass": "qwen3_vl",
    "qwen3_vl_moe": "qwen3_vl",
    "qwen3_5": "qwen3_vl",
    "qwen3_5_moe": "qwen3_vl",
    "qwen2_5_omni": "qwen2_5_vl",
    "qwen3_omni": "qwen2_5_vl",
    "internvl_gpt_oss": "internvl",
    "qianfan_ocr": "internvl",
    "ministral3": "mistral3",
    "glm4v_moe": "glm46v",
    "glm_ocr": "glm46v",
    "cosmos3_omni": "qwen3_vl",
    "vipllava": "llava",
    "qwen4_exp": "qwen3_vl",
    "mistral_small4": "mistral3",
    "mistral_large4": "mistral3",
    "muse_spark": "muse_glimmer",
    "gemma4_31b": "gemma4",
    "gemma4_experts": "gemma4",
}
"""Family -> the family whose processor it has, or one that lays out images and videos in the same way."""

MISSING: dict[str, str] = {
    "aria": "its image processor makes tiles of 490 or 980 pixels only, far too many for a tiny model",
    "phi4_multimodal": "it counts 272 tokens for the whole view whatever its size, far too many for a tiny model",
}
"""Family -> why its processor is not here."""

_UNDRAWN = (
    *("idefics2", "deepseek_ocr2"),  # their tokens stand for no place
    *("deepseek_vl_hybrid", "step3p7"),  # convolutions mix what tokens see
    "got_ocr2",  # its processor takes no lists of several images, as pages hand them over
    "unlimited_ocr",  # its adapter gives pixels in no order of pictures
    *("llama4", "ovis2", "perception_lm", "glm5_next"),  # it fails, and was not looked into
    "fuyu",  # its tokens have no grid
)
"""Families whose processor is here, but of whose images the tests draw no pictures."""


FAMILIES = tuple(name for name in families.NAMES if (name in _PROCESSORS or name in ALIKE) and name not in _UNDRAWN)
"""Families whose processor, or one like it, is here, and of whose images pictures are drawn."""


@functools.cache
def processor(family: str) -> hf.ProcessorMixin:
    return _PROCESSORS[family]()


def picture(width: int, height: int, number: int = 0) -> Image.Image:
    """Coarse noise, the same for the same arguments."""
    pixels = np.random.default_rng([width, height, number]).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


_NO_MEDIA = Request("who are you ?")
_IMAGES = (
    Request("look : {image} what is in this picture ?", ((50, 31),)),
    Request("compare {image} and {image} which one is bigger ? answer with a word", ((23, 60), (41, 41))),
    _NO_MEDIA,
)
_IMAGES_FIRST = (  # and in every prompt, as PaliGemma has it
    Request("{image}what is in this picture ?", ((50, 31),)),
    Request("{image}{image}which one is bigger ? answer with a word", ((23, 60), (41, 41))),
)
_LARGE_IMAGES = (
    Request("look : {image} what is in this picture ?", ((110, 62),)),
    Request("compare {image} and {image} which one is bigger ? answer with a word", ((41, 92), (50, 50))),
    _NO_MEDIA,
)
_IMAGES_ALWAYS = (
    *_IMAGES[:2],
    Request("{image} who is this ?", ((30, 52),)),
)
_ONE_IMAGE = (
    Request("{image}what is in this picture ?", ((50, 31),)),
    Request("{image}who is this ? answer with a word", ((23, 60),)),
    Request("{image}who ?", ((30, 20),)),
)
_VIDEOS = (
    Request("{video} what happens ?", (), ((8, 33, 24),)),
    Request("look : {video} then {video} compare the two . what happens first ?", (), ((8, 20, 44), (12, 30, 30))),
    _NO_MEDIA,
)
_ONE_VIDEO = (
    Request("{video} what happens ?", (), ((8, 33, 24),)),
    Request("look : {video} now tell me what happens first ?", (), ((6, 20, 44),)),
    _NO_MEDIA,
)
_MIXED = (
    Request("{image} who is this ? {video} what happens ?", ((50, 31),), ((4, 33, 24),)),
    Request("look : {video} is this {image} in there ?", ((23, 60),), ((7, 20, 44),)),
    _NO_MEDIA,
)
# Where videos are stacked.
_MIXED_4 = (
    _MIXED[0],
    Request("look : {video} now tell me is this {image} in there ?", ((23, 60),), ((4, 20, 44),)),
    _NO_MEDIA,
)
# Where a frame has many tokens.
_MIXED_SHORT = (
    Request("{image} who is this ? {video} what happens ?", ((50, 31),), ((2, 33, 24),)),
    Request("look : {video} is this {image} in there ?", ((23, 60),), ((3, 20, 44),)),
    _NO_MEDIA,
)
_PAN_AND_SCAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 12,
    "pan_and_scan_max_num_crops": 3,
    "pan_and_scan_min_ratio_to_activate": 1.3,
}

CASES: dict[str, Case] = {
    "llava": Case("llava", _IMAGES),
    "pixtral": Case("pixtral", _IMAGES),
    "llava_next": Case("llava_next", _IMAGES),
    "llava_next_video": Case("llava_next_video", _MIXED_4),
    "llava_onevision": Case("llava_onevision", _IMAGES),
    "llava_onevision, nested": Case("llava_onevision", _IMAGES, nested=True),
    "llava_onevision, videos": Case("llava_onevision", _MIXED_4),
    "video_llava": Case("video_llava", _MIXED_4),
    "qwen2_vl": Case("qwen2_vl", _MIXED),
    "qwen2_5_vl": Case("qwen2_5_vl", _MIXED),
    "qwen2_5_vl, videos": Case("qwen2_5_vl", _VIDEOS, fps=4.0, options={"fps": 2.0, "do_sample_frames": True}),
    "qwen3_vl": Case("qwen3_vl", _MIXED, options={"do_sample_frames": False}),
    "qwen3_vl, videos": Case("qwen3_vl", _VIDEOS, fps=4.0),
    "internvl": Case("internvl", _IMAGES),
    "internvl, videos": Case("internvl", _MIXED_4),
    "idefics3": Case("idefics3", _IMAGES),
    "granite4_vision": Case("granite4_vision", _IMAGES),
    "granite_docling": Case("granite_docling", _IMAGES),
    "gemma3": Case("gemma3", _IMAGES, nested=True),
    "gemma3, crops": Case("gemma3", _IMAGES, nested=True, options=_PAN_AND_SCAN),
    "paligemma": Case("paligemma", _IMAGES_FIRST),
    "paligemma2": Case("paligemma2", _IMAGES_FIRST),
    "mistral3": Case("mistral3", _IMAGES),
    "lighton_ocr": Case("lighton_ocr", _IMAGES),
    "aya_vision": Case("aya_vision", _IMAGES),
    "cohere2_vision": Case("cohere2_vision", _IMAGES),
    "idefics2": Case("idefics2", _IMAGES),
    "deepseek_vl_hybrid": Case("deepseek_vl_hybrid", _IMAGES),
    "got_ocr2": Case("got_ocr2", _IMAGES_ALWAYS, options={"num_image_tokens": 16}),
    "deepseek_ocr2": Case("deepseek_ocr2", _IMAGES),
    "unlimited_ocr": Case("unlimited_ocr", _IMAGES),
    "ovis2": Case("ovis2", _IMAGES),
    "llama4": Case("llama4", _IMAGES),
    "perception_lm": Case("perception_lm", _IMAGES),
    "step3p7": Case("step3p7", _IMAGES),
    "glm5_next": Case("glm5_next", _IMAGES),
    "kimi_k25": Case("kimi_k25", _IMAGES),
    "muse_glimmer": Case("muse_glimmer", _IMAGES),
    "exaone4_5": Case("exaone4_5", _IMAGES),
    "hyperclovax_vision_v2": Case("hyperclovax_vision_v2", _IMAGES),
    "deepseek_vl": Case("deepseek_vl", _IMAGES),
    "janus": Case("janus", _IMAGES),
    "hunyuan_vl": Case("hunyuan_vl", _IMAGES),
    "glm46v": Case("glm46v", _IMAGES),
    "glm46v, videos": Case("glm46v", _VIDEOS, fps=4.0, options={"do_sample_frames": True}),
    "paddleocr_vl": Case("paddleocr_vl", _IMAGES),
    "video_llama3": Case("video_llama3", _IMAGES),
    "video_llama3, videos": Case("video_llama3", _VIDEOS, fps=4.0, options={"fps": 2.0, "do_sample_frames": True}),
    "cosmos3_edge, videos": Case("cosmos3_edge", _VIDEOS, fps=4.0),
    "cosmos3_edge": Case("cosmos3_edge", _MIXED, options={"do_sample_frames": False}),
    "molmo2": Case("molmo2", _IMAGES),
    "molmo2, videos": Case("molmo2", _ONE_VIDEO, fps=4.0),
    "nemotron_h_omni": Case("nemotron_h_omni", _IMAGES),
    "ernie4_5_vl": Case("ernie4_5_vl", _MIXED, options={"do_sample_frames": False}),
    "gemma3n": Case("gemma3n", _IMAGES, nested=True),
    "fuyu": Case("fuyu", _ONE_IMAGE, nested=True, options={"return_legacy_image_output": False}),
    "gemma4": Case("gemma4", _MIXED_SHORT, nested=True, options={"do_sample_frames": False}),
    "gemma4, videos": Case("gemma4", _VIDEOS, fps=4.0),
    "gemma4_unified": Case("gemma4_unified", _MIXED_SHORT, nested=True, options={"do_sample_frames": False}),
    "gemma4_unified, videos": Case("gemma4_unified", _VIDEOS, fps=4.0),
    "lfm3_vl": Case("lfm3_vl", _MIXED, options={"do_sample_frames": False}),
    "lfm3_vl, videos": Case("lfm3_vl", _VIDEOS, fps=4.0),
    "dots3_note": Case("dots3_note", _MIXED, options={"do_sample_frames": False}),
    "dots3_note, videos": Case("dots3_note", _VIDEOS, fps=4.0),
    "hy_v4_vl": Case("hy_v4_vl", _MIXED),
    "hy_v4_vl, videos": Case("hy_v4_vl", _VIDEOS),
    "fast_vlm": Case("fast_vlm", _IMAGES),
    "lfm2_vl": Case("lfm2_vl", _IMAGES, nested=True),
    "minicpmv4_6": Case("minicpmv4_6", _LARGE_IMAGES),
    "minicpmv4_6, videos": Case("minicpmv4_6", _MIXED),
    "minicpmv4_7": Case("minicpmv4_7", _LARGE_IMAGES),
    "minicpmv4_7, videos": Case("minicpmv4_7", _MIXED),
    "minicpm_ocr": Case("minicpm_ocr", _IMAGES),
    "minicpm_ocr, videos": Case("minicpm_ocr", _MIXED),
}
