# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune import cost
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.batching import encode_all
from vtprune.tokens import Grid, ModelShape

from .checks import origins
from .merging import means

NAME, TILE, PATCH = "perception_lm", 24, 4
pytestmark = pytest.mark.skipif(
    not families.is_available(NAME), reason="this release of transformers has no Perception LM, or timm is missing"
)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
def test_tokens_stand_for_squares_of_four_patches(kind):
    model = families.build(NAME)
    adapter = vtprune.adapter_for(model)
    for layer in adapter.encoder_layers():
        layer.attn.proj.weight.zero_()  # a feature depends only on its own pixels
    name = "pixel_values_videos" if kind == "video" else "pixel_values"
    pixels = torch.randn(2, 3, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))

    def encode(tiles):
        ids = torch.zeros(1, 1, dtype=torch.long)
        return encode_all(adapter, {name: tiles.unflatten(0, (2, 3)), "input_ids": ids}, kind)[0]

    encoded = encode(pixels.flatten(0, 1))
    media = adapter.media(kind, encoded.arguments, encoded.features)
    assert [medium.grids for medium in media] == [(Grid(3, 3),) * 3] * 2
    depends = origins(lambda tiles: encode(tiles).rows, pixels.flatten(0, 1), PATCH)
    token = 0
    for medium, tile in ((medium, tile) for medium in range(2) for tile in range(3)):
        for row, column in ((row, column) for row in range(3) for column in range(3)):
            there = depends[token].nonzero()
            expected = [(2 * row + down) * 6 + 2 * column + across for down in range(2) for across in range(2)]
            assert set(there[:, 0].tolist()) == {3 * medium + tile} and there[:, 1].tolist() == expected
            token += 1
    values = torch.randn(6, 36, 5)
    for rows in (adapter.patch_values, adapter.projector_inputs):
        torch.testing.assert_close(rows(kind, encoded.arguments, values), means(depends, values))
    assert adapter.encoder_sequences(kind, encoded.arguments) == [36] * 6
    assert torch.equal(adapter.pixels(kind, encoded.arguments), pixels)


def test_images_and_videos_of_one_call_are_told_apart():
    """The model encodes both by one method."""
    model = families.shared(NAME)
    batch = families.batch(NAME, model, media="mixed")
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session:
        model(**batch.inputs)
        report = session.report
        model.generate(**batch.inputs, max_new_tokens=1, do_sample=False)
    assert torch.equal(session.report.counts, report.counts)
    ids = batch.inputs["input_ids"]
    for sample, visual in enumerate(report.visual):
        kept = ids[sample, report.kept(sample, 0)]
        assert kept.unique().tolist() == ids[sample, visual].unique().tolist(), (
            "a kind of medium has lost all its tokens"
        )


def test_facts():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=True)
    with pytest.raises(UnsupportedStageError, match="network of timm"):
        vtprune.prune(model, "vtc_cls", keep_ratio=0.5)
    # 37 tokens of width 32, and an MLP one and a half times as wide
    layer = 37 * 2 * (4 * 32**2 + 2 * 32 * 48) + 4 * 37**2 * 32
    counted = cost.encoder_flops(adapter.vision_config, [36], has_cls=True, gated_mlp=False)
    assert counted == 4 * layer + 2 * 36 * 3 * PATCH**2 * 32
