# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
import transformers as hf
from conformance.processors import Case, Request
from torch import Tensor

import vtprune
from vtprune.testing import families
from vtprune.testing.media import END, IMAGE, PATCH, START
from vtprune.testing.recompute import recompute
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout

NAME = "nemotron_h_omni"
NEW = 4
pytestmark = pytest.mark.skipif(
    not hasattr(hf, families.model_class(NAME)), reason="not in this release of transformers"
)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def patches(images: Tensor) -> Tensor:
    """(patches, 3 * patch * patch): images (images, 3, height, width) as the processor packs them."""
    rows = images.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # image, channel, row, y, column, x
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)


@torch.no_grad()
def test_tokens_of_images_stand_for_squares_of_four_patches():
    model = blinkered(NAME)
    adapter, inputs = vtprune.adapter_for(model), {"image_grid_hw": torch.tensor([[4, 6]] * 2)}

    def encode(images):
        return torch.cat(model.get_image_features(patches(images), **inputs).pooler_output)

    media = adapter.media("image", inputs, ())
    assert [medium.grids for medium in media] == [(Grid(2, 3),)] * 2
    check_layout(media, encode, noise(2, 3, 4 * PATCH, 6 * PATCH), PATCH, side=2)


@torch.no_grad()
def test_tokens_of_videos_are_one_grid_for_every_two_frames():
    model = blinkered(NAME)
    adapter, videos = vtprune.adapter_for(model), noise(2, 3, 6, 4 * PATCH, 6 * PATCH)
    inputs = {"pixel_values_videos": videos}
    features = model.get_video_features(**inputs).pooler_output
    media = adapter.media("video", inputs, features)
    assert [medium.grids for medium in media] == [(Grid(2, 3),) * 3] * 2 and [*map(len, features)] == [18, 18]
    changed = videos.clone()
    changed[1, 2, 4, 3 * PATCH, 5 * PATCH] += 1  # in the last two frames, the last square
    after = model.get_video_features(changed).pooler_output
    assert [(a != b).any(-1).nonzero().flatten().tolist() for a, b in zip(features, after, strict=True)] == [[], [17]]
    assert media[1].crops[17] == 2


@pytest.mark.parametrize("kind", ["image", "video"])
@torch.no_grad()
def test_class_and_register_tokens_are_left_out_of_patches(kind):
    adapter = vtprune.adapter_for(families.shared(NAME))
    sizes = [(4, 2), (2, 6)] if kind == "image" else [(4, 2)] * 2
    inputs = {
        "image": {"image_grid_hw": torch.tensor(sizes)},
        "video": {"pixel_values_videos": torch.zeros(1, 2, 6, 4 * PATCH, 2 * PATCH)},
    }[kind]
    prefix = torch.full((5, 3), float("nan"))
    places = [
        [torch.tensor([image, row, column]) for row in range(rows) for column in range(columns)]
        for image, (rows, columns) in enumerate(sizes)
    ]
    values = [torch.cat([prefix, torch.stack(of_image)]) for of_image in places]
    assert adapter.encoder_sequences(kind, inputs) == [*map(len, values)]
    together = torch.cat(values)[None] if kind == "image" else torch.stack(values)
    expected = [
        [image, 2 * row + 0.5, 2 * column + 0.5]
        for image, (rows, columns) in enumerate(sizes)
        for row in range(rows // 2)
        for column in range(columns // 2)
    ]
    assert adapter.patch_values(kind, inputs, together).tolist() == expected


@torch.no_grad()
def test_what_the_projector_reads_is_averaged_over_the_patches_of_a_token():
    model = families.shared(NAME)
    adapter, batch = vtprune.adapter_for(model), families.batch(NAME, model)
    inputs = {key: batch.inputs[key] for key in ("pixel_values", "image_grid_hw")}
    seen = []
    handles = [
        model.multi_modal_projector.register_forward_pre_hook(lambda module, args: seen.append(args[0])),
        model.vision_model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state)),
    ]
    model.get_image_features(**inputs)
    for handle in handles:
        handle.remove()
    encoder, projector = seen
    shown = adapter.projector_inputs("image", inputs, projector)
    torch.testing.assert_close(shown, adapter.patch_values("image", inputs, encoder[None]))


def clip(frames: int) -> dict[str, Tensor]:
    """A prompt with a video of so many pairs of frames."""
    ids = [1, 5, 6]
    for frame in range(frames):
        ids += [20 + frame, START, *[IMAGE] * 6, END]
    ids = torch.tensor([[*ids, 7, 8, 9]])
    videos = noise(1, frames, 6, 4 * PATCH, 6 * PATCH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": videos}


def processed(frames: int) -> dict[str, Tensor]:
    """A prompt with a video of so many frames, as the family's processor lays it out."""
    return Case(NAME, (Request("look : {video} what happens ?", (), ((frames, 36, 24),)),)).inputs(0)


@pytest.mark.parametrize("make, frames", [(clip, 4), (processed, 7)])
@pytest.mark.parametrize("method", ["divprune", "mmtok", "pool", "vispruner"])
@torch.no_grad()
def test_videos_that_are_pruned_give_what_is_recomputed(method, make, frames):
    model, inputs = families.shared(NAME), make(frames)
    with vtprune.prune(model, method, keep_ratio=0.4) as session:
        output = model.generate(
            **inputs, max_new_tokens=NEW, suppress_tokens=[IMAGE], output_logits=True, return_dict_in_generate=True
        )
    report = session.report
    assert report.original_tokens == [24] and report.final_tokens[0] <= 12
    kept = [report.kept(0, layer) for layer in range(report.depth)]
    sources = report.sources(0, 0) if method == "pool" else None
    expected = recompute(model, inputs, output.sequences[0, -NEW:-1], kept, sources=sources)[-NEW:]
    torch.testing.assert_close(torch.cat(output.logits), expected, atol=1e-4, rtol=0)


def test_a_model_that_drops_tokens_of_videos_itself_is_refused():
    model = families.build(NAME)
    model.config.video_pruning_rate = 0.5
    with pytest.raises(vtprune.UnsupportedModelError, match="load it with video_pruning_rate=0"):
        vtprune.prune(model, "divprune", keep_ratio=0.5)


def test_parts():
    model = families.shared(NAME)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False) and adapter.base is model
    assert adapter.language_model is model.language_model.model
