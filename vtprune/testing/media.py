# SPDX-License-Identifier: Apache-2.0
"""Images and videos as the processor of each family would lay them out: pixels, and tokens in the prompt."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtprune.transformers_private import llava_next_crops

PAD, BOS, FIRST_WORD = 0, 1, 2
IMAGE, VIDEO, START, END, BREAK, ROW_COLUMN, GLOBAL, NEWLINE = range(150, 158)
AUDIO, AUDIO_START, AUDIO_END = 158, 159, ROW_COLUMN  # families with audio have no tiles
VOCABULARY = 160

MERGE = 2
"""Side, in patches, of what is merged into one visual token, in families that do."""
TILE = 24
"""Side, in pixels, of the tiles of families that cut images into tiles."""
PATCH = 4
"""Side, in pixels, of the patches of families that take images of any size."""


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


def _randn(generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _flat(samples: list[list[Item]]) -> list[Item]:
    return [item for items in samples for item in items]


def _stack(key: str) -> Callable:
    return lambda samples: {key: torch.stack([item.pixels for item in _flat(samples)])}


def _square(before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> Callable:
    """Images of one size."""

    def make(model, tokens, siblings, generator):
        size = model.config.vision_config.image_size
        return Item([*before, *[IMAGE] * tokens, *after], _randn(generator, 3, size, size))

    return make


def _frames(model, shape, siblings, generator):
    """A video as a stack of frames. shape: frames, tokens."""
    frames, tokens = shape
    size = model.config.vision_config.image_size
    return Item([VIDEO] * tokens, _randn(generator, frames, 3, size, size))


def _anyres(model, shape, siblings, generator, only_alone: bool = False):
    """A base tile, then the tiles of the mosaic. shape: height, width.

    only_alone: a prompt with several images has no mosaics.
    """
    size = model.config.vision_config.image_size
    tiled = siblings == 1 or not only_alone
    tiles = llava_next_crops(list(shape), model.config.image_grid_pinpoints, size) if tiled else 1
    item = Item([], _randn(generator, tiles, 3, size, size), shape)
    arguments = _collate_anyres([[item]])
    if not tiled:
        arguments["batch_num_images"] = torch.tensor([siblings])
    with torch.no_grad():
        (features,) = model.get_image_features(**arguments, return_dict=True).pooler_output
    return Item([IMAGE] * len(features), item.pixels, shape)


def _collate_anyres(samples):
    items = _flat(samples)
    most = max(len(item.pixels) for item in items)
    tiles = [pad(item.pixels, (0, 0, 0, 0, 0, 0, 0, most - len(item.pixels))) for item in items]
    return {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor([item.shape for item in items])}


def _collate_onevision(samples):
    return _collate_anyres(samples) | {"batch_num_images": torch.tensor([len(items) for items in samples if items])}


def _rows(model, shape, siblings, generator):
    """Rows of tokens with text tokens between them. shape: rows, columns."""
    rows, columns = shape
    unit = PATCH * getattr(model.config, "spatial_merge_size", 1)
    ids = ([IMAGE] * columns + [BREAK]) * rows
    size = (rows * unit, columns * unit)
    return Item([*ids[:-1], END], _randn(generator, 3, *size), size)


def _collate_rows(samples):
    items = _flat(samples)
    height, width = (max(item.shape[axis] for item in items) for axis in (0, 1))
    images = [pad(item.pixels, (0, width - item.shape[1], 0, height - item.shape[0])) for item in items]
    return {"pixel_values": torch.stack(images), "image_sizes": torch.tensor([item.shape for item in items])}


def _qwen(placeholder: int, stamped: bool = False) -> Callable:
    """Flattened patches. shape: frames, rows and columns of merged tokens. stamped: text tokens before each frame."""

    def make(model, shape, siblings, generator):
        frames, rows, columns = shape
        grid = (frames, rows * MERGE, columns * MERGE)
        pixels = _randn(generator, grid[0] * grid[1] * grid[2], 3 * 2 * PATCH**2)
        if not stamped:
            return Item([START, *[placeholder] * (frames * rows * columns), END], pixels, grid)
        frame = [START, *[placeholder] * (rows * columns), END]
        return Item([token for f in range(frames) for token in (30, 31 + f, *frame)], pixels, grid)

    return make


def _collate_qwen(pixels: str, grid: str) -> Callable:
    return lambda samples: {
        pixels: torch.cat([item.pixels for item in _flat(samples)]),
        grid: torch.tensor([item.shape for item in _flat(samples)]),
    }


def _collate_timed(samples):
    """Qwen2.5-VL: videos of different frame rates."""
    arguments = _collate_qwen("pixel_values_videos", "video_grid_thw")(samples)
    seconds = [0.5 + item.shape[0] / 2 for item in _flat(samples)]
    return arguments | {"second_per_grid_ts": torch.tensor(seconds)}


def _collate_omni(samples):
    """Qwen-Omni: the same under another name."""
    arguments = _collate_timed(samples)
    return arguments | {"video_second_per_grid": arguments.pop("second_per_grid_ts")}


def _tiles(model, tiles, siblings, generator):
    """Tiles and thumbnail, all in a row."""
    ids = [START, *[IMAGE] * (model.config.image_seq_length * tiles), END]
    return Item(ids, _randn(generator, tiles, 3, TILE, TILE))


def _collate_tiles(samples):
    return {"pixel_values": torch.cat([item.pixels for item in _flat(samples)])}


def _marked_tiles(model, shape, siblings, generator):
    """Tiles with text tokens between them, then the whole image. shape: rows, columns of tiles; (0, 0): not cut."""
    rows, columns = shape
    tokens = [IMAGE] * (TILE // PATCH // MERGE) ** 2
    row = [token for _ in range(columns) for token in (BREAK, ROW_COLUMN, *tokens)] + [NEWLINE]
    ids = [*row * rows, *[NEWLINE] * (rows > 0), BREAK, GLOBAL, *tokens, BREAK]
    pixels = _randn(generator, rows * columns + 1, 3, TILE, TILE)
    if rows == 0:  # a wide image: padded below, and the mask says so
        pixels[:, :, 2 * TILE // 3 :] = 0
    return Item(ids, pixels)


def _collate_marked_tiles(samples):
    most = max(sum(len(item.pixels) for item in items) for items in samples)
    none = torch.empty(0, 3, TILE, TILE)
    padded = [torch.cat([none, *(item.pixels for item in items)]) for items in samples]
    padded = torch.stack([pad(pixels, (0, 0, 0, 0, 0, 0, 0, most - len(pixels))) for pixels in padded])
    return {"pixel_values": padded, "pixel_attention_mask": (padded != 0).any(2).long()}


_SIZES = ((TILE, 32), (32, TILE), (46, 30), (48, 48))
_SIZES_4 = ((32, 44), (40, 32), (60, 40), (64, 64))
_GRIDS = ((4, 6), (5, 3), (3, 7), (6, 6))
_QWEN_IMAGES = Layout(
    tuple((1, *grid) for grid in _GRIDS), _qwen(IMAGE), _collate_qwen("pixel_values", "image_grid_thw")
)
_CLIPS = ((3, 3, 3), (2, 2, 5), (4, 3, 2), (5, 3, 3))
_STAMPED = {
    "image": _QWEN_IMAGES,
    "video": Layout(_CLIPS, _qwen(VIDEO, stamped=True), _collate_qwen("pixel_values_videos", "video_grid_thw")),
}
_IDEFICS = Layout(((1, 2), (0, 0), (2, 1), (2, 2)), _marked_tiles, _collate_marked_tiles)
_PALIGEMMA = Layout((25,) * 4, _square(), _stack("pixel_values"))
_OMNI = {"image": _QWEN_IMAGES, "video": Layout(_CLIPS, _qwen(VIDEO), _collate_omni)}
_INTERNVL = {"image": Layout((3, 1, 2, 4), _tiles, _collate_tiles)}
_MISTRAL3 = {"image": Layout(_GRIDS, _rows, _collate_rows)}

LAYOUTS: dict[str, dict[str, Layout]] = {
    "llava": {"image": Layout((36,) * 4, _square(), _stack("pixel_values"))},
    "pixtral": {"image": Layout(_GRIDS, _rows, _collate_rows)},
    "llava_next": {"image": Layout(_SIZES, _anyres, _collate_anyres)},
    "llava_next_video": {
        "image": Layout(_SIZES_4, _anyres, _collate_anyres),
        "video": Layout(((5, 20),) * 4, _frames, _stack("pixel_values_videos")),
    },
    "llava_onevision": {
        "image": Layout(_SIZES, functools.partial(_anyres, only_alone=True), _collate_onevision),
        "video": Layout(((6, 25),) * 4, _frames, _stack("pixel_values_videos")),
    },
    "video_llava": {
        "image": Layout((16,) * 4, _square(), _stack("pixel_values")),
        "video": Layout(((3, 51),) * 4, _frames, _stack("pixel_values_videos")),
    },
    "qwen2_vl": {
        "image": _QWEN_IMAGES,
        "video": Layout(_CLIPS, _qwen(VIDEO), _collate_qwen("pixel_values_videos", "video_grid_thw")),
    },
    "qwen2_5_vl": {"image": _QWEN_IMAGES, "video": Layout(_CLIPS, _qwen(VIDEO), _collate_timed)},
    "qwen3_vl": _STAMPED,
    "qwen3_vl_moe": _STAMPED,
    "qwen3_5": _STAMPED,
    "qwen3_5_moe": _STAMPED,
    "qwen2_5_omni": _OMNI,
    "qwen3_omni": _OMNI,
    "internvl": _INTERNVL,
    "internvl_gpt_oss": _INTERNVL,
    "idefics3": {"image": _IDEFICS},
    "smolvlm": {"image": _IDEFICS},
    "gemma3": {"image": Layout((16,) * 4, _square((NEWLINE, START), (END, NEWLINE)), _stack("pixel_values"))},
    "paligemma": {"image": _PALIGEMMA},
    "paligemma2": {"image": _PALIGEMMA},
    "mistral3": _MISTRAL3,
    "ministral3": _MISTRAL3,
}
