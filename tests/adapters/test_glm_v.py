# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
import transformers as hf

import vtprune
from vtprune.testing import families
from vtprune.testing.media import IMAGE, MERGE, PATCH, VIDEO_END
from vtprune.transformers_private import CACHE, column_counters

from . import packed
from .checks import blinkered, check_frames_are_asked

NAMES = ("glm46v", "glm4v_moe", "glm_ocr", "glm5_next")

every_family = pytest.mark.parametrize("name", [name for name in NAMES if families.is_available(name)])
with_pools = pytest.mark.skipif(not families.is_available("glm5_next"), reason="not in this release of transformers")
every_kind = pytest.mark.parametrize("kind", ["image", "video"])


def process(name, kind, media):
    prefix = "Glm5Next" if name == "glm5_next" else "Glm46V"
    sizes = dict(patch_size=PATCH, temporal_patch_size=2, merge_size=MERGE, do_resize=False, return_tensors="pt")
    if kind == "image":
        return dict(getattr(hf, f"{prefix}ImageProcessor")()(media, **sizes))
    return dict(getattr(hf, f"{prefix}VideoProcessor")()(media, do_sample_frames=False, **sizes))


SIZES = {"image": [(1, 3, 5), (1, 4, 3)], "video": [(6, 3, 5), (4, 4, 3)]}


@every_kind
@every_family
def test_tokens_stand_for_the_pixels_that_they_show(name, kind):
    model, frames = blinkered(name), 1 if kind == "image" else 2
    packed.check_places(model, kind, lambda media: process(name, kind, media), SIZES[kind], MERGE * PATCH, frames)


@every_kind
@every_family
def test_encoder_values_stand_beside_what_is_made_of_them(name, kind):
    sizes = [(frames, 3 * MERGE * PATCH, 2 * MERGE * PATCH) for frames in ((1, 1) if kind == "image" else (4, 2))]
    media = [torch.randint(0, 200, (f, 3, height, width), dtype=torch.uint8) for f, height, width in sizes]
    inputs = process(name, kind, [m[0] for m in media] if kind == "image" else media)
    packed.check_rows_of_patches(blinkered(name), kind, inputs)


@every_kind
@every_family
def test_encoder_flops(name, kind):
    """GLM-4.xV's MLPs are as wide as the encoder's output; GLM-OCR's as its config's `intermediate_size`."""
    packed.check_encoder_flops(name, kind, families.shared(name, "eager").model.visual.patch_embed)


@every_family
@torch.no_grad()
def test_every_frame_is_asked_what_follows_the_whole_video(name):
    """No time stamp is part of the question, the last one included, which is behind all frames."""
    check_frames_are_asked(name, VIDEO_END)


def test_an_end_of_video_that_is_missing_leaves_the_question():
    model = families.shared("glm46v")
    adapter, ids = vtprune.adapter_for(model), families.batch("glm46v", model, media="video").singles[0]["input_ids"]
    images = torch.where(ids == IMAGE, 0, -1)
    end = int((ids == VIDEO_END).nonzero()[0, 1])
    marked = adapter.markers(ids, images)
    assert bool(marked[0, end]) and bool(marked[0, end - 1]) and not bool(marked[0, end + 1 :].any())
    ids = ids.clone()
    ids[0, end] = 40
    assert not bool(adapter.markers(ids, images)[0, end - 2 :].any())


@every_family
@torch.no_grad()
def test_images_and_videos_do_not_go_together(name):
    """One placeholder stands for both, so the model itself refuses them in one call."""
    model = families.build(name)
    adapter = vtprune.adapter_for(model)
    assert adapter.visual_token_ids == {"image": IMAGE, "video": IMAGE}
    inputs = families.batch(name, model, media="video").singles[0]
    images = families.batch(name, model, media="image").singles[0]
    both = inputs | {key: images[key] for key in ("pixel_values", "image_grid_thw")}
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.5, strict=False),
        pytest.raises(ValueError, match="do not match"),
    ):
        model(**both)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["glm4v", "glmga"])
def test_other_types_of_the_same_family(kind):
    """Classes and configs of other names, which compute the same."""
    model = families.build("glm46v")
    config = {"glm4v": "Glm4vConfig", "glmga": "GlmgaConfig"}[kind]
    if not hasattr(hf, config):
        pytest.skip(f"this release of transformers has no {config}")
    fields = {key: value for key, value in model.config.to_dict().items() if key != "model_type"}
    other = hf.AutoModelForImageTextToText.from_config(getattr(hf, config)(**fields)).eval()
    assert other.config.model_type == kind
    other.load_state_dict(model.state_dict())
    for media in families.MEDIA["glm46v"]:
        inputs, logits = families.batch("glm46v", model, media=media).inputs, []
        for one in (model, other):
            with vtprune.prune(one, "fastv", keep_ratio=0.5) as session:
                logits.append(one(**inputs).logits)
        assert torch.equal(*logits) and session.report.keep_ratio < 0.6


@torch.no_grad()
@with_pools
def test_the_index_of_the_tiny_model_leaves_columns_out():
    """Otherwise the other tests would say nothing about pools of columns."""
    model = families.build("glm5_next")
    inputs = families.batch("glm5_next", model).singles[0]
    chosen = model(**inputs).logits[0, -1]
    for index in column_counters(model.get_decoder()):
        index.index_topk = 60
    assert (model(**inputs).logits[0, -1] - chosen).abs().max() > 1e-2


@torch.no_grad()
@with_pools
def test_the_index_holds_and_counts_the_columns_that_are_left():
    model = families.build("glm5_next")
    batch, seen = families.batch("glm5_next", model), []
    (index, *_) = column_counters(model.get_decoder())
    index.register_forward_hook(lambda module, args, kwargs, chosen: seen.append((kwargs, chosen)), with_kwargs=True)
    with vtprune.prune(model, "divprune", keep_ratio=0.4):
        output = model.generate(**batch.inputs, max_new_tokens=3, return_dict_in_generate=True)
    layer = output[CACHE].layers[index.layer_idx]
    length, stored = batch.inputs["input_ids"].shape[1], layer.keys.shape[2]
    assert layer.get_seq_length() == length + 2 > layer.indexer_keys.shape[1] == stored
    for step, (kwargs, chosen) in enumerate(seen):
        assert kwargs["cache"].layers[index.layer_idx].get_seq_length() == stored
        columns = torch.arange(stored - 2) if step == 0 else torch.tensor([stored - 3 + step])
        assert bool((chosen <= columns[:, None]).all()) and bool((chosen[:, -1] >= 0).any(1).all())


@with_pools
def test_a_static_index_is_refused():
    model = families.shared("glm5_next")
    inputs = families.batch("glm5_next", model).singles[0]
    with (
        vtprune.prune(model, "divprune", keep_ratio=0.4),
        pytest.raises(vtprune.UnsupportedStageError, match="StaticIndexedLayer.*default dynamic cache"),
    ):
        model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
