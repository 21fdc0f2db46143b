# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Fuyu."""

from __future__ import annotations

import torch
import transformers as hf

from vtprune.testing.configs import TEXT
from vtprune.testing.media import IMAGE, NEWLINE, PATCH, Item, Layout, flat, noise
from vtprune.testing.tiny.family import Family


def _lay_rows(model, shape, siblings, generator):
    """Flattened patches, with a newline token behind each row. shape: rows, columns."""
    rows, columns = shape
    return Item([*[IMAGE] * columns, NEWLINE] * rows, noise(generator, rows * columns, 3 * PATCH**2))


def _collate(samples):
    return {"pixel_values": torch.stack([item.pixels for item in flat(samples)])}


def _config(**text):
    fields = {key: value for key, value in TEXT.items() if key != "num_key_value_heads"}
    return hf.FuyuConfig(
        text_config=hf.PersimmonConfig(**fields | text), patch_size=PATCH, num_channels=3, image_token_id=IMAGE
    )


# As many patches in every image, which a batch needs.
_LAYOUTS = {"image": Layout(((4, 6), (6, 4), (3, 8), (8, 3)), _lay_rows, _collate)}

FAMILIES = {
    "fuyu": Family(
        "FuyuForCausalLM",
        _config,
        _LAYOUTS,
        attention_unread=True,
        images_first=True,
        since=(5, 24),  # before, its pixels come under another name
        kindred=True,
    )
}
