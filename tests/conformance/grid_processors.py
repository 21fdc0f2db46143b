# SPDX-License-Identifier: Apache-2.0
"""The processors of families with one grid an image, and how people write their placeholders."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import BREAK, END, IMAGE, NEWLINE, PATCH, START, TILE

from .special_tokens import IMAGE_TOKENS, tokenizer

_JANUS_TOKENS = {
    **IMAGE_TOKENS,
    "boi_token": ("<begin_of_image>", START),
    "eoi_token": ("<end_of_image>", END),
}
_FUYU_TOKENS = {
    "image_token": ("|SPEAKER|", IMAGE),
    "image_newline_token": ("|NEWLINE|", NEWLINE),
    "answer_token": ("<0x04>", BREAK),
}
_SIZES = {"size": {"height": TILE, "width": TILE}, "min_size": PATCH}
_TOKENS = {"num_image_tokens": (TILE // PATCH) ** 2}


def _deepseek_vl():
    return hf.DeepseekVLProcessor(hf.DeepseekVLImageProcessor(**_SIZES), tokenizer(IMAGE_TOKENS), **_TOKENS)


def _janus():
    return hf.JanusProcessor(hf.JanusImageProcessor(**_SIZES), tokenizer(_JANUS_TOKENS), **_TOKENS)


def _fuyu():
    words = tokenizer(_FUYU_TOKENS, prefix="\u2581")
    words.model_input_names = ["input_ids", "attention_mask"]  # as it is loaded
    patch, size = ({"height": side, "width": side} for side in (PATCH, 32))
    return hf.FuyuProcessor(hf.FuyuImageProcessor(size=size, patch_size=patch), words)


PROCESSORS: dict[str, Callable] = {"deepseek_vl": _deepseek_vl, "janus": _janus, "fuyu": _fuyu}
"""Family -> its processor."""
WRITTEN: dict[str, dict[str, str]] = {"fuyu": {"image": ""}}  # it puts the image of a prompt before it
