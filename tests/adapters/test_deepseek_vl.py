# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-VL, its hybrid and Janus."""

import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.testing.media import BOS, END, START
from vtprune.tokens import Grid, ModelShape

from .checks import blinkered
from .merging import check_layout, means

TILE, PATCH, HIGH = 24, 4, 32
NAMES = ("deepseek_vl", "deepseek_vl_hybrid", "janus")
every_family = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _there(request):
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("name")
    if not families.is_available(name or "janus"):
        pytest.skip("this release of transformers has no such class")


def images(count, size, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def encode(model, pixels, high=None):
    more = {} if "high_res_vision_config" not in model.config else {"high_res_pixel_values": high}
    return model.model.get_image_features(pixels, **more, return_dict=True).pooler_output


@every_family
@torch.no_grad()
def test_tokens_are_the_patches_in_raster_order(name):
    model, pixels, high = blinkered(name), images(2, TILE), images(2, HIGH, 1)
    adapter = vtprune.adapter_for(model)
    media = adapter.media("image", {"pixel_values": pixels}, encode(model, pixels, high))
    assert [medium.grids for medium in media] == [(Grid(6, 6),)] * 2 and adapter.image_grid == Grid(6, 6)
    depends = check_layout(media, lambda p: encode(model, p, high).flatten(0, 1), pixels, PATCH, side=1)
    seen = []
    adapter.projector.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    last = model.model.get_image_features(
        pixels, **({"high_res_pixel_values": high} if "hybrid" in name else {}), return_dict=True
    ).last_hidden_state
    shown = adapter.projector_inputs("image", {"pixel_values": pixels}, seen[0])
    torch.testing.assert_close(shown, means(depends, last))


@every_family
def test_depths_and_parts(name):
    model = families.shared(name)
    adapter = vtprune.adapter_for(model)
    assert adapter.shape == ModelShape(4, 8, 3, has_cls=False)
    assert adapter.vision_tower() is model.model.vision_model and adapter.projector is model.model.aligner


@torch.no_grad()
@pytest.mark.parametrize("name", ["deepseek_vl_hybrid"])
def test_the_second_encoder_sees_the_same_place(name):
    """A quarter of the larger image moves a token of that quarter most."""
    model, pixels, high = families.build(name), images(1, TILE), images(1, HIGH, 1)
    before = encode(model, pixels, high)[0]
    half = HIGH // 2
    for lower, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        changed = high.clone()
        changed[..., lower * half :, right * half :][..., :half, :half] += 3
        moved = (encode(model, pixels, changed)[0] - before).norm(dim=-1).view(2, 3, 2, 3).sum((1, 3))
        assert divmod(int(moved.argmax()), 2) == (lower, right)


@pytest.mark.parametrize("name", ["deepseek_vl_hybrid"])
def test_flops_of_two_encoders_are_not_counted(name):
    model = families.shared(name)
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session, torch.no_grad():
        model(**families.batch(name, model).inputs)
    assert session.report.encoder_flops is None and "not counted: beside SigLIP there is a SAM" in str(session.report)
    with pytest.raises(vtprune.UnsupportedStageError, match="also made of a place in a second encoder"):
        vtprune.prune(model, "tome", keep_ratio=0.5)


# -- Janus -------------------------------------------------------------------------------------------------------------


def test_what_is_around_an_image_is_no_question():
    model = families.shared("janus")
    ids = families.batch("janus", model).singles[0]["input_ids"]
    visual = torch.where(ids == model.config.image_token_id, 0, -1)
    found = vtprune.adapter_for(model).markers(ids, visual)
    assert ids[found].tolist() == [START, END]


@torch.no_grad()
def test_images_are_generated_as_without_a_session():
    model = families.build("janus")
    settings = model.generation_config
    settings.generation_kwargs, settings.guidance_scale = {"boi_token_id": START}, 3
    model.model.vision_model.config.num_image_tokens = 6
    prompts = {"input_ids": torch.tensor([[BOS, 5, 9, 12, START]]), "attention_mask": torch.ones(1, 5).long()}

    def draw():
        return model.generate(**prompts, generation_mode="image", do_sample=False, use_cache=True)

    expected = draw()
    with vtprune.prune(model, [{"name": "divprune", "keep_ratio": 0.5}, {"name": "fastv", "keep_ratio": 0.3}]):
        assert torch.equal(draw(), expected)
    assert torch.equal(draw(), expected) and expected.shape == (1, 6)
