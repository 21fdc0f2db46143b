# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor

import vtprune
from vtprune.testing import families
from vtprune.testing.media import MERGE, PATCH
from vtprune.tokens import Grid, Medium

from .merging import claimed, encoder_and_projector

NAME = "kimi_k25"
SIZES = {"image": [(1, 4, 6), (1, 6, 2)], "video": [(3, 4, 2), (1, 2, 6)]}
"""Frames, rows and columns of patches."""

pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release has no Kimi K2.5")
every_kind = pytest.mark.parametrize("kind", SIZES)


def call(kind: str) -> dict[str, Tensor]:
    patches = sum(frames * rows * columns for frames, rows, columns in SIZES[kind])
    pixels = torch.randn(patches, 3, PATCH, PATCH, generator=torch.Generator().manual_seed(0))
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {name: pixels, f"{kind}_grid_thw": torch.tensor(SIZES[kind])}


def features(model, kind: str, inputs: dict[str, Tensor]) -> Tensor:
    return torch.cat(getattr(model.model, f"get_{kind}_features")(**inputs, return_dict=True).pooler_output)


def expected_patches(media: list[Medium], kind: str) -> Tensor:
    """(tokens, patches of the call) bool: what the tokens stand for by their layouts, in every frame."""
    rows = []
    total = sum(frames * height * width for frames, height, width in SIZES[kind])
    first = 0
    for medium, (frames, height, width) in zip(media, SIZES[kind], strict=True):
        own = claimed([medium], MERGE, height, width)[:, 0].repeat(1, frames)
        where = torch.zeros(len(medium), total, dtype=torch.bool)
        where[:, first : first + own.shape[1]] = own
        rows.append(where)
        first += own.shape[1]
    return torch.cat(rows)


@every_kind
@torch.no_grad()
def test_tokens_stand_for_four_patches_in_every_frame(kind):
    model = families.build(NAME)
    for layer in model.model.vision_tower.layers:
        layer.attn.proj.weight.zero_()
    adapter, inputs = vtprune.adapter_for(model), call(kind)
    pixels = next(iter(inputs))
    before = features(model, kind, inputs)
    media = adapter.media(kind, inputs, before)
    grids = [(Grid(rows // MERGE, columns // MERGE),) for _, rows, columns in SIZES[kind]]
    assert [medium.grids for medium in media] == grids
    depends = torch.zeros(len(before), len(inputs[pixels]), dtype=torch.bool)
    for patch in range(len(inputs[pixels])):
        changed = inputs[pixels].clone()
        changed[patch] += 1
        depends[:, patch] = (features(model, kind, inputs | {pixels: changed}) != before).any(1)
    assert torch.equal(depends, expected_patches(media, kind))

    model, adapter = families.shared(NAME), vtprune.adapter_for(families.shared(NAME))
    weights = depends.float() / depends.sum(1, keepdim=True)
    encoder, projector = encoder_and_projector(model, lambda: features(model, kind, inputs))
    torch.testing.assert_close(adapter.projector_inputs(kind, inputs, projector), weights @ encoder)
    values = torch.randn(1, len(inputs[pixels]), 5)
    torch.testing.assert_close(adapter.patch_values(kind, inputs, values), weights @ values[0])


@every_kind
@torch.no_grad()
def test_patches_see_one_another_across_the_frames_of_a_chunk(kind):
    model = families.shared(NAME)
    adapter, inputs = vtprune.adapter_for(model), call(kind)
    sequences = adapter.encoder_sequences(kind, inputs)
    assert sequences == [frames * rows * columns for frames, rows, columns in SIZES[kind]]
    pixels = next(iter(inputs))
    assert [len(own) for own in adapter.pixels(kind, inputs)] == sequences
    before = model.model.vision_tower(inputs[pixels], grid_thw=inputs[f"{kind}_grid_thw"]).last_hidden_state
    changed = inputs[pixels].clone()
    changed[0] += 1
    after = model.model.vision_tower(changed, grid_thw=inputs[f"{kind}_grid_thw"]).last_hidden_state
    assert (before != after).any(1).nonzero()[:, 0].tolist() == list(range(sequences[0]))


def test_what_stands_around_a_chunk_is_a_marker():
    """Also its time stamp, which an image has not."""
    model = families.shared(NAME)
    adapter, config = vtprune.adapter_for(model), model.config
    around = [config.vision_start_token_id, 30, 31]
    image = [*around, *[config.image_token_id] * 2, config.vision_end_token_id]
    stamp = [41, 42, 41, 42, 43, 44, 45]
    chunk = [*stamp, *around, *[config.video_token_id] * 2, config.vision_end_token_id]
    ids = [5, 6, *image, 7, 8, *chunk, *chunk, 9]
    images = [-1] * len(ids)
    places = [place for place, token in enumerate(ids) if token in (config.image_token_id, config.video_token_id)]
    for number, place in enumerate(places):
        images[place] = number // 2
    found = adapter.markers(torch.tensor([ids]), torch.tensor([images]))[0]
    assert [token for token, own, medium in zip(ids, found, images, strict=True) if not own and medium < 0] == [
        *(5, 6, 7, 8, 9)
    ]
