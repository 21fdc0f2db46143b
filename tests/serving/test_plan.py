# SPDX-License-Identifier: Apache-2.0
"""Counts are known before an image is encoded, and they are those that a session keeps."""

from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.methods import list_methods
from vtprune.methods.base import BeforeLLM
from vtprune.serving.plan import Plan, adapter_of, media_of, tokens_left
from vtprune.serving.setting import method_of, spec_of
from vtprune.testing import families
from vtprune.tokens import Grid, Medium

NAMES = ("llava", "qwen2_5_vl", "internvl", "llava_next", "llava_onevision")


def test_a_plan_travels_as_bytes():
    plan = Plan({"name": "mmtok", "keep_ratio": 0.5}, 4, 9, text=(3, 4), prompt_key=7, within=((2, (5, 6)),))
    packed = plan.pack()
    assert packed.dtype == torch.uint8 and Plan.unpack(packed) == plan
    without = Plan({"name": "divprune"}, 9, 9)
    assert Plan.unpack(without.pack()) == without and not without.prunes and plan.prunes


@pytest.mark.parametrize("name", NAMES)
def test_a_config_alone_gives_the_facts(name):
    """No weights are loaded where requests come in."""
    model = families.shared(name)
    known, made = vtprune.adapter_for(model), adapter_of(model.config)
    assert type(made) is type(known) and made.shape == known.shape
    assert dict(made.visual_token_ids) == dict(known.visual_token_ids)
    assert all(parameter.is_meta for parameter in made.model.parameters())
    assert adapter_of(model.config) is made


BEFORE = [name for name, method in list_methods().items() if issubclass(method, BeforeLLM) and name != "zero"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", BEFORE)
@torch.no_grad()
def test_a_session_keeps_as_many(name, method):
    """A server makes room for so many tokens before it sees the image."""
    model = families.shared(name)
    adapter = vtprune.adapter_for(model)
    inputs = families.batch(name, model).singles[0]
    spec = spec_of({"name": method, "keep_ratio": 0.4})
    try:
        part = method_of(spec, adapter)
    except vtprune.UnsupportedStageError as error:
        pytest.skip(str(error))
    arguments, output = adapter.encode("image", inputs)
    features = adapter.features_of(output)
    media = media_of(adapter, "image", arguments, [len(image) for image in features])
    with vtprune.prune(model, [part]) as session:
        model(**inputs)
    assert sum(tokens_left(medium, part, 1.0) for medium in media) == int(session.report.final_tokens[0])


def test_tiles_of_an_image_are_one_medium():
    adapter = vtprune.adapter_for(families.shared("internvl"))
    (first, second) = media_of(adapter, "image", {"image_num_patches": torch.tensor([3, 1])}, [27, 9])
    assert len(first.grids) == 3 and len(first) == 27 and len(second.grids) == 1
    assert first.crops.tolist() == [0] * 9 + [1] * 9 + [2] * 9


def test_separators_stay_and_crops_have_budgets_of_their_own():
    medium = Medium(
        torch.tensor([0, 0, 0, -1, 1, 1, -1]), (Grid(1, 3), Grid(1, 2)), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    )
    uniform = {"name": "uniform", "keep_separators": True}
    by_crop = vtprune.build_method({**uniform, "keep_ratio": 0.5})
    by_image = vtprune.build_method({**uniform, "keep_ratio": 0.2, "scope": "image"})
    assert tokens_left(medium, by_crop, 1.0) == 2 + 1 + 2
    assert tokens_left(medium, by_image, 1.0) == 1 + 2
    with pytest.raises(UnsupportedStageError, match="keep_separators=true"):
        tokens_left(medium, vtprune.build_method({"name": "uniform", "keep_ratio": 0.5}), 1.0)


def test_more_than_the_server_allows_is_refused():
    medium = Medium.of_grids(Grid(4, 5))
    method = vtprune.build_method({"name": "divprune", "keep_tokens": 11})
    assert tokens_left(medium, method, 0.55) == 11
    with pytest.raises(BudgetError, match="would keep 11 of 20 .* at most 10"):
        tokens_left(medium, method, 0.5)


@pytest.mark.parametrize("spec", [{"name": "zero"}, {"name": "divprune", "keep_tokens": 0}])
def test_an_image_keeps_a_place_in_the_prompt(spec):
    with pytest.raises(BudgetError, match="leaves no place"):
        tokens_left(Medium.of_grids(Grid(4, 5)), vtprune.build_method(spec), 1.0)
