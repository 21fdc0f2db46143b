# SPDX-License-Identifier: Apache-2.0
"""Pictures of the first examples as the encoder saw them, and the places of their visual tokens.

A run writes these beside its results. So a page can show which tokens were kept without the model or its processor:

    OUTPUT/views/<task>-<fingerprint of the weights>/<index>.jpg    what the encoder saw, pictures side by side
    OUTPUT/views/<task>-<fingerprint of the weights>/<index>.json   question, grids and places

The pictures are drawn from the pixels that the encoder was given: an image, or its crops; a mosaic of tiles without the
padding that the model cuts off; one picture for each frame of a video. If two frames share their tokens, one picture
shows their mean.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

import vtprune
from vtprune.adapters.base import Adapter
from vtprune.eval.inputs import conversation_inputs
from vtprune.eval.results.records import write_atomically
from vtprune.eval.tasks import Example, Kind, kinds_of
from vtprune.tokens import Grid, Medium

_HEIGHT = {"image": 336, "video": 128}
"""Largest height of a picture in pixels."""
_ALIKE = 8
"""Largest mean difference, of 255, between the overview and tiles that are put together in the right way."""

Place = list[int] | None
"""[picture, row, column] of a visual token; None for tokens without a place (CLS, newlines)."""


@dataclass(frozen=True)
class View:
    """One example's image or video as the encoder saw it."""

    question: str
    kind: Kind
    widths: list[int]
    """of each picture, in pixels of the file"""
    grids: list[list[int]]
    """[rows, columns] of each picture"""
    places: list[Place]
    """of each visual token, in the order of the prompt"""
    data: str | None = None
    """digest of the example, if its task has digests"""


def views_folder(output: Path, task: str, weights: str) -> Path:
    """Where the views of a task and a model lie; `weights` is the model's fingerprint."""
    return output / "views" / re.sub(r"[^A-Za-z0-9.]+", "-", f"{task}-{weights}")


