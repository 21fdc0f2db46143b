# SPDX-License-Identifier: Apache-2.0
"""Fuyu: images as its processor hands them on, all patches of a batch as one."""

import pytest
import torch
from conformance.processors import CASES

import vtprune
from vtprune.testing import families

pytestmark = pytest.mark.skipif(not families.is_available("fuyu"), reason="not installed: what Fuyu needs")
CASE = CASES["fuyu"]
NUMBERS = range(len(CASE.requests))


@pytest.fixture(scope="module")
def model():
    return families.shared("fuyu")


def test_an_image_draws_by_its_own_pixels(model):
    """A random choice is the same in a batch as alone, and another one of other pixels."""
    together = CASE.inputs(*NUMBERS)
    counts = [int((row == model.config.image_token_id).sum()) for row in together["input_ids"]]
    assert together["pixel_values"].shape[0] == sum(counts)
    with vtprune.prune(model, "random", keep_ratio=0.4) as session:
        model(**together)
        report = session.report
        for number in NUMBERS:
            single = CASE.inputs(number)
            model(**single)
            padding = together["input_ids"].shape[1] - single["input_ids"].shape[1]
            assert session.report.original_tokens == [counts[number]]
            assert session.report.kept(0).tolist() == (report.kept(number) - padding).tolist()
            kept = session.report.kept(0).tolist()
            single["pixel_values"] = single["pixel_values"] + 1
            model(**single)
            assert session.report.kept(0).tolist() != kept


def test_patches_by_their_older_name(model):
    with vtprune.prune(model, "divprune", keep_ratio=0.4) as session:
        now = model(**CASE.inputs(*NUMBERS)).logits
        kept = [session.report.kept(number).tolist() for number in NUMBERS]
        inputs = CASE.inputs(*NUMBERS)
        older = model(image_patches=inputs.pop("pixel_values"), **inputs).logits
        assert [session.report.kept(number).tolist() for number in NUMBERS] == kept
    assert torch.equal(now, older)
