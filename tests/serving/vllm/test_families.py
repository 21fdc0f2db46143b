# SPDX-License-Identifier: Apache-2.0
"""What vLLM answers with pruning is what transformers answers with vtprune, family by family."""

from __future__ import annotations

import pytest

from .checkpoints import CHECKPOINTS
from .serving import DEFAULT, A, B, C, D, Request, assert_equal, serve

METHODS = ("uniform", "divprune", "mmtok", "pool", "random")
OF_CLS = ("visionzip", "vispruner", "glsim", "vtc_cls")
"""They read layers of the encoder."""
FIRST = ("llava", "qwen3_vl")
"""What the run without slow tests has."""
_ADDS_TEXT = ("internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Their processors put text around an image."""


def requests(method) -> list[Request]:
    return [
        Request("look : {image} what is in this picture ?", [A], method),
        Request("compare {image} and {image} which one is bigger ? answer with a word", [B, C], method),
        Request("who are you ?", [], DEFAULT),
        Request("look : {image} who is this ?", [A], method),
        Request("{image} what is in the original picture ?", [D], method),
    ]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else [pytest.mark.slow]) for name in CHECKPOINTS]
)
def test_answers_of_a_batch(name, engine_of, reference_of):
    reference, llm = reference_of(name), engine_of(name)
    more = {"keep_separators": True} if name in ("llava_next", "llava_onevision") else {}
    methods: list = [
        {"name": method, "keep_ratio": 0.3} | more for method in METHODS + OF_CLS * (name in ("llava", "llava_next"))
    ]
    plain = serve(llm, name, requests(None))
    for spec in (None, *methods):
        # A number of the prompt's text is what `random` draws by, and processors add text to it themselves.
        if spec is not None and spec["name"] == "random" and name in _ADDS_TEXT:
            continue
        asked = requests(spec)
        for request, answer, full in zip(asked, serve(llm, name, asked), plain, strict=True):
            assert_equal(reference.answer(request), answer)
            assert answer.prompt <= full.prompt
            if spec is not None and request.images:
                assert answer.prompt < full.prompt
