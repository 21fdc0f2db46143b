# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, VideoLlavaConfig, VideoLlavaForConditionalGeneration

import vtprune
from vtprune.errors import UnsupportedStageError
from vtprune.testing import families
from vtprune.tokens import Grid

from .checks import blinkered, check_pruned, check_untouched, every_cell, generate, origins, projector_input

NAME = "video_llava"
FRAME, PATCH, SIDE = 32, 8, 4


def test_frames_of_a_video_and_their_cls_tokens():
    model = blinkered(NAME)
    adapter = vtprune.adapter_for(model)
    video = torch.randn(3, 3, FRAME, FRAME, generator=torch.Generator().manual_seed(0))

    def encode(frames):
        return model.model.get_video_features(frames[None], return_dict=True).pooler_output.flatten(0, 1)

    with torch.no_grad():
        depends = origins(encode, video, PATCH)
        two = {"pixel_values_videos": torch.stack([video, video.flip(0)])}
        output = model.model.get_video_features(**two, return_dict=True).pooler_output
        encoder = projector_input(model, lambda: model.model.get_video_features(**two))
    media = adapter.media("video", two, output)
    assert len(media) == 2 and list(adapter.pixels("video", two))[1].shape == video.shape
    assert adapter.encoder_sequences("video", two) == [SIDE**2] * 6
    for medium in media:
        assert medium.crops.tolist() == [0] * 17 + [1] * 17 + [2] * 17
        assert medium.grids == (Grid(SIDE, SIDE, prefix=1),) * 3 and medium.lines is None
    for token in range(51):
        frame, place = token // 17, token % 17 - 1
        assert depends[token].nonzero().tolist() == ([[frame, place]] if place >= 0 else [])
    assert adapter.projector_inputs("video", two, encoder).shape == (102, encoder.shape[-1])
    projected = model.model.multi_modal_projector(adapter.projector_inputs("video", two, encoder))
    torch.testing.assert_close(projected, output.flatten(0, 1))


def test_the_two_towers_are_kept_apart():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert adapter.vision_tower("image") is model.model.image_tower
    assert adapter.vision_tower("video") is model.model.video_tower
    assert adapter.encoder_layers("video")[0] is model.model.video_tower.encoder.layers[0]
    assert adapter.cuts_cls("image") and not adapter.cuts_cls("video")


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_images(strategy):
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=32, patch_size=8),
        text_config=LlamaConfig(**tower, vocab_size=32),
        image_token_index=31,
        video_token_index=30,
        vision_feature_select_strategy=strategy,
    )
    model = VideoLlavaForConditionalGeneration(config).eval()
    adapter = vtprune.adapter_for(model)
    pixels = torch.randn(2, 3, 32, 32)
    output = model.model.get_image_features(pixels, return_dict=True).pooler_output
    grid = Grid(4, 4, prefix=int(strategy == "full"))
    for inputs in ({"pixel_values": pixels}, {"pixel_values_images": pixels}):
        assert [medium.grids for medium in adapter.media("image", inputs, output)] == [(grid,)] * 2
        assert adapter.pixels("image", inputs) is pixels
        assert adapter.encoder_sequences("image", inputs) == [16, 16]
    video = {"pixel_values_videos": torch.randn(1, 2, 3, 32, 32)}
    frames = model.model.get_video_features(**video, return_dict=True)
    assert adapter.media("video", video, frames.pooler_output)[0].grids == (Grid(4, 4, prefix=1),) * 2
    # Frames that were encoded outside look like images here. Which of them belong to one video is not known.
    ids = torch.tensor([[1, *[30] * 34, 5, 6]])
    with pytest.raises(UnsupportedStageError, match="computed elsewhere"), vtprune.prune(model, "zero"):
        model(input_ids=ids, mm_encoder_outputs={"video": frames})


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


@torch.no_grad()
def test_cls_attention_is_that_of_the_tower_that_saw_the_medium():
    model = families.shared(NAME, "eager")
    batch = families.batch(NAME, model, media="mixed").singles[0]  # an image, then a video
    method = vtprune.VTCCls(keep_tokens=5)
    with vtprune.prune(model, method) as session:
        model(**batch)
    layers = method.layers(session.adapter.shape)
    seen = {"image": batch["pixel_values"], "video": batch["pixel_values_videos"].flatten(0, 1)}
    alive = torch.isin(session.report.visual[0], session.report.kept(0, 0))
    for kind, kept in zip(seen, alive.split([SIDE**2, 3 * (SIDE**2 + 1)]), strict=True):
        attentions = session.adapter.vision_tower(kind)(seen[kind], output_attentions=True).attentions
        scores = sum(attentions[layer][:, :, 0].mean(1) for layer in layers)[:, kind == "image" :]
        expected = torch.zeros_like(scores).scatter(1, scores.topk(5).indices, 1)
        assert torch.equal(kept.view(scores.shape), expected.bool())


@pytest.mark.parametrize("method", ["random", "vtc_cls"])
def test_the_old_name_of_images_is_understood(method):
    model = families.shared(NAME)
    batch = families.batch(NAME, model, media="mixed")
    with torch.no_grad(), vtprune.prune(model, method, keep_ratio=0.3) as session:
        expected, report = generate(model, batch), session.report
        batch.inputs["pixel_values_images"] = batch.inputs.pop("pixel_values")
        output = generate(model, batch)
    assert torch.equal(torch.stack(output.logits), torch.stack(expected.logits))
    assert session.report.to_dict() == report.to_dict()
