# SPDX-License-Identifier: Apache-2.0
"""A model on paper, without weights, refuses the methods that the model itself refuses, in every family."""

import copy

import pytest
import torch

import vtprune
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.eval.running.estimate import _Asked, _check_inputs
from vtprune.plan import Prompt
from vtprune.testing import families

METHODS = [name for name in vtprune.list_methods() if name != "zero"]
FAMILIES = [name for name in families.NAMES if families.is_available(name) and name not in families.ALWAYS_EAGER]


def on_paper(model):
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        return type(model)._from_config(config, attn_implementation=model.config._attn_implementation)


def refusal(model, method):
    try:
        vtprune.prune(model, method, keep_ratio=0.3)
    except VTPruneError as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_weights_refuses_the_same_methods(family):
    model = families.shared(family)
    paper = on_paper(model)
    assert {name: refusal(paper, name) for name in METHODS} == {name: refusal(model, name) for name in METHODS}


@pytest.mark.parametrize(
    ("family", "kind", "refused"),
    [
        ("llava_onevision", "video", True),
        ("llava_onevision", "image", False),
        ("gemma3", "image", True),
        ("llava", "image", False),
    ],
)
def test_what_a_session_finds_out_from_its_first_inputs_is_found_out_before(family, kind, refused):
    model = families.shared(family)
    (inputs,) = families.batch(family, model, samples=1, media=kind).singles
    session = vtprune.prune(model, "uniform_patches", keep_ratio=0.3, strict=False)
    asked = _Asked(Prompt(1, 1, 1), inputs)

    def problem(call):
        try:
            call()
        except UnsupportedStageError as error:
            return str(error)
        return None

    def run():
        with session, torch.no_grad():
            model(**inputs)

    before = problem(lambda: _check_inputs(vtprune.adapter_for(on_paper(model)), session.methods, kind, [asked]))
    assert before == problem(run)
    assert (before is not None) == refused