@torch.inference_mode()
def write_views(
    folder: Path, model: Any, processor: Any, examples: Sequence[Example], kind: Kind, digests: Sequence[str] = ()
) -> None:
    """Writes the views of `examples`; encodes each of them once.

    No view where the adapter knows no grid, and of images and videos in one prompt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index, example in enumerate(examples):
        conversation = example.conversation()
        inputs = conversation_inputs(processor, [conversation]).to(model.device, model.dtype)
        drawable = kinds_of(conversation) == {kind}
        seen = view_of(model, processor, inputs, example.question, kind, (0, _HEIGHT[kind])) if drawable else None
        if seen is None:
            (folder / f"{index}.json").unlink(missing_ok=True)
            continue
        view, images = seen
        view = replace(view, data=digests[index]) if digests else view
        write_atomically(folder / f"{index}.jpg", strip(images))
        write_atomically(folder / f"{index}.json", json.dumps(asdict(view)).encode())


@torch.inference_mode()
def view_of(
    model: Any, processor: Any, inputs: Any, question: str, kind: Kind, heights: tuple[int, int]
) -> tuple[View, list[Image.Image]] | None:
    """The view of one example, and its pictures. The example is encoded once. None where the adapter knows no grid.

    Args:
        inputs: of one prompt with one image or video, on the model's device.
        heights: least and largest height of the pictures in pixels.
    """
    seen = _seen(vtprune.adapter_for(model), processor, inputs, kind)
    if seen is None:
        return None
    images = level([Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in seen.pictures], *heights)
    return View(question, kind, [image.width for image in images], seen.grids, seen.places), images


def read_views(folder: Path) -> dict[int, tuple[View, Path]]:
    """Index of an example -> its view, and the file with its pictures; empty without the folder."""
    paths = sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    read = {path: json.loads(path.read_bytes()) for path in paths}
    known = {field.name for field in fields(View)}  # earlier versions wrote others
    return {
        int(path.stem): (View(**view), path.with_suffix(".jpg")) for path, view in read.items() if view.keys() == known
    }


# -- what the encoder saw ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    pictures: list[Tensor]
    """(3, height, width) uint8 each"""
    grids: list[list[int]]
    places: list[Place]


def _seen(adapter: Adapter, processor: Any, inputs: Any, kind: Kind) -> _Seen | None:
    """The images or videos of a prompt. One of them may be several media. None if they cannot be drawn."""
    given, output = adapter.encode(kind, inputs)
    media = adapter.media(kind, given, adapter.features_of(output))
    if any(None in medium.grids for medium in media):
        return None
    if (drawn := _crops(adapter, kind, given, media)) is None:
        return None
    seen = _Seen([], [], [])
    for medium, crops in zip(media, drawn, strict=True):
        # An overview, and tiles whose rows of tokens go on from one tile to the next.
        if kind == "image" and medium.lines is not None and len(medium.grids) > 1:
            if len(media) > 1:  # which pixels belong to which of several images is not known here
                return None
            layout, pictures = _one_mosaic(medium), [crops[0], _mosaic(adapter, given, crops)]
        else:
            layout, pictures = medium, crops
        first = len(seen.grids)
        seen.places.extend(place and [first + place[0], *place[1:]] for place in _places(layout))
        seen.grids.extend([grid.rows, grid.cols] for grid in layout.grids)
        seen.pictures.extend(_plain(picture, getattr(processor, f"{kind}_processor")) for picture in pictures)
    if (placed := adapter.prompt_tokens(kind, inputs)) is not None:
        seen.places[:] = [place for place, kept in zip(seen.places, placed.tolist(), strict=True) if kept]
    return _assembled(seen) if len(media) > 2 else seen


def _crops(
    adapter: Adapter, kind: Kind, given: Mapping[str, Any], media: Sequence[Medium]
) -> list[Sequence[Tensor]] | None:
    """(3, height, width) for each grid of each medium, on the CPU; None if its pixels are in no order of pictures."""
    if (drawn := adapter.pictures(kind, given)) is not None:
        return [[picture.float().cpu() for picture in pictures] for pictures in drawn]
    found: list[Sequence[Tensor]] = []
    for medium, pixels in zip(media, adapter.pixels(kind, given), strict=True):
        if pixels.ndim == 1:
            return None
        crops = _unpacked(adapter, medium, pixels) if pixels.ndim == 2 else pixels.reshape(-1, *pixels.shape[-3:])
        found.append(_whole_patches(crops.float().cpu(), _patch(adapter)))
    return found


def _unpacked(adapter: Adapter, medium: Medium, patches: Tensor) -> Tensor:
    """Patches (patches, pixels of some frames) as Qwen's processors pack them -> (grids, 3, height, width).

    Frames that share a grid are averaged; of an image they are the same.
    """
    count, grid = len(medium.grids), medium.grids[0]
    side = _patch(adapter)
    merged = round((len(patches) / len(medium)) ** 0.5)
    order = "(t r c i j) (ch f p q) -> t f ch (r i p) (c j q)"
    sizes = dict(t=count, r=grid.rows, c=grid.cols, i=merged, j=merged, ch=3, p=side, q=side)
    return rearrange(patches, order, **sizes).float().mean(1)


def _one_mosaic(medium: Medium) -> Medium:
    """The layout with all tiles as one crop, whose rows the newline tokens end."""
    rows = int(medium.lines.max()) + 1
    grid = Grid(rows, int((medium.crops > 0).sum()) // rows)
    return Medium(medium.crops.clamp(max=1), (medium.grids[0], grid), medium.lines)


def _mosaic(adapter: Adapter, given: Mapping[str, Any], crops: Tensor) -> Tensor:
    """The pixels of the tiles' tokens, (3, height, width), without padding and without the overview, the first crop."""
    # Resized features cover the same area as the others, but pixels cannot be resized like features.
    given = adapter.without_resizing(given)
    (medium,) = adapter.media("image", given, [])
    overview = medium.grids[0]
    merged = crops.shape[-1] // _patch(adapter) // overview.cols
    sizes = dict(p=crops.shape[-2] // overview.rows, q=crops.shape[-1] // overview.cols)
    # A token's value is the mean of its patches, so each of them is given all pixels of the token.
    tokens = rearrange(crops, "n ch (r p) (c q) -> n r c (ch p q)", **sizes)
    patches = repeat(tokens, "n r c x -> n (r i c j) x", i=merged, j=merged)
    content = adapter.patch_values("image", given, patches)[medium.crops > 0]
    rows = _one_mosaic(medium).grids[1].rows
    return rearrange(content, "(r c) (ch p q) -> ch (r p) (c q)", r=rows, **sizes)


def _whole_patches(pixels: Tensor, side: int) -> Tensor:
    """(..., height, width) without the pixels at the edge that fill no patch; encoders do not look at them."""
    height, width = (length // side * side for length in pixels.shape[-2:])
    return pixels[..., :height, :width]


def _patch(adapter: Adapter) -> int:
    side = getattr(adapter.vision_config, "patch_size", 1)  # a network of convolutions looks at every pixel
    return side if isinstance(side, int) else side[0]


def _plain(pixels: Tensor, processor: Any) -> Tensor:
    """(channels, height, width) as the encoder gets them -> uint8."""
    always = getattr(processor, "norm_mean", None) is not None  # Nemotron Omni's videos, by names of their own
    if processor.do_normalize or always:
        stated = (processor.norm_mean, processor.norm_std) if always else (processor.image_mean, processor.image_std)
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in stated)
        pixels = pixels * std + mean
    if processor.do_rescale or always:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).byte()


