# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Molmo 2."""

from __future__ import annotations

import torch
import transformers as hf
from torch import Tensor

from vtprune.testing.configs import TEXT, VISION, WIDTH, YARN
from vtprune.testing.media import (
    BREAK,
    END,
    GLOBAL,
    IMAGE,
    MERGE,
    NEWLINE,
    PATCH,
    ROW_COLUMN,
    START,
    Item,
    Layout,
    flat,
    noise,
)
from vtprune.testing.tiny.family import Family

_SIDE, _MARGIN = 5, 1
"""Of a crop, in patches, and how much of each of its sides another crop has, too."""
_LOW_START, _FRAME_START, _FRAME_END = ROW_COLUMN, GLOBAL, NEWLINE


def _pooled(places: Tensor) -> Tensor:
    """Places (rows, columns) of patches -> (tokens, 4), those that each token pools, -1 for none."""
    rows, columns = (-(-side // MERGE) for side in places.shape)
    whole = torch.full((rows * MERGE, columns * MERGE), -1)
    whole[: places.shape[0], : places.shape[1]] = places
    return whole.unflatten(0, (rows, MERGE)).unflatten(2, (columns, MERGE)).transpose(1, 2).flatten(0, 1).flatten(1)


def _places(crops: int) -> Tensor:
    """(2, patches) of a line through so many crops of a canvas: the crop of each patch, and its place in it."""
    window = _SIDE - 2 * _MARGIN
    line = torch.arange(crops * window + 2 * _MARGIN)
    crop = ((line - _MARGIN) // window).clamp(0, crops - 1)
    return torch.stack([crop, line - crop * window])


def _views(shape: tuple[int, int]) -> list[Tensor]:
    """The places of the patches of the whole view, and of a mosaic of (rows, columns) crops: (rows, columns) each."""
    (down, inner_row), (across, inner_column) = (_places(crops) for crops in shape)
    crop = 1 + down[:, None] * shape[1] + across
    mosaic = crop * _SIDE**2 + inner_row[:, None] * _SIDE + inner_column
    return [torch.arange(_SIDE**2).view(_SIDE, _SIDE), mosaic]


def _grid(places: Tensor) -> tuple[int, int]:
    """Rows and columns of the tokens that pool such patches."""
    rows, columns = places.shape
    return -(-rows // MERGE), -(-columns // MERGE)


def _lay_views(model, shape, siblings, generator):
    """The whole view, then a mosaic of crops that overlap. shape: rows, columns of crops."""
    low, high = ([*[IMAGE] * columns, BREAK] * rows for rows, columns in map(_grid, _views(shape)))
    pixels = noise(generator, 1 + shape[0] * shape[1], _SIDE**2, 3 * PATCH**2)
    return Item([_LOW_START, *low, END, START, *high, END], pixels, shape)


def _lay_stamped_frames(model, frames, siblings, generator):
    """Frames with a time stamp before each."""
    rows, columns = _grid(_views((1, 1))[0])
    tokens = [_FRAME_START, *[IMAGE] * (rows * columns), _FRAME_END]
    ids = [token for frame in range(frames) for token in (30, 31 + frame, *tokens)]
    return Item(ids, noise(generator, frames, _SIDE**2, 3 * PATCH**2), (frames, rows, columns))


def _numbered(samples, places_of) -> tuple[Tensor, Tensor]:
    """All pixels, and the patches that each token pools, numbered through all media."""
    pooled, first = [], 0
    for item in flat(samples):
        for places in places_of(item):
            own = _pooled(places)
            pooled.append(torch.where(own >= 0, own + first, -1))
        first += len(item.pixels) * _SIDE**2
    return torch.cat([item.pixels for item in flat(samples)]), torch.cat(pooled)


def _collate_views(samples):
    pixels, pooled = _numbered(samples, lambda item: _views(item.shape))
    grids = [[side for places in _views(item.shape) for side in _grid(places)] for item in flat(samples)]
    return {"pixel_values": pixels, "image_token_pooling": pooled, "image_grids": torch.tensor(grids)}


def _collate_frames(samples):
    view = _views((1, 1))[0]
    pixels, pooled = _numbered(samples, lambda item: [view + frame * _SIDE**2 for frame in range(item.shape[0])])
    grids = torch.tensor([item.shape for item in flat(samples)])
    return {"pixel_values_videos": pixels, "video_token_pooling": pooled, "video_grids": grids}


def _mm_token_types(ids):
    around = [IMAGE, BREAK, START, _LOW_START, END, _FRAME_START, _FRAME_END]
    return {"mm_token_type_ids": torch.isin(ids, torch.tensor(around)).long()}


def _config(**text):
    heads = dict(num_key_value_heads=4, head_dim=8)
    fields = dict(head_dim=8, additional_vocab_size=4, rope_parameters=YARN, rope_scaling_layers=[0, 1, 3, 6])
    return hf.Molmo2Config(
        vision_config=hf.Molmo2VisionConfig(**VISION, **heads, image_size=[_SIDE * PATCH] * 2, patch_size=PATCH),
        adapter_config=hf.Molmo2AdapterConfig(
            vision_feature_layer=[2, 1],
            hidden_size=WIDTH,
            num_attention_heads=4,
            **heads,
            intermediate_size=48,
            text_hidden_size=WIDTH,
        ),
        text_config=hf.Molmo2TextConfig(**TEXT | fields | text),
        image_patch_id=IMAGE,
        image_start_token_id=START,
        low_res_image_start_token_id=_LOW_START,
        image_end_token_id=END,
        frame_start_token_id=_FRAME_START,
        frame_end_token_id=_FRAME_END,
    )


_LAYOUTS = {
    "image": Layout(((1, 2), (1, 1), (2, 1), (2, 2)), _lay_views, _collate_views),
    "video": Layout((2, 3, 1, 2), _lay_stamped_frames, _collate_frames),
}

FAMILIES = {
    "molmo2": Family(
        "Molmo2ForConditionalGeneration", _config, _LAYOUTS, _mm_token_types, mixes_kinds=False, kindred=True
    )
}
