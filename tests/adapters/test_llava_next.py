# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers import SiglipVisionConfig as Siglip

import vtprune
from vtprune.errors import UnsupportedModelError, UnsupportedStageError
from vtprune.ops.coverage import max_coverage
from vtprune.testing import families
from vtprune.tokens import Grid

from .checks import check_pruned, check_untouched, every_cell, projector_input
from .mosaic import SIDE, TILE, check_mosaic, encoded, every_image, features, places, traced


@every_image
def test_tokens_stand_for_the_patches_they_depend_on(size, resolution, visible):
    model, adapter, inputs = encoded("llava_next", size, resolution)
    (medium,) = adapter.media("image", inputs, features(model, inputs))
    check_mosaic(medium, places(traced(model, inputs)), visible, resolution[1] // TILE)


def test_a_case_by_hand():
    # 46x30 in 48x48: 31 columns of 48 are image, so one patch (of 6) is cut off on either side.
    _, adapter, inputs = encoded("llava_next", (46, 30), (48, 48))
    (medium,) = adapter.media("image", inputs, ())
    overview, above, below = [0] * 9, [1, 1, 2, 2, -1], [3, 3, 4, 4, -1]
    assert medium.crops.tolist() == overview + above * 3 + below * 3
    assert medium.lines.tolist() == [-1] * 9 + [line for line in range(6) for _ in range(5)]
    assert medium.grids == (Grid(3, 3), *[Grid(3, 2)] * 4)


@every_image
def test_values_of_the_encoder_stand_beside_their_tokens(size, resolution, visible):
    model, adapter, inputs = encoded("llava_next", size, resolution)
    stands_for = places(traced(model, inputs))
    encoder = projector_input(model, lambda: features(model, inputs))
    shown = adapter.projector_inputs("image", inputs, encoder)
    values = torch.randn(len(encoder), SIDE**2, 5)
    shown_values = adapter.patch_values("image", inputs, values)
    assert len(shown) == len(shown_values) == len(stands_for)
    for place, feature, value in zip(stands_for, shown, shown_values, strict=True):
        assert torch.equal(feature, torch.zeros_like(feature) if place is None else encoder[place])
        assert torch.equal(value, torch.zeros(5) if place is None else values[place])


def test_media_of_a_batch_are_told_apart_whatever_it_is_padded_to():
    model = families.shared("llava_next")
    adapter = vtprune.adapter_for(model)
    batch = families.batch("llava_next", model)
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "image_sizes")}
    media = adapter.media("image", inputs, features(model, inputs))
    pixels = list(adapter.pixels("image", inputs))
    assert [len(medium) for medium in media] == [len(image) for image in features(model, inputs)]
    ran = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    features(model, inputs)
    handle.remove()
    assert adapter.encoder_sequences("image", inputs) == [SIDE**2] * sum(ran)
    for image, (own, medium) in enumerate(zip(pixels, media, strict=True)):
        alone = {"pixel_values": own[None], "image_sizes": inputs["image_sizes"][image : image + 1]}
        (again,) = adapter.media("image", alone, features(model, alone))
        assert torch.equal(again.crops, medium.crops) and again.grids == medium.grids
        assert torch.equal(*(adapter.pixels("image", alone)), own)
    # transformers also takes the crops of all images as one list.
    listed = inputs | {"pixel_values": torch.cat(pixels)}
    assert all(map(torch.equal, adapter.pixels("image", listed), pixels))
    assert adapter.encoder_sequences("image", listed) == [SIDE**2] * sum(ran)


def model_with(vision, **options):
    text = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=32)
    config = LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=31, image_grid_pinpoints=[[48, 24]], **options
    )
    return LlavaNextForConditionalGeneration(config).eval()


TOWER = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=24, patch_size=8
)


