# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.testing.media import END, FIRST_WORD, GLOBAL, IMAGE, START
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout, encoder_and_projector, means

NAME, TILE, PATCH = "llama4", 24, 4
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="this release of transformers has no Llama 4")


def pixels(tiles: int) -> torch.Tensor:
    return torch.randn(tiles, 3, TILE, TILE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_tokens_stand_for_squares_of_four_patches():
    model = blinkered(NAME)
    adapter, tiles = vtprune.adapter_for(model), pixels(3)

    def features(tiles):
        return adapter.features_of(model.get_image_features(tiles, return_dict=True))

    inputs = {"pixel_values": tiles}
    media = adapter.media("image", inputs, features(tiles))
    assert [medium.grids for medium in media] == [(Grid(3, 3),)] * 3 and adapter.image_grid is None
    depends = check_layout(media, lambda tiles: features(tiles).flatten(0, 1), tiles, PATCH, side=2)

    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=True)
    rows: list[torch.Tensor] = []
    handle = model.vision_model.layernorm_post.register_forward_hook(lambda m, args, output: rows.append(output))
    _, projector = encoder_and_projector(model, lambda: model.get_image_features(tiles, return_dict=True))
    handle.remove()
    assert torch.equal(projector, rows[0][:, :-1]), "the CLS token is not the last one"
    torch.testing.assert_close(adapter.projector_inputs("image", inputs, projector), means(depends, projector))
    values = torch.randn(3, 36, 5)
    torch.testing.assert_close(adapter.patch_values("image", inputs, values), means(depends, values))
    assert adapter.encoder_sequences("image", inputs) == [36] * 3


def test_a_model_that_is_its_own_base_says_where_the_prompt_ends():
    """Labels and `logits_to_keep` are arguments of the module that takes the pixels."""
    model = families.shared(NAME)
    (inputs,) = families.batch(NAME, model, samples=1).singles
    answer = torch.arange(5) + FIRST_WORD
    longer = inputs | {
        "input_ids": torch.cat([inputs["input_ids"], answer[None]], 1),
        "attention_mask": torch.ones(1, inputs["input_ids"].shape[1] + 5, dtype=torch.long),
    }
    labels = torch.full_like(longer["input_ids"], -100)
    labels[:, -5:] = answer
    with vtprune.prune(model, "mmtok", keep_ratio=0.3) as session:
        model(**inputs)
        kept = session.report.kept(0, 0)
        for told in ({"labels": labels}, {"logits_to_keep": 6}):
            model(**longer, **told)
            assert torch.equal(session.report.kept(0, 0), kept)
        model(**longer)
        assert not torch.equal(session.report.kept(0, 0), kept), "the question makes no difference"


def test_markers_are_around_every_tile():
    model = families.shared(NAME)
    (inputs,) = families.batch(NAME, model, samples=1).singles
    ids = inputs["input_ids"][0]
    visual = ids == IMAGE
    begins = torch.nn.functional.pad(visual.int(), (1, 0)).diff() == 1
    images = torch.where(visual, begins.cumsum(0) - 1, -1)
    assert int(images.max()) == 2  # two tiles and the whole image
    found = vtprune.adapter_for(model).markers(ids[None], images[None])[0]
    between = ids[found].tolist()
    assert between[0] == START and between[-2:] == [GLOBAL, END] and len(between) == 5
    assert bool((ids[~found & ~visual] < IMAGE).all())


def test_more_tokens_than_a_chunk_are_refused():
    model = families.build(NAME, attention_chunk_size=60, floor_scale=512)
    batch = families.batch(NAME, model)
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5),
        pytest.raises(UnsupportedStageError, match="up to 60 tokens only"),
    ):
        model(**batch.inputs)
