# SPDX-License-Identifier: Apache-2.0
"""vtprune.plan against numbers worked out by hand, and against a model that ran."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vtprune
from vtprune.errors import BudgetError, UnsupportedStageError
from vtprune.methods import build_methods
from vtprune.methods.base import Method
from vtprune.plan import Prompt, plan
from vtprune.testing import families
from vtprune.tokens import ModelShape

SHAPE = ModelShape(encoder_layers=6, decoder_layers=8, feature_layer=4, has_cls=True)
PROMPT = Prompt(visual=100, crops=4, text=20)
HALF, FASTV = {"name": "uniform", "keep_ratio": 0.5}, {"name": "fastv", "layer": 2, "share": 0.5}


def planned(methods, shape=SHAPE, prompt=PROMPT, **budget):
    return plan(build_methods(methods, **budget), shape, prompt)


@pytest.mark.parametrize(
    "methods, budget, expected",
    [
        ("uniform", {"keep_ratio": 0.25}, [24] * 8),  # 25 tokens a crop, 6 of them kept
        ("uniform", {"keep_ratio": 0.25, "scope": "image"}, [25] * 8),
        ("uniform", {"keep_tokens": 10}, [40] * 8),
        (FASTV, {}, [100, 100, *[50] * 6]),
        ([HALF, FASTV], {}, [48, 48, *[24] * 6]),
        # What only the data decide is taken to meet the budget.
        ("mustdrop", {"keep_ratio": 0.5}, [50] * 8),
        ("mustdrop", {}, None),
    ],
)
def test_tokens_of_every_layer(methods, budget, expected):
    assert planned(methods, **budget) == expected


def test_without_methods_every_layer_has_all_tokens():
    assert plan([], SHAPE, PROMPT) == [100] * 8


def test_masked_tokens_are_still_computed():
    removed, masked = (planned("aim", keep_ratio=0.25, removal=removal) for removal in ("physical", "masking"))
    assert removed[0] == masked[0] == masked[-1] and removed[-1] < removed[0]


def test_what_a_session_would_refuse_is_refused():
    with pytest.raises(BudgetError, match="12.5%"):
        planned("fastv", keep_ratio=0.05, layer=1)
    with pytest.raises(UnsupportedStageError, match="CLS"):
        planned("vtc_cls", ModelShape(6, 8, 5, has_cls=False), keep_ratio=0.5)


def test_a_method_without_a_stage_is_an_error():
    @dataclass(frozen=True, kw_only=True)
    class Stageless(Method):
        name: ClassVar[str] = "stageless"

    with pytest.raises(TypeError, match="stageless: Stageless belongs to no stage"):
        plan([Stageless(keep_ratio=0.5)], SHAPE, PROMPT)


@pytest.mark.parametrize("methods", ["uniform", "transprune", [{"name": "divprune", "keep_ratio": 0.5}, "pdrop"]])
def test_a_model_that_runs_holds_what_was_planned(methods):
    model = families.shared("llava")
    budget = {"keep_ratio": 0.5} if isinstance(methods, str) else {}
    (inputs,) = families.batch("llava", model, samples=1).singles
    with vtprune.prune(model, methods, **budget) as session, torch.no_grad():
        model(**inputs)
    report = session.report
    prompt = Prompt(report.original_tokens[0], 1, report.text_tokens[0])
    assert planned(methods, vtprune.adapter_for(model).shape, prompt, **budget) == report.counts[0].tolist()
