# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, Qwen2Config

import vtprune
from vtprune.errors import UnsupportedModelError
from vtprune.signals import ClsAttention
from vtprune.stages.encoder import EncoderRecorder
from vtprune.testing import families
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered, check_pruned, check_untouched, every_cell
from .merging import check_layout, encoder_and_projector, means

NAME, TILE, PATCH = "internvl", 24, 4


def pixels(tiles: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tiles, 3, TILE, TILE, generator=torch.Generator().manual_seed(seed))


def features(model, tiles):
    return model.model.get_image_features(tiles, return_dict=True).pooler_output


@pytest.mark.parametrize("name", [NAME, "qianfan_ocr"])
@torch.no_grad()
def test_tokens_stand_for_squares_of_four_patches(name):
    model = blinkered(name)
    adapter = vtprune.adapter_for(model)
    tiles = pixels(3)
    inputs, output = {"pixel_values": tiles}, features(model, tiles)
    media = adapter.media("image", inputs, output)
    assert [medium.grids for medium in media] == [(Grid(3, 3),)] * 3 and adapter.image_grid is None
    depends = check_layout(media, lambda tiles: features(model, tiles).flatten(0, 1), tiles, PATCH, side=2)

    model, adapter = families.shared(name), vtprune.adapter_for(families.shared(name))
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=True)
    encoder, projector = encoder_and_projector(model, lambda: features(model, tiles))
    shown = adapter.projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, means(depends, encoder[:, 1:]))
    values = torch.randn(3, 36, 5)
    torch.testing.assert_close(adapter.patch_values("image", inputs, values), means(depends, values))
    assert adapter.encoder_sequences("image", inputs) == [36] * 3
    assert torch.equal(adapter.pixels("image", inputs), tiles)


@torch.no_grad()
def test_tiles_of_another_size_than_the_configured_one():
    """The model interpolates its position embeddings for them."""
    model = families.shared(NAME)
    tiles = torch.randn(2, 3, 32, 32)
    inputs, output = {"pixel_values": tiles}, features(model, tiles)
    media = vtprune.adapter_for(model).media("image", inputs, output)
    assert [medium.grids for medium in media] == [(Grid(4, 4),)] * 2


def model_with(**options):
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    vision = dict(image_size=TILE, patch_size=PATCH, use_qk_norm=True)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**small, **vision | options.pop("vision", {})),
        text_config=Qwen2Config(**small, vocab_size=32, num_key_value_heads=2),
        image_token_id=31,
        image_seq_length=9,
        **options,
    )
    return InternVLForConditionalGeneration._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
@pytest.mark.parametrize("normalised", [True, False])
def test_cls_rows_are_those_of_the_encoder(normalised):
    """With norms over all heads of the queries and keys together (InternVL's largest encoder), and without."""
    model = model_with(vision={"use_qk_norm": normalised})
    for name, parameter in model.named_parameters():
        if "vision" in name and parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "q_norm" in name or "k_norm" in name:
            parameter += torch.rand_like(parameter)
    adapter, tiles, layers = vtprune.adapter_for(model), pixels(2), (0, 2)
    assert adapter.shape == ModelShape(4, 4, 3, has_cls=True) and adapter.cuts_cls("image")
    recorder = EncoderRecorder(adapter, [ClsAttention(layers)], profile=False)
    handles = list(recorder.install())
    output = model.model.get_image_features(tiles, return_dict=True)
    for handle in handles:
        handle.remove()
    encoding = recorder.encoding("image", output)
    view = SimpleNamespace(per_token=lambda values: recorder.per_token([encoding], values)[None])
    rows = ClsAttention(layers).read_encoded(view)[0]
    attentions = model.model.vision_tower(tiles, output_attentions=True).attentions
    for place, layer in enumerate(layers):
        patches = attentions[layer][:, :, 0, 1:].unflatten(-1, (6, 6))
        merged = patches.unflatten(-2, (3, 2)).unflatten(-1, (3, 2)).mean((-3, -1))
        torch.testing.assert_close(rows[place].mT, merged.flatten(2).transpose(1, 2).flatten(0, 1))


def test_depths():
    assert vtprune.adapter_for(model_with(vision_feature_layer=-3)).shape.feature_layer == 1
    assert vtprune.adapter_for(model_with(vision_feature_layer=3)).shape.feature_layer == 2


def test_a_cls_token_among_the_patches_is_refused():
    with pytest.raises(UnsupportedModelError, match="CLS token, which is then mixed"):
        vtprune.adapter_for(model_with(vision_feature_select_strategy="full"))


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=True)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeping_everything_changes_nothing(attention):
    check_untouched(NAME, "image", attention)


@pytest.mark.parametrize("method", ["random", "divprune", "mmtok", "vtc_cls"])
def test_a_budget_a_tile_or_an_image(method):
    """Tiles side by side are one image: 3 tiles; 1 and 2, with text between them; 4."""
    report = check_pruned(NAME, "image", method, keep_ratio=None, keep_tokens=2)
    assert report.counts[:, 0].tolist() == [6, 6, 8]
    report = check_pruned(NAME, "image", method, keep_ratio=None, keep_tokens=2, scope="image")
    assert report.counts[:, 0].tolist() == [2, 4, 2]


@torch.no_grad()
def test_tiles_encoded_elsewhere_are_refused():
    model = families.shared(NAME)
    inputs = dict(families.batch(NAME, model).inputs)
    output = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with (
        vtprune.prune(model, "divprune", keep_tokens=2),
        pytest.raises(vtprune.UnsupportedStageError, match="computed elsewhere"),
    ):
        model(**inputs, mm_encoder_outputs={"image": output})