@pytest.mark.parametrize("layer", [-1, -2, [-3, 1]])
@pytest.mark.parametrize(
    ("tower", "strategy"),
    [(CLIPVisionConfig(**TOWER), "default"), (Siglip(**TOWER, vision_use_head=False), "full")],
    ids=["clip", "siglip"],
)
def test_towers(tower, strategy, layer):
    model = model_with(tower, vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape.has_cls == (strategy == "default") and adapter.image_grid is None
    inputs = {"pixel_values": torch.randn(1, 3, 3, 24, 24), "image_sizes": torch.tensor([[48, 24]])}
    encoder = projector_input(model, lambda: features(model, inputs))
    (medium,) = adapter.media("image", inputs, features(model, inputs))
    assert len(medium) == 9 + 6 * 4 and medium.grids == (Grid(3, 3),) * 3
    assert adapter.projector_inputs("image", inputs, encoder).shape == (33, encoder.shape[-1])


def test_towers_whose_patches_fill_no_tile_are_refused():
    for tower, strategy in ((CLIPVisionConfig, "full"), (Siglip, "default")):
        with pytest.raises(UnsupportedModelError, match=f"strategy='{strategy}' gives no grid"):
            vtprune.adapter_for(model_with(tower(**TOWER), vision_feature_select_strategy=strategy))


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell("llava_next", cls_token=True)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned("llava_next", media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched("llava_next", "image", attention)


@pytest.mark.parametrize("method", ["random", "divprune", "mmtok", "vtc_cls"])
def test_a_budget_a_crop_or_an_image(method):
    """Newline tokens are not content: they stay as long as a token of their row, and never count for a budget."""
    model = families.shared("llava_next")
    batch = families.batch("llava_next", model)
    media = vtprune.adapter_for(model).media("image", {"image_sizes": batch.inputs["image_sizes"]}, ())
    per_sample = [[0], [1, 2], [3]]
    for scope in ("crop", "image"):
        report = check_pruned("llava_next", "image", method, keep_ratio=None, keep_tokens=4, scope=scope)
        for sample, images in enumerate(per_sample):
            visual = report.visual[sample]
            alive = torch.isin(visual, report.kept(sample, 0))
            for image, kept in zip(images, alive.split([len(media[image]) for image in images]), strict=True):
                crops, lines = media[image].crops, media[image].lines
                content = torch.bincount(crops[kept & (crops >= 0)], minlength=len(media[image].grids))
                assert content.tolist() == [4] * len(content) if scope == "crop" else content.sum() == 4
                rows = lines[kept & (crops >= 0)].unique()
                assert lines[kept & (crops < 0)].tolist() == rows[rows >= 0].tolist()


@pytest.mark.parametrize("method", ["random", "pool"])
def test_newlines_can_all_be_kept(method):
    """As a server has to, which makes room for them before it sees the image."""
    model = families.shared("llava_next")
    batch = families.batch("llava_next", model)
    media = vtprune.adapter_for(model).media("image", {"image_sizes": batch.inputs["image_sizes"]}, ())
    report = check_pruned(
        "llava_next", "image", method, keep_ratio=None, keep_tokens=1, scope="image", keep_separators=True
    )
    per_sample = [[0], [1, 2], [3]]
    newlines = [sum(int((media[image].crops < 0).sum()) for image in images) for images in per_sample]
    kept = [len(images) + count for images, count in zip(per_sample, newlines, strict=True)]
    assert [len(report.kept(sample, 0)) for sample in range(3)] == kept


def test_tokens_left_over_are_no_grid_even_if_they_are_as_many_as_a_crop_has():
    model = families.shared("llava_next")
    batch = families.batch("llava_next", model)
    methods = [{"name": name, "keep_tokens": k, "scope": "image"} for name, k in (("random", SIDE**2), ("pool", 4))]
    with pytest.raises(UnsupportedStageError, match="whole images"), vtprune.prune(model, methods):
        model(**batch.inputs)


@torch.no_grad()
def test_mmtok_chooses_in_each_crop_and_keeps_the_order_of_the_mosaic():
    model = families.shared("llava_next")
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 5, 3, TILE, TILE, generator=generator)
    encode = {"pixel_values": pixels, "image_sizes": torch.tensor([[48, 48]])}  # 2x2 tiles, no padding
    image, words, k = features(model, encode)[0], [11, 12, 13, 14], 4
    ids = torch.tensor([[1, 5, *[model.config.image_token_id] * len(image), *words]])

    # Crop by crop, from what get_image_features computes on the way.
    encoder = projector_input(model, lambda: features(model, encode))
    projected = model.model.multi_modal_projector(encoder)
    text = model.get_input_embeddings()(torch.tensor(words))
    chosen = [max_coverage(*crop, text, k) for crop in zip(projected, encoder, strict=True)]
    crops, patches = torch.arange(5).repeat_interleave(k), torch.cat(chosen)
    # The overview first, then the tiles as one large grid, row by row.
    tile = (crops - 1).clamp(min=0)
    rows, columns = tile // 2 * SIDE + patches // SIDE, tile % 2 * SIDE + patches % SIDE
    order = torch.where(crops > 0, SIDE**2 + rows * 2 * SIDE + columns, patches).argsort()

    entering = []
    with vtprune.prune(model, "mmtok", keep_tokens=k) as session:
        handle = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: entering.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        model(input_ids=ids, **encode)
        handle.remove()
    kept = session.report.kept(0, 0) - 2
    newline = torch.isin(kept, torch.arange(len(image))[(image == model.model.image_newline).all(-1)])
    # An unpadded mosaic: each of its rows is six tokens and a newline.
    inside = kept[~newline]
    row, column = (inside - SIDE**2) // 7, (inside - SIDE**2) % 7
    tile = 1 + row // SIDE * 2 + column // SIDE
    got_crops = torch.where(inside < SIDE**2, 0, tile)
    got_patches = torch.where(inside < SIDE**2, inside, row % SIDE * SIDE + column % SIDE)
    assert got_crops.tolist() == crops[order].tolist()
    assert got_patches.tolist() == patches[order].tolist()
    tokens = entering[0][0, 2 : 2 + len(kept)][~newline]
    torch.testing.assert_close(tokens, projected[crops[order], patches[order]], atol=1e-6, rtol=0)
