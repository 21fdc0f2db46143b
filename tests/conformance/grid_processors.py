# SPDX-License-Identifier: Apache-2.0
"""The processors of families with one grid an image."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.media import END, PATCH, START, TILE

from .special_tokens import IMAGE_TOKENS, tokenizer

_JANUS_TOKENS = {
    **IMAGE_TOKENS,
    "boi_token": ("<begin_of_image>", START),
    "eoi_token": ("<end_of_image>", END),
}
_SIZES = {"size": {"height": TILE, "width": TILE}, "min_size": PATCH}
_TOKENS = {"num_image_tokens": (TILE // PATCH) ** 2}


def _deepseek_vl():
    return hf.DeepseekVLProcessor(hf.DeepseekVLImageProcessor(**_SIZES), tokenizer(IMAGE_TOKENS), **_TOKENS)


def _janus():
    return hf.JanusProcessor(hf.JanusImageProcessor(**_SIZES), tokenizer(_JANUS_TOKENS), **_TOKENS)


PROCESSORS: dict[str, Callable] = {"deepseek_vl": _deepseek_vl, "janus": _janus}
"""Family -> its processor."""
