# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of sessions, reports and totals are the short tables."""

import pytest
import torch
import transformers

import vtprune
from vtprune.testing import families


@pytest.fixture(scope="module")
def model():
    return families.shared("llava")


def test_of_a_session_and_its_report(model):
    inputs = families.batch("llava", model, samples=1).inputs
    session = vtprune.prune(model, [{"name": "divprune", "keep_ratio": 0.5}, "fastv"])
    assert repr(session).startswith(
        f"vtprune session: divprune + fastv on {type(model).__name__}, not active\n0 prefill"
    )
    with session, torch.no_grad():
        model(**inputs)
        first, *table = repr(session).splitlines()
        assert first.endswith(", active") and table == str(session.totals).splitlines()
    assert repr(session.report) == str(session.report)


def test_totals_are_over_all_calls(model):
    inputs = families.batch("llava", model, samples=1).inputs
    visual = 36
    with vtprune.prune(model, "divprune", keep_ratio=0.5) as session, torch.no_grad():
        model(**inputs)
        model(**inputs)
        model(input_ids=torch.tensor([[5, 6, 7]]))  # the report is of this call alone, which had no image
    assert session.report.keep_ratio == 1.0
    assert session.totals.keep_ratio == 0.5 and session.totals.original_tokens == 2 * visual
    text = session.totals.text_tokens
    lines = repr(session.totals).splitlines()
    assert lines[0] == f"3 prefill(s), 3 sample(s), {text} text tokens"
    assert lines[2].split() == ["visual", "tokens,", "average", "72", "36", "50.0%"]
    assert len(lines) == 4


def test_of_an_encoder_alone():
    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=32, patch_size=8
    )
    encoder = transformers.CLIPVisionModel(config).eval()
    with vtprune.prune(encoder, "tome", r=2) as session, torch.no_grad():
        encoder(torch.zeros(1, 3, 32, 32))
    assert repr(session) == f"vtprune session: tome on CLIPVisionModel, not active\n{session.totals}"
    assert repr(session.report) == str(session.report) and len(repr(session.report).splitlines()) < 8
