# SPDX-License-Identifier: Apache-2.0
"""The processors of later Gemmas, which also read sound, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import AUDIO, AUDIO_END, AUDIO_START, END, IMAGE, PATCH, START, VIDEO
from vtprune.testing.tiny import gemma3n

from .special_tokens import tokenizer

_GEMMA4_TOKENS = {
    "image_token": ("<|image|>", IMAGE),
    "video_token": ("<|video|>", VIDEO),
    "boi_token": ("<|image>", START),
    "eoi_token": ("<image|>", END),
    "boa_token": ("<|audio>", AUDIO_START),
    "eoa_token": ("<audio|>", AUDIO_END),
}
_GEMMA3N_TOKENS = {
    "image_token": ("<image_soft_token>", IMAGE),
    "boi_token": ("<start_of_image>", START),
    "eoi_token": ("<end_of_image>", END),
    "audio_token": ("<audio_soft_token>", AUDIO),
    "boa_token": ("<start_of_audio>", AUDIO_START),
    "eoa_token": ("<end_of_audio>", AUDIO_END),
}
_FEWEST = 70
"""Tokens of an image, at most; the processors allow no smaller number."""


def _gemma3n():
    side = 16 * gemma3n.SIDE
    return hf.Gemma3nProcessor(
        hf.Gemma3nAudioFeatureExtractor(),
        hf.SiglipImageProcessor(size={"height": side, "width": side}),
        tokenizer(_GEMMA3N_TOKENS),
        image_seq_length=gemma3n.SIDE**2,
        audio_seq_length=gemma3n.SOUND,
    )


def _gemma4():
    patches = {"patch_size": PATCH, "pooling_kernel_size": 2, "max_soft_tokens": _FEWEST}
    return hf.Gemma4Processor(
        hf.Gemma4AudioFeatureExtractor(),
        hf.Gemma4ImageProcessor(**patches),
        tokenizer(_GEMMA4_TOKENS),
        hf.Gemma4VideoProcessor(**patches, num_frames=2),
    )


def _gemma4_unified():
    # It joins small patches itself; the model sees the large ones.
    patches = {"patch_size": PATCH // 2, "pooling_kernel_size": 2, "max_soft_tokens": _FEWEST}
    return hf.Gemma4UnifiedProcessor(
        hf.Gemma4UnifiedAudioFeatureExtractor(),
        hf.Gemma4UnifiedImageProcessor(**patches),
        tokenizer(_GEMMA4_TOKENS),
        hf.Gemma4UnifiedVideoProcessor(**patches, num_frames=2),
    )


PROCESSORS: dict[str, Callable] = {"gemma3n": _gemma3n, "gemma4": _gemma4, "gemma4_unified": _gemma4_unified}
"""Family -> its processor."""
_GEMMA4 = {"image": "<|image|>", "video": "<|video|>"}
WRITTEN: dict[str, dict[str, str]] = {
    "gemma3n": {"image": "<image_soft_token>"},
    "gemma4": _GEMMA4,
    "gemma4_unified": _GEMMA4,
}
