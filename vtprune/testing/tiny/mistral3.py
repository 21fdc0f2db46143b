# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Mistral 3, Ministral 3 and LightOnOCR."""

from __future__ import annotations

from collections.abc import Callable

import transformers as hf

from vtprune.testing.configs import TEXT, YARN, mistral, pixtral, qwen3
from vtprune.testing.media import GRIDS, IMAGE, MERGE, PATCH, Item, Layout, collate_rows, lay_rows, noise
from vtprune.testing.tiny.family import Family


def _lay_plain(model, shape, siblings, generator):
    """An image without text between its rows. shape: rows, columns of patches; odd ones do not fill a merge."""
    rows, columns = shape
    size = (rows * PATCH, columns * PATCH)
    return Item([IMAGE] * (rows // MERGE * (columns // MERGE)), noise(generator, 3, *size), size)


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
_ODD_GRIDS = ((9, 12), (10, 7), (6, 15), (12, 12))

FAMILIES = {
    "mistral3": Family("Mistral3ForConditionalGeneration", _mistral3(mistral), _LAYOUTS),
    "lighton_ocr": Family(
        "LightOnOcrForConditionalGeneration",
        lambda **text: hf.LightOnOcrConfig(
            vision_config=pixtral(), text_config=qwen3(**text), image_token_id=IMAGE, spatial_merge_size=MERGE
        ),
        {"image": Layout(_ODD_GRIDS, _lay_plain, collate_rows)},
        kindred=True,
    ),
    "ministral3": Family("Mistral3ForConditionalGeneration", _mistral3(_ministral3), _LAYOUTS, kindred=True),
}