def _places(layout: Medium) -> list[Place]:
    seen = [0] * len(layout.grids)
    places: list[Place] = []
    for crop in layout.crops.tolist():
        if crop < 0:
            places.append(None)
            continue
        grid = layout.grids[crop]
        rank = seen[crop] - grid.prefix
        seen[crop] += 1
        places.append(None if rank < 0 else [crop, *divmod(rank, grid.cols)])
    return places


def _assembled(seen: _Seen) -> _Seen:
    """Tiles of an image as one picture, if the last one, or the first one, is an overview of it.

    Models are not told how the tiles lie, so the overview decides: tiles that are put together in the right way look
    like it.
    """
    for overview in (len(seen.pictures) - 1, 0):
        if (whole := _put_together(seen, overview)) is not None:
            return whole
    return seen


def _put_together(seen: _Seen, overview: int) -> _Seen | None:
    """All pictures but the overview, a number, as one of them; None if they are no tiles of it."""
    numbers = [number for number in range(len(seen.pictures)) if number != overview]
    tiles, (rows, cols) = [seen.pictures[number] for number in numbers], seen.grids[numbers[0]]
    if any(tile.shape != tiles[0].shape for tile in tiles) or any(seen.grids[n] != [rows, cols] for n in numbers):
        return None
    downs = [down for down in range(1, len(tiles) + 1) if len(tiles) % down == 0]
    wholes = {down: rearrange(tiles, "(r c) ch h w -> ch (r h) (c w)", r=down) for down in downs}
    small = _small(seen.pictures[overview])
    unlike = {down: float((_small(whole) - small).abs().mean()) for down, whole in wholes.items()}
    down = min(downs, key=unlike.__getitem__)
    if unlike[down] > _ALIKE:  # crops that are no tiles
        return None
    across, behind = len(tiles) // down, int(overview == 0)

    def moved(picture: int, row: int, col: int) -> list[int]:
        if picture == overview:
            return [1 - behind, row, col]
        down_to, across_to = divmod(numbers.index(picture), across)
        return [behind, down_to * rows + row, across_to * cols + col]

    places = [place and moved(*place) for place in seen.places]
    pair = [(wholes[down], [down * rows, across * cols]), (seen.pictures[overview], seen.grids[overview])]
    pictures, grids = zip(*(pair[::-1] if behind else pair), strict=True)
    return _Seen([*pictures], [*grids], places)


def _small(picture: Tensor) -> Tensor:
    return interpolate(picture[None].float(), (16, 16), mode="bilinear", antialias=True)


# -- pictures side by side --------------------------------------------------------------------------------------------


def level(pictures: Sequence[Image.Image], least: int, most: int) -> list[Image.Image]:
    """The pictures at one height, that of the highest, but between `least` and `most` pixels."""
    height = min(most, max(least, *(picture.height for picture in pictures)))
    widths = [max(1, round(picture.width * height / picture.height)) for picture in pictures]
    return [p.resize((width, height), Image.Resampling.LANCZOS) for p, width in zip(pictures, widths, strict=True)]


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in one."""
    strip = Image.new("RGB", (sum(picture.width for picture in pictures), pictures[0].height))
    offset = 0
    for picture in pictures:
        strip.paste(picture, (offset, 0))
        offset += picture.width
    return strip


def strip(pictures: Sequence[Image.Image]) -> bytes:
    """JPEG of pictures of one height, side by side."""
    file = io.BytesIO()
    side_by_side(pictures).save(file, "JPEG", quality=88)
    return file.getvalue()
