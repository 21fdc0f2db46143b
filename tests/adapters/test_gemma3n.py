# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import DynamicCache

import vtprune
from vtprune import cost
from vtprune.signals import EncoderFeatures
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families
from vtprune.testing.media import AUDIO, AUDIO_END, AUDIO_START, END, IMAGE, START
from vtprune.testing.recompute import recompute
from vtprune.tokens import Grid
from vtprune.transformers_private import CACHE

from .checks import check_pruned, check_untouched, every_cell

NAME = "gemma3n"
pytestmark = pytest.mark.skipif(not families.is_available(NAME), reason="no timm, or no Gemma 3n")


@torch.no_grad()
def test_tokens_are_the_last_feature_map_in_raster_order():
    model = families.shared(NAME)
    adapter, pixels = vtprune.adapter_for(model), families.batch(NAME, model).inputs["pixel_values"]
    seen = model.model.vision_tower(pixels, do_pooling=False).last_hidden_state
    rows, columns = seen.shape[-2:]
    output = model.model.get_image_features(pixels)
    media = adapter.media("image", {"pixel_values": pixels}, output.pooler_output)
    assert [medium.grids for medium in media] == [(Grid(rows, columns),)] * len(pixels) and rows == columns == 6
    assert adapter.encoder_sequences("image", {"pixel_values": pixels}) == [36] * len(pixels)
    by_hand = torch.stack([seen[0, :, r, c] for r in range(rows) for c in range(columns)])
    torch.testing.assert_close(adapter.projector(inputs_embeds=by_hand * 2048**0.5), output.pooler_output[0])


@torch.no_grad()
def test_features_are_caught_where_the_projector_is_called_by_name():
    model = families.shared(NAME)
    pixels = families.batch(NAME, model).inputs["pixel_values"]
    recorder = EncoderRecorder(vtprune.adapter_for(model), [EncoderFeatures()], profile=False)
    handles = list(recorder.install())
    output = model.model.get_image_features(pixels, return_dict=True)
    for handle in handles:
        handle.remove()
    features = recorder.projector_inputs([recorder.encoding("image", output)])
    torch.testing.assert_close(model.model.embed_vision(inputs_embeds=features), output.pooler_output.flatten(0, 1))


def test_markers_are_no_words():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert {START, END, AUDIO, AUDIO_START, AUDIO_END} == set(adapter.marker_token_ids)
    ids = torch.tensor([[5, 30, START, IMAGE, IMAGE, END, 30, 6]])
    images = torch.where(ids == IMAGE, 0, -1)
    assert adapter.markers(ids, images).tolist() == [[False, True, True, False, False, True, True, False]]


@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "holitom", "tome"])
def test_what_needs_layers_of_a_transformer_is_refused(method):
    with pytest.raises(vtprune.UnsupportedStageError, match=f"{method}: .*Gemma 3n.*it is a network of timm"):
        vtprune.prune(families.shared(NAME), method, keep_ratio=0.5)


# -- streams, embeddings by layer, and layers that read the keys of earlier ones ---------------------------------------


def recorded(model):
    """What each decoder layer was called with, what entered each attention, and what left the language model."""
    layers, attention, left, handles = {}, {}, [], []
    decoder = model.get_decoder()
    for index, layer in enumerate(decoder.layers):
        handles.append(layer.register_forward_pre_hook(lambda m, args, i=index: layers.update({i: args[0].clone()})))
        handles.append(
            layer.self_attn.register_forward_pre_hook(
                lambda m, args, kwargs, i=index: attention.update({i: kwargs["hidden_states"].clone()}),
                with_kwargs=True,
            )
        )
    handles.append(decoder.layers[-1].register_forward_hook(lambda m, args, output: layers.update({8: output.clone()})))
    handles.append(decoder.register_forward_hook(lambda m, args, output: left.append(output.last_hidden_state.clone())))
    return layers, attention, left, handles


