# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Mistral 3 and Ministral 3."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import TEXT, YARN, mistral, pixtral
from vtprune.testing.media import GRIDS, IMAGE, MERGE, Layout, collate_rows, lay_rows
from vtprune.testing.tiny.family import Family


def _mistral3(text_config: Callable) -> Callable:
    return lambda **text: hf.Mistral3Config(
        vision_config=pixtral(),
        text_config=text_config(**text),
        image_token_index=IMAGE,
        spatial_merge_size=MERGE,
    )


def _ministral3(**text):
    fields = dict(head_dim=8, rope_parameters=YARN | {"llama_4_scaling_beta": 0.5})
    return hf.Ministral3Config(**TEXT | fields | text)


_LAYOUTS = {"image": Layout(GRIDS, lay_rows, collate_rows)}

FAMILIES = {
    "mistral3": Family("Mistral3ForConditionalGeneration", _mistral3(mistral), _LAYOUTS),
    "ministral3": Family("Mistral3ForConditionalGeneration", _mistral3(_ministral3), _LAYOUTS, kindred=True),
}
