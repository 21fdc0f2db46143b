# SPDX-License-Identifier: Apache-2.0
"""Images and videos as processors lay them out: pixels, and tokens in the prompt. What several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.transformers_private import llava_next_crops

PAD, BOS, FIRST_WORD = 0, 1, 2
IMAGE, VIDEO, START, END, BREAK, ROW_COLUMN, GLOBAL, NEWLINE = range(150, 158)
AUDIO, AUDIO_START, AUDIO_END = 158, 159, ROW_COLUMN  # families with audio have no tiles
VIDEO_START, VIDEO_END = BREAK, GLOBAL  # families with marks around videos have neither of these
VOCABULARY = 160

MERGE = 2
"""Side, in patches, of what is merged into one visual token, in families that do."""
TILE = 24
"""Side, in pixels, of the tiles of families that cut images into tiles."""
PATCH = 4
"""Side, in pixels, of the patches of families that take images of any size."""
GRIDS = ((4, 6), (5, 3), (3, 7), (6, 6))
"""Rows and columns of visual tokens of the images of a batch, where they may be of any size."""


@dataclass(frozen=True)
class Item:
    """One image or video of a prompt."""

    ids: list[int]
    """its tokens in the prompt: placeholders, and the text tokens around and between them"""
    pixels: Tensor
    shape: tuple[int, ...] = ()
    """what the processor says about it: a size, a grid"""


@dataclass(frozen=True)
class Layout:
    """How a family's processor lays out one kind of medium."""

    shapes: tuple
    """of each medium of a batch, in order"""
    make: Callable[..., Item]
    """(model, shape, media in the prompt, generator) -> the medium"""
    collate: Callable[[list[list[Item]]], dict[str, Tensor]]
    """the media of each sample -> arguments of the model"""


def noise(generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def flat(samples: list[list[Item]]) -> list[Item]:
    return [item for items in samples for item in items]


def stack(key: str) -> Callable:
    return lambda samples: {key: torch.stack([item.pixels for item in flat(samples)])}


def lay_square(before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Callable:
    """Images of one size."""

    def make(model, tokens, siblings, generator):
        size = model.config.vision_config.image_size
        return Item([*before, *[IMAGE] * tokens, *after], noise(generator, 3, size, size))

    return make


def lay_frames(model, shape, siblings, generator):
    """A video as a stack of frames. shape: frames, tokens."""
    frames, tokens = shape
    size = model.config.vision_config.image_size
    return Item([VIDEO] * tokens, noise(generator, frames, 3, size, size))


def lay_anyres(model, shape, siblings, generator, only_alone: bool = False):
    """A base tile, then the tiles of the mosaic. shape: height, width.

    only_alone: a prompt with several images has no mosaics.
    """
    size = model.config.vision_config.image_size
    tiled = siblings == 1 or not only_alone
    tiles = llava_next_crops(list(shape), model.config.image_grid_pinpoints, size) if tiled else 1
    item = Item([], noise(generator, tiles, 3, size, size), shape)
    arguments = collate_anyres([[item]])
    if not tiled:
        arguments["batch_num_images"] = torch.tensor([siblings])
    with torch.no_grad():
        (features,) = model.get_image_features(**arguments, return_dict=True).pooler_output
    return Item([IMAGE] * len(features), item.pixels, shape)


def collate_anyres(samples):
    items = flat(samples)
    most = max(len(item.pixels) for item in items)
    tiles = [pad(item.pixels, (0, 0, 0, 0, 0, 0, 0, most - len(item.pixels))) for item in items]
    return {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor([item.shape for item in items])}


def lay_rows(model, shape, siblings, generator):
    """Rows of tokens with text tokens between them. shape: rows, columns."""
    rows, columns = shape
    unit = PATCH * getattr(model.config, "spatial_merge_size", 1)
    ids = ([IMAGE] * columns + [BREAK]) * rows
    size = (rows * unit, columns * unit)
    return Item([*ids[:-1], END], noise(generator, 3, *size), size)


def collate_rows(samples):
    items = flat(samples)
    height, width = (max(item.shape[axis] for item in items) for axis in (0, 1))
    images = [pad(item.pixels, (0, width - item.shape[1], 0, height - item.shape[0])) for item in items]
    return {"pixel_values": torch.stack(images), "image_sizes": torch.tensor([item.shape for item in items])}


def lay_patches(placeholder: int, stamped: bool = False) -> Callable:
    """Flattened patches. shape: frames, rows and columns of merged tokens. stamped: text tokens before each frame."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        grid = (frames, rows * MERGE, columns * MERGE)
        pixels = noise(generator, grid[0] * grid[1] * grid[2], 3 * 2 * PATCH**2)
        if not stamped:
            return Item([START, *[placeholder] * (frames * rows * columns), END], pixels, grid)
        frame = [START, *[placeholder] * (rows * columns), END]
        return Item([token for f in range(frames) for token in (30, 31 + f, *frame)], pixels, grid)

    return make


def collate_patches(pixels: str, grid: str) -> Callable:
    return lambda samples: {
        pixels: torch.cat([item.pixels for item in flat(samples)]),
        grid: torch.tensor([item.shape for item in flat(samples)]),
    }


def lay_tiles(model, tiles, siblings, generator):
    """Tiles and thumbnail, all in a row."""
    ids = [START, *[IMAGE] * (model.config.image_seq_length * tiles), END]
    return Item(ids, noise(generator, tiles, 3, TILE, TILE))


def collate_tiles(samples):
    return {"pixel_values": torch.cat([item.pixels for item in flat(samples)])}
