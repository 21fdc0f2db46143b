# SPDX-License-Identifier: Apache-2.0
"""Videos: what vLLM answers with pruning is what transformers answers with vtprune."""

from __future__ import annotations

import pytest

from .checkpoints import CHECKPOINTS
from .serving import A, Request, assert_equal, clip, serve

METHODS = (
    {"name": "uniform", "keep_ratio": 0.3},
    {"name": "mmtok", "keep_ratio": 0.3, "scope": "image"},
    {"name": "pool", "keep_ratio": 0.25, "scope": "image", "frames": 2},
    {"name": "vidcom2", "keep_ratio": 0.25},
)


NAMES = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.video]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "qwen3_vl" else [pytest.mark.slow]) for name in NAMES]
)
def test_answers_of_a_batch(name, engine_of, reference_of):
    """Long and short videos, images and text in one batch, and both in one prompt."""
    reference, llm = reference_of(name), engine_of(name)
    more = {"keep_separators": True} if name == "llava_onevision" else {}
    for spec in (method | more for method in METHODS):
        asked = [
            Request("look : {video} what is in this picture ?", videos=[clip(8)], method=spec),
            Request("{image} and {video} who is this ?", [A], spec, videos=[clip(4)]),
            Request("{video} what is this ? {image}", [A], spec, videos=[clip(6, 30, 60)]),
            Request("{video} {video} what is this ?", videos=[clip(4), clip(4, 30, 60)], method=spec),
            Request("who are you ?"),
            Request("look : {image} who is this ?", [A], method=spec),
        ]
        for request, answer in zip(asked, serve(llm, name, asked), strict=True):
            assert_equal(reference.answer(request), answer)
    alone = Request("{image} and {video} who is this ?", [A], None, videos=[clip(4)])
    assert_equal(reference.answer(alone), *serve(llm, name, [alone]))
