# SPDX-License-Identifier: Apache-2.0
"""What methods say of themselves in the table of methods is how they behave on a tiny model."""

from dataclasses import fields

import pytest
import torch
from conformance.methods import LIBRARY

import vtprune
from vtprune.testing import families
from vtprune.testing.media import FIRST_WORD

QUESTION = 3
"""Tokens at the end of the prompt that are other ones in another prompt."""
SETTINGS = {
    "aim": {"keep_ratio": 0.4},
    "zero": {},
    "mustdrop": {"keep_ratio": 0.6, "similarity": 0.3},
}
THRESHOLDS = {"mustdrop": {"similarity": 0.3}, "token_correlation": {"similarity": 0.5}}
"""Thresholds that random features are on both sides of."""
NO_BUDGET = [name for name in LIBRARY if not vtprune.list_methods()[name].needs_budget and name != "dtd"]
"""All but `dtd`, which keeps an image as it is: tests/ops/test_temporal_change.py has videos."""


@pytest.fixture(scope="module")
def model():
    return families.shared("llava")


def report(model, method, question: int = 0, image: int = 0):
    """The report of a prefill of one image, with one of several questions."""
    inputs = families.batch("llava", model, samples=1).inputs
    generator = torch.Generator().manual_seed(image)
    pixels = torch.randn(inputs["pixel_values"].shape, generator=generator)
    ids = inputs["input_ids"].clone()
    ids[:, -QUESTION:] = FIRST_WORD + (torch.arange(QUESTION) * 5 + question * 7) % 30
    with vtprune.prune(model, method, strict=False) as session, torch.no_grad():
        model(**inputs | {"input_ids": ids, "pixel_values": pixels})
    return session.report


def with_budget(name: str) -> dict:
    return {"name": name} | SETTINGS.get(name, {"keep_ratio": 0.6})


def gone(report) -> list:
    """What is kept at each layer, and where every token went."""
    layers = range(report.counts.shape[1])
    return [(report.kept(0, layer).tolist(), report.sources(0, layer).tolist()) for layer in layers]


@pytest.mark.parametrize("name", LIBRARY)
def test_merging(model, name):
    merged = any(
        sum(source >= 0 for source in sources) > len(kept)
        for image in range(3)
        for kept, sources in gone(report(model, with_budget(name), image=image))
    )
    assert merged == vtprune.list_methods()[name].merges


@pytest.mark.parametrize("name", LIBRARY)
def test_text(model, name):
    method = vtprune.list_methods()[name]
    if any(field.name == "seed" for field in fields(method)):
        pytest.skip("draws differ from prompt to prompt, whatever the method reads")
    first, *others = (
        [gone(report(model, with_budget(name), question, image)) for image in range(3)] for question in range(4)
    )
    assert any(other != first for other in others) == method.text_aware


@pytest.mark.parametrize("name", NO_BUDGET)
def test_counts_without_a_budget(model, name):
    counts = [
        report(model, {"name": name} | THRESHOLDS.get(name, {}), image=image).counts.tolist() for image in range(6)
    ]
    assert any(other != counts[0] for other in counts) == vtprune.list_methods()[name].adaptive