@torch.no_grad()
def test_states_of_a_token_are_those_of_all_streams():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    layers, attention, left, handles = recorded(model)
    model(**families.batch(NAME, model).inputs)
    for handle in handles:
        handle.remove()
    for index, layer in enumerate(model.get_decoder().layers):
        states = adapter.token_states(layers[index])
        assert states.shape[-1] == adapter.states_width == 3 * 32
        assert torch.equal(states[1, 7], layers[index][:, 1, 7].flatten())
        assert torch.equal(adapter.layer_input(states), layers[index])
        torch.testing.assert_close(adapter.attention_input(layer, states), attention[index])
    torch.testing.assert_close(adapter.normed(adapter.token_states(layers[8])), left[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_come_back_at_the_length_of_the_prompt():
    model = families.shared(NAME)
    inputs = families.batch(NAME, model).inputs
    whole = model(**inputs, output_hidden_states=True).hidden_states
    with vtprune.prune(model, {"name": "fastv", "layer": 2, "keep_ratio": 0.6}) as session:
        pruned = model(**inputs, output_hidden_states=True).hidden_states
    assert len(pruned) == len(whole) == 9 and {state.shape for state in pruned} == {whole[0].shape}
    real = inputs["attention_mask"].bool()
    for before, after in list(zip(whole, pruned, strict=True))[:3]:
        assert torch.equal(before[:, real], after[:, real])
    kept = session.report.kept(0, 2)
    dropped = next(c.item() for c in session.report.kept(0, 1) if c not in kept and c - 1 in kept)
    assert torch.equal(pruned[5][:, 0, dropped], pruned[5][:, 0, dropped - 1])
    assert not torch.equal(whole[5][:, 0, dropped - 1], pruned[5][:, 0, dropped - 1])


@pytest.mark.parametrize("layer", [3, 4, 5, 6, 7])
def test_nothing_is_dropped_behind_a_layer_whose_keys_are_read_later(layer):
    model, method = families.shared(NAME), {"name": "fastv", "layer": layer, "keep_ratio": 0.9}
    if layer <= 4:
        vtprune.prune(model, method)
        return
    with pytest.raises(vtprune.UnsupportedStageError, match=f"fastv would drop tokens at layer {layer}.*up to 4"):
        vtprune.prune(model, method)


def test_nothing_comes_back_where_each_layer_adds_embeddings_of_tokens():
    model = families.build(NAME, layer_types=["full_attention"] * 8, num_kv_shared_layers=0)
    vtprune.prune(model, {"name": "fastv", "layer": 7, "keep_ratio": 0.9}).remove()
    with pytest.raises(vtprune.UnsupportedStageError, match="lazyllm brings tokens back.*per_layer_input"):
        vtprune.prune(model, "lazyllm", keep_ratio=0.5)


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
    assert cost.kv_bytes(config, [5] * 8) == 5 * 6 * (2 * 2 * 8 * 2)  # keys and values, two heads, two bytes


# -- sound -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sounds_stay_and_are_no_words():
    model = families.shared(NAME)
    one = families.batch(NAME, model).singles[0]
    sound = [AUDIO_START, *[AUDIO] * model.config.audio_soft_tokens_per_image, AUDIO_END]
    ids = torch.cat([one["input_ids"], torch.tensor([[3, *sound, 4, 5, 6]])], 1)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": one["pixel_values"],
        "input_features": torch.randn(1, 64, 16, generator=generator),
        "input_features_mask": torch.ones(1, 64, dtype=torch.bool),
    }
    entering = {}
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(lambda m, args, kwargs: entering.update(kwargs), with_kwargs=True)
    whole = model(**inputs).logits
    handle.remove()
    with vtprune.prune(model, "divprune", keep_ratio=0.4, positions="original") as session:
        pruned = model(**inputs).logits
    kept = session.report.kept(0, 0)
    columns = torch.cat([(ids[0] != IMAGE).nonzero().flatten(), kept]).sort().values
    assert len(kept) == 14 and int((ids[0][columns] == AUDIO).sum()) == len(sound) - 2
    left = decoder(
        inputs_embeds=entering["inputs_embeds"][:, columns],
        per_layer_inputs=entering["per_layer_inputs"][:, columns],
        attention_mask=torch.ones_like(columns)[None],  # without it gaps would be borders of packed sequences
        position_ids=columns[None],
        use_cache=False,
    ).last_hidden_state
    cap = model.config.text_config.final_logit_softcapping
    expected = cap * torch.tanh(model.lm_head(left) / cap)
    torch.testing.assert_close(pruned[:, columns], expected, atol=1e-4, rtol=0)
    assert not torch.allclose(pruned[:, -1], whole[:, -1], atol=1e-2)


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched(NAME, "image", attention)
