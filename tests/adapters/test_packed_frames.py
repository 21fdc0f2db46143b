# SPDX-License-Identifier: Apache-2.0
"""dots 3 note and Hunyuan 4: packed patches, one grid a frame, with and without a newline token behind every row."""

import pytest
import torch
from torch import Tensor

import vtprune
from vtprune import cost
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.media import MERGE, PATCH
from vtprune.tokens import Grid

NEWLINES = {"dots3_note": 0, "hy_v4_vl": 1}
SIZES = {"image": [(1, 4, 6), (1, 6, 2)], "video": [(3, 4, 2), (1, 2, 6)]}
"""Frames, rows and columns of patches."""

every_family = pytest.mark.parametrize("name", [name for name in NEWLINES if families.is_available(name)])
every_kind = pytest.mark.parametrize("kind", SIZES)


def call(kind: str) -> dict[str, Tensor]:
    patches = sum(frames * rows * columns for frames, rows, columns in SIZES[kind])
    pixels = torch.randn(patches, 3 * PATCH**2, generator=torch.Generator().manual_seed(0))
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {name: pixels, f"{kind}_grid_thw": torch.tensor(SIZES[kind])}


def features(model, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat(getattr(model.model, f"get_{kind}_features")(**inputs, return_dict=True).pooler_output)


def place(name: str, row: int, column: int, columns: int) -> int:
    """Number of a patch within its frame: those of a token stand together, unless they are in raster order."""
    if name == "hy_v4_vl":
        return row * columns + column
    cell = row // MERGE * (columns // MERGE) + column // MERGE
    return cell * MERGE**2 + row % MERGE * MERGE + column % MERGE


@every_kind
@every_family
@torch.no_grad()
def test_tokens_stand_for_four_patches_of_a_frame(name, kind):
    model = families.build(name)
    adapter, inputs = vtprune.adapter_for(model), call(kind)
    for layer in adapter.encoder_layers():
        attention = adapter.encoder_attention(layer)
        getattr(attention, "proj" if name == "dots3_note" else "o_proj").weight.zero_()
    pixels, newlines = next(iter(inputs)), NEWLINES[name]
    before = features(model, kind, inputs)
    media = adapter.media(kind, inputs, before)
    expected, first = [], 0
    for medium, (frames, rows, columns) in zip(media, SIZES[kind], strict=True):
        grid = Grid(rows // MERGE, columns // MERGE)
        assert medium.grids == (grid,) * frames
        crops, lines = [], []
        for frame in range(frames):
            for row in range(grid.rows):
                for column in range(grid.cols + newlines):
                    inside = column < grid.cols
                    patches = torch.zeros(len(inputs[pixels]), dtype=torch.bool)
                    for shift in range(MERGE**2 if inside else 0):
                        of_frame = (row * MERGE + shift // MERGE, column * MERGE + shift % MERGE, columns)
                        patches[first + frame * rows * columns + place(name, *of_frame)] = True
                    expected.append(patches)
                    crops.append(frame if inside else -1)
                    lines.append(frame * grid.rows + row)
        first += frames * rows * columns
        assert medium.crops.tolist() == crops
        assert medium.lines is None if not newlines else medium.lines.tolist() == lines
    depends = torch.zeros(len(before), len(inputs[pixels]), dtype=torch.bool)
    for patch in range(len(inputs[pixels])):
        changed = inputs[pixels].clone()
        changed[patch] += 1
        depends[:, patch] = (features(model, kind, inputs | {pixels: changed}) != before).any(1)
    assert torch.equal(depends, torch.stack(expected))

    weights = depends.float() / depends.sum(1, keepdim=True).clamp(min=1)
    values = torch.randn(1, len(inputs[pixels]), 5)
    torch.testing.assert_close(adapter.patch_values(kind, inputs, values), weights @ values[0])
    torch.testing.assert_close(adapter.projector_inputs(kind, inputs, values[0]), weights @ values[0])


@every_family
@torch.no_grad()
def test_the_projectors_input_is_that_of_all_media(name):
    """Hunyuan 4 projects each by itself."""
    model, seen = families.shared(name), {}
    adapter, batch = vtprune.adapter_for(model), families.batch(name, model)

    class Features(vtprune.BeforeLLM):
        name, signal = "features", "features"

        def signals(self, shape):
            return (vtprune.signals.EncoderFeatures(),)

        def select(self, tokens):
            seen["features"] = tokens[vtprune.signals.EncoderFeatures()][tokens.valid]
            return vtprune.Selection.of_indices(tokens, [torch.arange(k) for _, _, k in tokens.each()])

    last = adapter.encoder_layers()[-1].register_forward_hook(lambda module, args, output: seen.update(last=output))
    with last, vtprune.prune(model, Features(keep_ratio=0.5)):
        model(**batch.inputs)
    states = seen["last"].flatten(0, -2)
    states = model.model.vision_tower.norm(states) if name == "dots3_note" else states
    arguments = {"image_grid_thw": batch.inputs["image_grid_thw"]}
    rows = adapter.projector_inputs("image", arguments, states)
    content = torch.cat([medium.crops >= 0 for medium in adapter.media("image", arguments, ())])
    assert {tuple(row) for row in seen["features"].tolist()} == {tuple(row) for row in rows[content].tolist()}


@every_family
def test_nothing_goes_inside_the_language_model(name):
    with pytest.raises(UnsupportedStageError, match="look their keys up by column number.*indexed_attention"):
        vtprune.prune(families.shared(name), "fastv", keep_ratio=0.7)


@pytest.mark.skipif(not families.is_available("dots3_note"), reason="this release has no dots 3 note")
def test_experts_of_an_encoder_are_counted():
    config = families.shared("dots3_note").config.vision_config
    d, total = config.hidden_size, cost.encoder_flops(config, [8], has_cls=False, gated_mlp=True)
    layers = 4 * (2 * 8 * 4 * d * d + 4 * 8 * 8 * d)
    dense = 2 * (2 * 8 * 3 * d * config.intermediate_size)
    sparse = 2 * (2 * 8 * (2 * 3 * d * 24 + d * 4))
    assert total == 2 * 8 * 3 * PATCH**2 * d + layers + dense + sparse
