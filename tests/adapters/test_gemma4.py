# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache

import vtprune
from vtprune import cost
from vtprune.signals import EncoderFeatures
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families
from vtprune.testing.media import END, START
from vtprune.testing.recompute import recompute
from vtprune.tokens import ModelShape
from vtprune.transformers_private import CACHE

from .checks import blinkered, check_pruned, check_untouched, every_cell

pytestmark = pytest.mark.skipif(not families.is_available("gemma4"), reason="this release has no Gemma 4")

NAME, LARGE = "gemma4", "gemma4_31b"


def encoded(model, kind: str):
    """Adapter, arguments of an encode call, and what it gives."""
    adapter = vtprune.adapter_for(model)
    inputs = families.batch(NAME, model, media=kind).inputs
    names = {
        "image": ("pixel_values", "image_position_ids"),
        "video": ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
    }
    arguments = {name: inputs[name] for name in names[kind]}
    return adapter, arguments, getattr(model.model, f"get_{kind}_features")(**arguments, return_dict=True)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_tokens_stand_for_squares_of_patches_in_raster_order(kind):
    model = blinkered(NAME)
    adapter, arguments, output = encoded(model, kind)
    pixels, positions = list(arguments)[:2]
    before = torch.cat(output.pooler_output)
    media = adapter.media(kind, arguments, output.pooler_output)
    assert [sum(map(len, medium.grids)) for medium in media] == list(map(len, output.pooler_output))
    expected = {"image": families.FAMILIES[NAME].layouts["image"].shapes}
    expected["video"] = [shape[1:] for shape in families.FAMILIES[NAME].layouts["video"].shapes]
    assert [(m.grids[0].rows, m.grids[0].cols) for m in media] == list(expected[kind])
    grids = [grid for medium in media for grid in medium.grids]
    assert len(grids) == len(arguments[pixels])
    start = 0
    for crop, grid in enumerate(grids):
        for row, column in ((0, 0), (0, grid.cols - 1), (grid.rows - 1, 1)):
            changed = arguments[pixels].clone()
            x, y = arguments[positions][crop].unbind(-1)
            changed[crop, (x // 2 == column) & (y // 2 == row) & (x >= 0)] += 1
            after = getattr(model.model, f"get_{kind}_features")(**arguments | {pixels: changed}, return_dict=True)
            moved = (torch.cat(after.pooler_output) != before).any(-1).nonzero().flatten()
            assert moved.tolist() == [start + row * grid.cols + column]
        start += len(grid)


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_values_of_patches_are_averaged_as_the_model_averages_them(kind):
    model = families.shared(NAME)
    adapter, arguments, output = encoded(model, kind)
    tower = model.model.vision_tower
    pixels, positions = list(arguments)[:2]
    hidden = []
    handle = tower.encoder.layers[-1].register_forward_hook(lambda module, args, output: hidden.append(output))
    inside = tower(arguments[pixels], arguments[positions]).last_hidden_state
    handle.remove()
    values = adapter.patch_values(kind, arguments, hidden[0]) * adapter.vision_config.hidden_size**0.5
    torch.testing.assert_close(values, inside)
    torch.testing.assert_close(adapter.projector_inputs(kind, arguments, inside), inside)
    torch.testing.assert_close(adapter.projector(inside), torch.cat(output.pooler_output))


@torch.no_grad()
def test_features_are_caught_where_the_projector_is_called_by_name():
    model = families.shared(NAME)
    adapter, arguments, _ = encoded(model, "image")
    recorder = EncoderRecorder(adapter, [EncoderFeatures()], profile=False)
    handles = list(recorder.install())
    output = model.model.get_image_features(**arguments, return_dict=True)
    for handle in handles:
        handle.remove()
    features = recorder.projector_inputs([recorder.encoding("image", output)])
    torch.testing.assert_close(model.model.embed_vision(features), torch.cat(output.pooler_output))


def test_facts():
    adapter = vtprune.adapter_for(families.shared(NAME))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert {START, END} < set(adapter.marker_token_ids)
    inputs = {"pixel_values": torch.zeros(2, 160, 48)}
    assert adapter.encoder_sequences("image", inputs) == [160, 160]


def test_blocks_are_images_and_frames_in_sliding_layers_of_the_large_ones():
    types = torch.tensor([[0, 1, 1, 0, 2, 2, 0], [1, 1, 0, 0, 3, 1, 0]])
    small, large = (vtprune.adapter_for(families.shared(name)) for name in (NAME, LARGE))
    assert small.blocks({"mm_token_type_ids": types}) is None and large.blocks({}) is None
    expected = [[-1, 0, 0, -1, 1, 1, -1], [0, 0, -1, -1, -1, 1, -1]]
    assert large.blocks({"mm_token_type_ids": types}).tolist() == expected
    assert large.has_blocks("sliding_attention") and not large.has_blocks("full_attention")


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_without_an_encoder_a_token_is_one_patch_of_pixels(kind):
    model = families.shared("gemma4_unified")
    adapter, arguments, output = encoded(model, kind)
    media = adapter.media(kind, arguments, output.pooler_output)
    assert [sum(map(len, medium.grids)) for medium in media] == list(map(len, output.pooler_output))
    positions = torch.cat([part[(part >= 0).all(-1)] for part in list(arguments.values())[1]])
    places = [[column, row] for m in media for g in m.grids for row in range(g.rows) for column in range(g.cols)]
    assert positions.tolist() == places
    recorder = EncoderRecorder(adapter, [EncoderFeatures()], profile=False)
    handles = list(recorder.install())
    output = getattr(model.model, f"get_{kind}_features")(**arguments, return_dict=True)
    for handle in handles:
        handle.remove()
    features = recorder.projector_inputs([recorder.encoding(kind, output)])
    torch.testing.assert_close(adapter.projector(features), torch.cat(output.pooler_output))
    assert adapter.has_blocks("full_attention") and not adapter.window_cuts_blocks
    with pytest.raises(vtprune.UnsupportedStageError, match="it has no vision encoder"):
        vtprune.prune(model, "visionzip", keep_ratio=0.5)


def test_models_that_are_not_prunable_are_refused_by_name():
    model = families.build(NAME, use_bidirectional_attention="all")
    with pytest.raises(vtprune.UnsupportedModelError, match="in both directions, so it generates no text"):
        vtprune.adapter_for(model)


# -- layers that read the keys of earlier ones, and embeddings by layer ------------------------------------------------


@pytest.mark.parametrize("layer", [3, 4, 5, 6, 7])
def test_nothing_is_dropped_behind_a_layer_whose_keys_are_read_later(layer):
    model, method = families.shared(NAME), {"name": "fastv", "layer": layer, "keep_ratio": 0.9}
    if layer <= 4:
        vtprune.prune(model, method)
        vtprune.prune(families.shared(LARGE), method)
        return
    message = f"fastv would drop tokens at layer {layer}, and the layers from 6 on read keys of layer 4 and later"
    with pytest.raises(vtprune.UnsupportedStageError, match=f"{message}.*give it layers up to 4"):
        vtprune.prune(model, method)
    vtprune.prune(families.shared(LARGE), method)


@pytest.mark.parametrize("cut", [1, 4])
@pytest.mark.parametrize("compact", [False, True])
@torch.no_grad()
def test_the_last_token_alone_goes_through_the_last_layers(cut, compact):
    """generate() asks for the logits of one token; more, or a padded end, has all tokens computed."""
    model = families.shared(NAME)
    batch = families.batch(NAME, model)
    positions = "compact" if compact else "original"
    method = {"name": "fastv", "layer": cut, "keep_ratio": 0.6, "positions": positions}
    entered = []
    handle = (
        model.get_decoder().layers[-1].register_forward_pre_hook(lambda module, args: entered.append(args[0].shape[1]))
    )
    try:
        for asked in (1, 3):
            with vtprune.prune(model, method) as session:
                logits = model(**batch.inputs, logits_to_keep=asked).logits
            assert logits.shape[1] == asked
            for sample, single in enumerate(batch.singles):
                first = batch.first_column(sample)
                kept = [session.report.kept(sample, layer) - first for layer in range(8)]
                expected = recompute(model, single, torch.empty(0, dtype=torch.long), kept, positions)[-asked:]
                torch.testing.assert_close(logits[sample], expected, atol=1e-4, rtol=0)
    finally:
        handle.remove()
    # One layer was hooked first by the session, then here: what counts is how many tokens it computed.
    assert entered[0] == 1 and entered[1] > 3


@torch.no_grad()
def test_a_cache_made_without_the_config_and_a_second_turn():
    model = families.shared(NAME)
    inputs = families.batch(NAME, model).singles[0]
    more = torch.tensor([[7, 8, 9, 10]])
    with vtprune.prune(model, {"name": "fastv", "layer": 3, "keep_ratio": 0.7}) as session:
        cache = DynamicCache()
        model(**inputs, **{CACHE: cache}, use_cache=True)
        kept = [session.report.kept(0, layer) for layer in range(8)]
        logits = model(input_ids=more, **{CACHE: cache}, use_cache=True).logits[0]
    expected = recompute(model, inputs, more[0], kept)[-more.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_shared_keys_are_stored_once():
    config = families.shared(NAME).config.text_config
    two = 2 * 2 * 2  # keys and values, two heads, two bytes
    assert cost.kv_bytes(config, [5] * 8) == 5 * two * (4 * 8 + 2 * 16)


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched(NAME, "mixed", attention)
