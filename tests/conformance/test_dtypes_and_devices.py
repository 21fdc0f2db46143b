# SPDX-License-Identifier: Apache-2.0
"""Half precision, and weights that accelerate moves about."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import vtprune

from . import models
from .methods import MERGING, SPECS, on_every_model, spec
from .models import batch_of_three
from .reference import assert_recomputed, expected_steps, generate


@on_every_model()
def test_bfloat16(model_name, name):
    model = models.build(model_name, dtype=torch.bfloat16)
    batch = batch_of_three(model)
    inputs = batch.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vtprune.prune(model, spec(name, positions="compact")) as session:
        output = generate(model, inputs, new_tokens=4)
    exact = models.shared(model_name)
    with vtprune.prune(exact, spec(name, positions="compact")) as reference:
        generate(exact, batch.inputs(), new_tokens=1)
    assert torch.equal(session.report.counts, reference.report.counts)
    length = max(map(len, batch.ids))
    for sample in range(3):
        generated = output.sequences[sample, length:]
        expected = expected_steps(exact, batch, session.report, sample, generated, "compact", merged=name in MERGING)
        got = torch.stack(output.logits, 1)[sample].float()
        # eight bits of mantissa through six or eight layers: alike, not equal
        assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.95


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("place", ["dispatch", "offload"])
def test_accelerate(name, place):
    """accelerate replaces `forward` of every module; offloaded weights are on the meta device between uses."""
    model = models.build("gqa")
    if place == "dispatch":
        model = dispatch_model(model, {"": "cpu"}, force_hooks=True)
    else:
        cpu_offload(model, execution_device=torch.device("cpu"))
    plain = models.shared("gqa")
    batch = batch_of_three(plain)
    with vtprune.prune(model, spec(name, positions="original")) as session:
        output = generate(model, batch.inputs(), new_tokens=4)
    assert_recomputed(plain, batch, session.report, output, "original", merged=name in MERGING)
