# SPDX-License-Identifier: Apache-2.0
"""Families whose processors pack patches of images and videos as rows of pixels: which patches a visual token depends
on when pixels change, compared with what the adapter states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vtprune
from vtprune.testing import families

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@torch.no_grad()
def encode(adapter, kind: str, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Features, one tensor a medium, and the projector's input."""
    seen: list[Tensor] = []
    handle = adapter.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output = getattr(adapter.base, f"get_{kind}_features")(**inputs, return_dict=True)
    handle.remove()
    return [part.flatten(0, -2) for part in output.pooler_output], seen[0]


def check_rows_of_patches(model, kind: str, inputs: dict[str, Tensor]) -> None:
    """What the adapter makes of encoder values is, for each token, the mean over the patches that it depends on.

    model: a blinkered one. inputs: the encode call's arguments, of several media.
    """
    adapter, key = vtprune.adapter_for(model), PIXELS[kind]
    before, merged = encode(adapter, kind, inputs)
    shown = adapter.projector_inputs(kind, inputs, merged)
    assert len(shown) == sum(map(len, before))
    depends = torch.zeros(len(shown), len(inputs[key]), dtype=torch.bool)
    for row in range(len(inputs[key])):
        pixels = inputs[key].clone()
        pixels[row] += 1
        after, merged = encode(adapter, kind, inputs | {key: pixels})
        depends[:, row] = (torch.cat(after) != torch.cat(before)).any(1)
        assert torch.equal(depends[:, row], (adapter.projector_inputs(kind, inputs, merged) != shown).any(1))
    assert depends.sum(0).unique().tolist() == [1]
    values = torch.randn(1, len(inputs[key]), 3, generator=torch.Generator().manual_seed(0))
    means = depends.float() @ values[0] / depends.sum(1, keepdim=True)
    torch.testing.assert_close(adapter.patch_values(kind, inputs, values), means)
    parts, packed = list(adapter.pixels(kind, inputs)), inputs[key].flatten(1).split(_patches(before, depends))
    for part, own in zip(parts, packed, strict=True):
        assert torch.equal(part.flatten().sort().values, own.flatten().sort().values)


def _patches(media: list[Tensor], depends: Tensor) -> list[int]:
    """Patches that the tokens of each medium depend on. depends: (tokens, patches)."""
    return [int(own.any(0).sum()) for own in depends.split([len(medium) for medium in media])]


def check_places(
    model, kind: str, process: Callable[[list[Tensor]], dict[str, Any]], sizes, cell: int, frames: int = 1
):
    """A token shows the pixels that its place in the adapter's layout says.

    model: a blinkered one. process: what transformers' own processor makes of images (3, height, width) or videos
    (frames, 3, height, width). sizes: frames, rows and columns of tokens of each medium. cell: side, in pixels, of what
    a token shows; frames: so many of a video.
    """
    adapter = vtprune.adapter_for(model)
    media = [torch.randint(0, 200, (f, 3, r * cell, c * cell), dtype=torch.uint8) for f, r, c in sizes]

    def look(changed: list[Tensor]):
        inputs = process([m[0] for m in changed] if kind == "image" else changed)
        return inputs, encode(adapter, kind, inputs)[0]

    inputs, before = look(media)
    layouts = adapter.media(kind, inputs, before)
    assert [len(layout) for layout in layouts] == list(map(len, before))
    for number, (shots, rows, columns) in enumerate(sizes):
        assert {(grid.rows, grid.cols, grid.prefix) for grid in layouts[number].grids} == {(rows, columns, 0)}
        assert len(layouts[number].grids) == (shots + frames - 1) // frames and layouts[number].lines is None
        for shot, row, column in ((0, 0, 1), (shots - 1, rows - 1, 0), (shots // 2, 1, columns - 1)):
            changed = [m.clone() for m in media]
            changed[number][shot, :, row * cell : (row + 1) * cell, column * cell : (column + 1) * cell] += 50
            _, after = look(changed)
            different = [(a != b).any(1).nonzero().flatten() for a, b in zip(before, after, strict=True)]
            assert sum(map(len, different)) == 1
            token = int(different[number])
            crops = layouts[number].crops
            assert crops[token] == shot // frames
            assert token - int((crops == shot // frames).int().argmax()) == row * columns + column


def check_encoder_flops(name: str, kind: str, embedding: nn.Module) -> None:
    """The encoder costs what torch counts. embedding: its patch embedding, a part of the shared eager model."""
    model = families.shared(name, "eager")
    adapter = vtprune.adapter_for(model)
    inputs = families.batch(name, model, media=kind).inputs
    counted = 0

    def begin(module, args):
        nonlocal counted
        counted -= counter.get_total_flops()

    def end(module, args, output):
        nonlocal counted
        counted += counter.get_total_flops()

    handles = []
    for module in (embedding, *adapter.encoder_layers()):
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    for handle in handles:
        handle.remove()
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        model(**inputs)
    assert session.report.encoder_flops == counted
