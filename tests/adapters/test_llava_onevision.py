# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

import vtprune
from vtprune.testing import families
from vtprune.tokens import Grid

from .checks import blinkered, check_pruned, check_untouched, every_cell, origins, projector_input
from .mosaic import PATCH, SIDE, TILE, check_mosaic, encoded, every_image, features, places, traced

NAME = "llava_onevision"


@every_image
def test_mosaics_left_as_they_are_are_those_of_llava_next(size, resolution, visible):
    model, adapter, inputs = encoded(NAME, size, resolution)
    # In the call, it overrides the config.
    inputs["vision_aspect_ratio"] = "anyres_max_9"
    stands_for = places(traced(model, inputs))
    (medium,) = adapter.media("image", inputs, features(model, inputs))
    check_mosaic(medium, stands_for, visible, resolution[1] // TILE)
    encoder = projector_input(model, lambda: features(model, inputs))
    shown = adapter.projector_inputs("image", inputs, encoder)
    for place, feature in zip(stands_for, shown, strict=True):
        assert torch.equal(feature, torch.zeros_like(feature) if place is None else encoder[place])


def test_a_resized_mosaic_is_one_crop_with_a_grid_of_its_own():
    # 6x6 patches are twice what is allowed (2x9): they become 4x4, one and a half patches apart.
    model, adapter, inputs = encoded(NAME, (48, 48), (48, 48))
    (medium,) = adapter.media("image", inputs, features(model, inputs))
    assert medium.grids == (Grid(3, 3), Grid(4, 4))
    assert medium.crops.tolist() == [0] * 9 + [1, 1, 1, 1, -1] * 4
    assert medium.lines.tolist() == [-1] * 9 + [line for line in range(4) for _ in range(5)]

    depends = traced(model, inputs)
    tiles, patches = torch.meshgrid(torch.arange(5), torch.arange(9), indexing="ij")
    row, column = ((tiles - 1) // 2 * SIDE + patches // SIDE), ((tiles - 1) % 2 * SIDE + patches % SIDE)
    encoder = projector_input(model, lambda: features(model, inputs))
    shown = adapter.projector_inputs("image", inputs, encoder)
    for token in range(20):
        on = depends[9 + token]
        if token % 5 == 4:
            assert not on.any() and not shown[9 + token].any()
            continue
        centre_row, centre_column = 1.5 * (token // 5) + 0.25, 1.5 * (token % 5) + 0.25
        share = (1 - (row - centre_row).abs()).clamp(min=0) * (1 - (column - centre_column).abs()).clamp(min=0)
        share[0] = 0
        assert torch.equal(on, share > 0)
        torch.testing.assert_close(shown[9 + token], (share[..., None] * encoder).sum((0, 1)))
    assert torch.equal(shown[:9], encoder[0])


def test_several_images_in_a_prompt_are_not_cut_into_tiles():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    batch = families.batch(NAME, model)  # one image, two, one
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images")}
    media = adapter.media("image", inputs, features(model, inputs))
    assert list(map(len, media)) == list(map(len, features(model, inputs)))
    for medium in media[1:3]:
        assert medium.grids == (Grid(3, 3),)
        assert medium.crops.tolist() == [0] * 9 + [-1] and medium.lines.tolist() == [0] * 10
    assert [len(medium.grids) for medium in media] == [3, 1, 1, 2]
    ran = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    features(model, inputs)
    handle.remove()
    assert adapter.encoder_sequences("image", inputs) == [SIDE**2] * sum(ran)
    pixels = adapter.pixels("image", inputs)
    assert list(map(len, pixels)) == [3, 1, 1, 5] and sum(ran) == 10
    encoder = projector_input(model, lambda: features(model, inputs))
    shown = adapter.projector_inputs("image", inputs, encoder).split(list(map(len, media)))
    assert torch.equal(shown[2], torch.cat([encoder[4], torch.zeros(1, encoder.shape[-1])]))


def test_frames_of_a_video_and_the_newline_that_ends_it():
    model = blinkered(NAME)
    adapter = vtprune.adapter_for(model)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(3, 3, TILE, TILE, generator=generator)

    def encode(frames):
        return model.model.get_video_features(frames[None], return_dict=True).pooler_output[0]

    with torch.no_grad():
        depends = origins(encode, video, PATCH)
        two = {"pixel_values_videos": torch.stack([video, video.flip(0)])}
        output = model.model.get_video_features(**two, return_dict=True).pooler_output
        encoder = projector_input(model, lambda: model.model.get_video_features(**two))
    media = adapter.media("video", two, output)
    assert len(media) == 2 and list(adapter.pixels("video", two))[1].shape == video.shape
    assert adapter.encoder_sequences("video", two) == [SIDE**2] * 6
    # Bilinear from 3 to 2: centres lie at 0.25 and 1.75.
    halves = torch.tensor([[0.75, 0.25, 0], [0, 0.25, 0.75]])
    share = torch.einsum("ac,bd->abcd", halves, halves).reshape(4, 9)
    for index, medium in enumerate(media):
        assert len(medium) == 13 and medium.grids == (Grid(2, 2),) * 3
        assert medium.crops.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [-1]
        assert medium.lines.tolist() == [0] * 13
        shown = adapter.projector_inputs("video", two, encoder)[13 * index :][:13]
        expected = torch.cat([share @ frame for frame in encoder[3 * index :][:3]] + [torch.zeros(1, 32)])
        torch.testing.assert_close(shown, expected)
    for token in range(12):
        on = torch.zeros(3, 9, dtype=torch.bool)
        on[token // 4] = share[token % 4] > 0
        assert torch.equal(depends[token], on)
    assert not depends[12].any()


def test_a_tower_with_a_cls_token():
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    config = LlavaOnevisionConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=24, patch_size=8),
        text_config=Qwen2Config(**tower, num_key_value_heads=2, vocab_size=32),
        image_token_index=31,
        video_token_index=30,
        image_grid_pinpoints=[[48, 48]],
        vision_aspect_ratio="anyres_max_2",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[31] * 29, 2, *[30] * 9, 3]])
    media = {
        "pixel_values": torch.randn(1, 5, 3, 24, 24),
        "image_sizes": torch.tensor([[48, 48]]),
        "pixel_values_videos": torch.randn(1, 2, 3, 24, 24),
    }
    with torch.no_grad(), vtprune.prune(model, "vtc_cls", keep_tokens=2) as session:
        model(input_ids=ids, **media)
    kept = session.report.kept(0, 0)
    # Two of the overview, two of the mosaic with the newlines of their rows, two of each frame with the newline.
    places = [(kept < 10).sum(), ((kept >= 10) & (kept < 30)).sum(), (kept >= 30).sum()]
    assert places[0] == 2 and places[1] in (3, 4) and places[2] == 5


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=False)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("media", families.MEDIA[NAME])
def test_keeping_everything_changes_nothing(media, attention):
    check_untouched(NAME, media, attention)


def test_a_budget_for_a_whole_video():
    report = check_pruned(NAME, "video", "divprune", keep_ratio=None, keep_tokens=6, scope="image")
    # Six tokens and the newline, which stays while anything does.
    assert [len(report.kept(sample, 0)) for sample in range(3)] == [7, 14, 7]
    for sample in range(3):
        ends = report.visual[sample][24::25]
        assert torch.isin(ends, report.kept(sample, 0)).all()
