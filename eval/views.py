# SPDX-License-Identifier: Apache-2.0
"""What the encoder saw of the first examples, and where their visual tokens are in it.

A run leaves this beside its results, so that a page can show which tokens were kept without the model or its processor:

    OUTPUT/views/<task>-<fingerprint of the weights>/<index>.jpg    the image; its crops, or a video's frames, abreast
    OUTPUT/views/<task>-<fingerprint of the weights>/<index>.json   question, grids and places
"""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import vtprune
from vtprune.adapters.base import Adapter
from vtprune.eval.inputs import chat_inputs
from vtprune.eval.results import write_atomically
from vtprune.eval.tasks import Example, Kind
from vtprune.tokens import Medium

_HEIGHT = {"image": 336, "video": 128}
"""Pixels of a picture at most."""


@dataclass(frozen=True)
class View:
    """One example's image or video as the encoder saw it."""

    question: str
    kind: Kind
    grids: list[list[int]]
    """[rows, columns] of each picture: one of an image, or one a crop; one a frame of a video"""
    places: list[list[int] | None]
    """[picture, row, column] of each visual token; None for tokens without a place (CLS, newlines)"""


def views_folder(output: Path, task: str, weights: str) -> Path:
    """Where the views of a task and a model lie; `weights` is the model's fingerprint."""
    return output / "views" / re.sub(r"[^A-Za-z0-9.]+", "-", f"{task}-{weights}")


@torch.inference_mode()
def write_views(folder: Path, model: Any, processor: Any, examples: Sequence[Example], kind: Kind) -> None:
    """Writes the views of `examples`; encodes each of them once. Padded tiles have no view."""
    adapter = vtprune.adapter_for(model)
    folder.mkdir(parents=True, exist_ok=True)
    for index, example in enumerate(examples):
        medium = example.video_path() if kind == "video" else example.image
        inputs = chat_inputs(processor, [medium], [example.question], kind).to(model.device, model.dtype)
        found = _seen(adapter, processor, medium, inputs, kind)
        if found is None:
            (folder / f"{index}.json").unlink(missing_ok=True)
            continue
        pictures, layout = found
        grids = [[grid.rows, grid.cols] for grid in layout.grids]
        view = View(example.question, kind, grids, _places(layout))
        write_atomically(folder / f"{index}.jpg", strip(pictures, _HEIGHT[kind]))
        write_atomically(folder / f"{index}.json", json.dumps(asdict(view)).encode())


def read_views(folder: Path) -> dict[int, tuple[View, Path]]:
    """Index of an example -> its view, and the file with its pictures; empty without the folder."""
    return {
        int(path.stem): (View(**json.loads(path.read_bytes())), path.with_suffix(".jpg"))
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    }


def _seen(
    adapter: Adapter, processor: Any, medium: Any, inputs: Any, kind: Kind
) -> tuple[list[Image.Image], Medium] | None:
    """The pictures of one image or video and its layout; None where the grids do not lie on the pictures."""
    encode = getattr(adapter.base, f"get_{kind}_features")
    given = {name: inputs[name] for name in inspect.signature(encode).parameters if name in inputs}
    media = adapter.media(kind, given, encode(**given).pooler_output)
    if len(media) != 1 or None in media[0].grids:
        return None
    (pixels,) = adapter.pixels(kind, given)
    if pixels.ndim == 2:  # packed patches: of the whole image, resized
        pictures = [medium.convert("RGB")] if kind == "image" else []
    else:
        plain = _denormalised(pixels.float().cpu(), getattr(processor, f"{kind}_processor"))
        pictures = [Image.fromarray(crop.permute(1, 2, 0).numpy()) for crop in plain.reshape(-1, *pixels.shape[-3:])]
        # Cells that are not square belong to another part of the image than the picture shows (padding cut off).
        if any(abs(p.height / g.rows - p.width / g.cols) > 1 for p, g in zip(pictures, media[0].grids, strict=False)):
            return None
    return (pictures, media[0]) if len(pictures) == len(media[0].grids) else None


def _denormalised(pixels: torch.Tensor, processor: Any) -> torch.Tensor:
    """(..., channels, height, width) as the encoder gets them -> uint8."""
    if processor.do_normalize:
        mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (processor.image_mean, processor.image_std))
        pixels = pixels * std + mean
    if processor.do_rescale:
        pixels = pixels / processor.rescale_factor
    return pixels.round().clamp(0, 255).byte()


def _places(layout: Medium) -> list[list[int] | None]:
    seen = [0] * len(layout.grids)
    places: list[list[int] | None] = []
    for crop in layout.crops.tolist():
        if crop < 0:
            places.append(None)
            continue
        grid = layout.grids[crop]
        rank = seen[crop] - grid.prefix
        seen[crop] += 1
        places.append(None if rank < 0 else [crop, *divmod(rank, grid.cols)])
    return places


def strip(pictures: Sequence[Image.Image], height: int) -> bytes:
    """JPEG of pictures of one size, side by side, no higher than `height` pixels."""
    width, full = pictures[0].size
    scale = min(1, height / full)
    size = max(1, round(width * scale)), max(1, round(full * scale))
    strip = Image.new("RGB", (size[0] * len(pictures), size[1]))
    for index, picture in enumerate(pictures):
        strip.paste(picture.resize(size, Image.Resampling.LANCZOS), (index * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=88)
    return file.getvalue()
