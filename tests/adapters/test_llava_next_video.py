# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

import vtprune
from vtprune.testing import families
from vtprune.tokens import Grid

from .checks import blinkered, check_pruned, check_untouched, every_cell, origins, projector_input

NAME = "llava_next_video"
FRAME, PATCH = 32, 8


def test_frames_of_a_video():
    model = blinkered(NAME)
    adapter = vtprune.adapter_for(model)
    video = torch.randn(3, 3, FRAME, FRAME, generator=torch.Generator().manual_seed(0))

    def encode(frames):
        return model.model.get_video_features(frames[None], return_dict=True).pooler_output[0]

    with torch.no_grad():
        depends = origins(encode, video, PATCH)
        two = {"pixel_values_videos": torch.stack([video, video.flip(0)])}
        output = model.model.get_video_features(**two, return_dict=True)
        encoder = projector_input(model, lambda: model.model.get_video_features(**two))
        layers = model.model.vision_tower(two["pixel_values_videos"].flatten(0, 1), output_hidden_states=True)
    media = adapter.media("video", two, output.pooler_output)
    assert len(media) == 2 and list(adapter.pixels("video", two))[1].shape == video.shape
    assert adapter.encoder_sequences("video", two) == [16] * 6
    for medium in media:
        assert medium.crops.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert medium.grids == (Grid(2, 2),) * 3 and medium.lines is None
    for token in range(12):
        frame, row, column = token // 4, token % 4 // 2, token % 2
        corner = 8 * row + 2 * column
        assert depends[token].nonzero().tolist() == [[frame, corner + step] for step in (0, 1, 4, 5)]
    # The mean of the 2x2 patches behind each token, also of the values of patches.
    patches = layers.hidden_states[-2][:, 1:]
    means = patches.reshape(6, 2, 2, 2, 2, -1).mean((2, 4)).reshape(24, -1)
    torch.testing.assert_close(adapter.projector_inputs("video", two, encoder), means)
    torch.testing.assert_close(adapter.patch_values("video", two, patches), means)


@pytest.mark.parametrize("mode", ["average", "max", "conv"])
def test_ways_to_pool(mode):
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=40, patch_size=8),
        text_config=LlamaConfig(**tower, vocab_size=32),
        image_token_index=31,
        video_token_index=30,
        spatial_pool_mode=mode,
    )
    model = LlavaNextVideoForConditionalGeneration(config).eval()
    adapter = vtprune.adapter_for(model)
    assert adapter.visual_token_ids == {"image": 31, "video": 30}
    inputs = {"pixel_values_videos": torch.randn(1, 2, 3, 40, 40)}
    with torch.no_grad():
        output = model.model.get_video_features(**inputs, return_dict=True).pooler_output
        encoder = projector_input(model, lambda: model.model.get_video_features(**inputs))
    (medium,) = adapter.media("video", inputs, output)
    assert len(medium) == output.shape[1] == 8 and medium.grids == (Grid(2, 2),) * 2  # a fifth row fills no cell
    assert torch.equal(adapter.projector_inputs("video", inputs, encoder), encoder.flatten(0, 1))
    values = torch.arange(50.0).reshape(2, 25, 1)
    assert adapter.patch_values("video", inputs, values)[:4, 0].tolist() == [3, 5, 13, 15]


def test_images_are_those_of_llava_next():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    batch = families.batch(NAME, model)
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "image_sizes")}
    with torch.no_grad():
        output = model.model.get_image_features(**inputs, return_dict=True).pooler_output
        encoder = projector_input(model, lambda: model.model.get_image_features(**inputs))
        projected = model.model.multi_modal_projector(adapter.projector_inputs("image", inputs, encoder))
    media = adapter.media("image", inputs, output)
    assert media[3].grids == (Grid(4, 4),) * 5 and media[0].grids == (Grid(4, 4), Grid(4, 3), Grid(4, 3))
    crops, features = torch.cat([medium.crops for medium in media]), torch.cat(output)
    torch.testing.assert_close(projected[crops >= 0], features[crops >= 0])
    assert torch.equal(features[crops < 0], model.model.image_newline.detach().expand(int((crops < 0).sum()), -1))


# -- sessions ----------------------------------------------------------------------------------------------------------


@every_cell(NAME, cls_token=True)
def test_pruned_generation_is_the_recomputed_one(media, method, attention, positions):
    check_pruned(NAME, media, method, attention, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("media", families.MEDIA[NAME])
def test_keeping_everything_changes_nothing(media, attention):
    check_untouched(NAME, media, attention)


@pytest.mark.parametrize("method", ["mmtok", "vtc_cls"])
def test_a_budget_for_a_whole_video(method):
    report = check_pruned(NAME, "video", method, keep_ratio=None, keep_tokens=6, scope="image")
    assert [len(report.kept(sample, 0)) for sample in range(3)] == [6, 12, 6]
