# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape

from .checks import NEW, blinkered, check_pruned, check_untouched, every_cell, generate, origins
from .merging import check_layout, encoder_and_projector, means

VISION, DOCLING = "granite4_vision", "granite_docling"
SIZES = [((64, 64), [1, 2, 3, 4]), ((60, 40), [1, 2, 3, 4]), ((32, 44), [1, 2])]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# -- Granite 4 Vision --------------------------------------------------------------------------------------------------


def image_of(size: tuple[int, int], crops: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(1, crops, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([size]),
    }


def without_queries(model):
    """A blinkered model whose queries read no window: a token depends only on the square it stands for."""
    for layer in vtprune.adapter_for(model).projector.qformer.encoder.layer:
        for attention in (layer.attention, layer.crossattention):
            attention.output.dense.weight.zero_()
    return model


@pytest.mark.parametrize(("size", "visible"), SIZES)
def test_tokens_of_a_mosaic_stand_for_squares_of_four_patches(size, visible):
    model = without_queries(blinkered(VISION))
    adapter, inputs = vtprune.adapter_for(model), image_of(size, len(visible) + 1)

    def encode(crops):
        return adapter.features_of(model.model.get_image_features(**inputs | {"pixel_values": crops[None]}))[0]

    depends = origins(encode, inputs["pixel_values"][0], 4)
    (medium,) = adapter.media("image", inputs, ())
    assert len(medium) == len(depends) and len(medium.grids) == len(visible) + 1
    assert medium.grids[0] == Grid(4, 4)
    newline, last = 0, {}
    for token, (crop, patches) in enumerate(zip(medium.crops.tolist(), depends, strict=True)):
        assert patches.any(1).nonzero().flatten().tolist() == ([] if crop < 0 else [[0, *visible][crop]])
        if crop > 0:
            assert medium.lines[token] == newline
        if crop < 0:
            assert medium.lines[token] == newline
            newline += 1
            continue
        square = patches.any(0).unflatten(0, (8, 8)).nonzero()
        corner = tuple(square[0].tolist())
        assert (square - square[0]).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and corner[0] % 2 == corner[1] % 2 == 0
        assert corner > last.get(crop, (-1, -1))
        last[crop] = corner

    own = depends.flatten(1).any(1)
    values = torch.randn(len(visible) + 1, 64, 5)
    shown = adapter.patch_values("image", inputs, values)
    torch.testing.assert_close(shown[own], means(depends[own], values))
    assert not shown[~own].any()
    _, projector = encoder_and_projector(model, lambda: model.model.get_image_features(**inputs))
    torch.testing.assert_close(
        adapter.projector_inputs("image", inputs, projector)[own], means(depends[own], projector)
    )


def test_what_is_chosen_by_enters_the_first_decoder_layer():
    model = families.shared(VISION)
    adapter, inputs = vtprune.adapter_for(model), families.batch(VISION, model).singles[0]
    entering = []
    watch = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    model(**inputs)
    watch.remove()
    encode = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    (features,) = adapter.features_of(model.model.get_image_features(**encode))
    torch.testing.assert_close(entering[0][inputs["input_ids"] == model.config.image_token_id], features)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.encoder_sequences("image", encode) == [64] * 3


def test_of_two_projectors_for_the_first_layer_the_model_takes_the_last():
    model = families.build(VISION)
    model.config.spatial_target_layers = [5, 0, 4, 6]
    adapter, inputs = vtprune.adapter_for(model), image_of((64, 64), 5)
    assert adapter.projector is model.model.spatial_projectors[1] and adapter.shape.feature_layer == 3
    output = model.model.get_image_features(**inputs)
    assert adapter.features_of(output) is output.deepstack_features[4][1]


def test_nothing_in_the_first_layer_is_refused():
    model = families.build(VISION)
    model.config.deepstack_layer_map = [(-1, 1), (-2, 2)]
    with pytest.raises(UnsupportedModelError, match="none of its features enter the first decoder layer"):
        vtprune.prune(model, "divprune", keep_ratio=0.5)


@every_cell(VISION, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(VISION, media, method, attention, positions)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_features_of_later_layers_are_those_of_the_tokens_that_are_left(layer):
    """They are added on the inputs of layers 0 to 6."""
    check_pruned(VISION, "image", "fastv", layer=layer, keep_ratio=0.55)


@pytest.mark.parametrize("name", [VISION, DOCLING])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(name, attention):
    check_untouched(name, "image", attention)


def test_beams_repeat_the_features_of_every_layer():
    model = families.shared(VISION)
    batch = families.batch(VISION, model)
    with vtprune.prune(model, "divprune", keep_ratio=0.4):
        alone = generate(model, batch)
        several = model.generate(**batch.inputs, max_new_tokens=NEW, num_beams=2, num_return_sequences=2)
        again = generate(model, batch)
    assert torch.equal(alone.sequences, again.sequences) and len(several) == 6


# -- Granite Docling ---------------------------------------------------------------------------------------------------


def pages(fine: bool, side: int = 24) -> dict[str, torch.Tensor]:
    """Samples of two tiles and of one."""
    pixels = torch.randn(2, 2, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values": pixels, "pixel_attention_mask": torch.tensor([[True, True], [True, False]])}
    return inputs | ({"tile_fine_mask": torch.ones(2, dtype=torch.bool)} if fine else {})


@pytest.mark.parametrize("fine", [False, True])
def test_tokens_of_a_tile_stand_for_squares_of_patches(fine):
    model, inputs = blinkered(DOCLING), pages(fine)
    adapter, mask = vtprune.adapter_for(model), inputs["pixel_attention_mask"]

    def encode(tiles):
        pixels = torch.zeros_like(inputs["pixel_values"])
        pixels[mask] = tiles
        return torch.cat(model.model.get_image_features(**inputs | {"pixel_values": pixels}).pooler_output)

    tiles = adapter.pixels("image", inputs)
    assert torch.equal(tiles, inputs["pixel_values"].flatten(0, 1)[:3])
    side = 1 if fine else 2
    media = adapter.media("image", inputs, ())
    assert [medium.grids for medium in media] == [(Grid(6 // side, 6 // side),)] * 3
    depends = check_layout(media, encode, tiles, 4, side=side)
    _, projector = encoder_and_projector(model, lambda: encode(tiles))
    assert adapter.encoder_sequences("image", inputs) == [36] * 3
    torch.testing.assert_close(adapter.projector_inputs("image", inputs, projector), means(depends, projector))
    values = torch.randn(3, 36, 5)
    torch.testing.assert_close(adapter.patch_values("image", inputs, values), means(depends, values))


@pytest.mark.parametrize("method", ["divprune", "fastv"])
def test_the_fine_route(method):
    """Four times as many tokens: logits of a prompt are those of the tokens that are left."""
    model, inputs = families.shared(DOCLING), pages(fine=True)
    image = model.config.image_token_id
    ids = torch.full((2, 2 * 36 + 6), image)
    ids[:, :3], ids[:, -3:] = torch.tensor([5, 6, 7]), torch.tensor([8, 9, 10])
    ids[1, :36] = 0
    ids[1, 36:39] = torch.tensor([5, 6, 7])
    mask = (ids != 0).long()
    with vtprune.prune(model, method, keep_ratio=0.4, positions="original") as session:
        model(input_ids=ids, attention_mask=mask, **inputs)
    counts = session.report.counts
    assert counts[0, -1] < 72 and counts[1, -1] < 36
    assert session.report.visual[0].tolist() == list(range(3, 75)) and len(session.report.visual[1]) == 36


@every_cell(DOCLING, cls_token=False)
def test_pruned_pages_are_the_recomputed_ones(media, method, attention, positions):
    check_pruned(DOCLING, media, method, attention, positions)


def test_encoder_features_of_tiles_are_told_apart():
    """Padding tiles are in no sample."""
    model = families.shared(DOCLING)
    adapter, batch = vtprune.adapter_for(model), families.batch(DOCLING, model)
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "pixel_attention_mask")}
    output = model.model.get_image_features(**inputs)
    media = adapter.media("image", inputs, output.pooler_output)
    assert [len(sample) for sample in output.pooler_output] == [27, 36, 45] and len(media) == 12
    assert len(adapter.pixels("image", inputs)) == 12 == len(adapter.encoder_sequences("image", inputs))
