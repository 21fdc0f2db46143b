# SPDX-License-Identifier: Apache-2.0
"""Half precision, and weights that accelerate moves about."""

import copy
import functools

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import vtprune
from vtprune.methods.in_layers import InLayers
from vtprune.testing import families
from vtprune.testing.recompute import recompute

from . import matrix, models
from .lazy_reference import separators
from .matrix import CELLS, in_turns
from .methods import acts, every_method, every_method_and_model, numbered, revives, spec
from .models import batch_of_three
from .reference import assert_method_recomputed, expected_steps, generate


@every_method_and_model()
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
    numbers = "original" if revives(name) else numbered(spec(name, positions="compact"))
    for sample in range(3):
        generated = output.sequences[sample, length:]
        expected = expected_steps(exact, batch, session.report, sample, generated, numbers, revives=revives(name))
        got = torch.stack(output.logits, 1)[sample].float()
        # eight bits of mantissa through six or eight layers: alike, not equal
        assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.95


# tests/encoders has half precision inside the encoder.
BEHIND_ENCODER = [cell for cell in CELLS if in_turns(*cell) and not acts(cell[2], InLayers)]


JUMPY = (
    ("internvl_gpt_oss", "mustdrop"),
    ("llama4", "holitom + transprune"),
    ("dots3_note", "uniform_frames"),
)
"""Cells whose logits jump in bfloat16, where they agree in float32: a near tie between experts. Counts are compared."""


RESTLESS = ("muse_spark", "kimi_k25", "mistral_small4", "mistral_large4")
"""Families whose unpruned tiny models already give a padded batch other logits in bfloat16 than its samples alone."""


@functools.cache
def half(name):
    return copy.deepcopy(families.shared(name)).bfloat16()


def to_half(inputs):
    floats = {key: value for key, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    return inputs | {key: value.bfloat16() for key, value in floats.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "media", "method"), BEHIND_ENCODER, ids=["-".join(cell) for cell in BEHIND_ENCODER])
@torch.no_grad()
def test_bfloat16_on_every_family(name, media, method):
    """As many tokens as in float32, and the answer's first logits near those of a recompute without them."""
    model, exact, methods = half(name), families.shared(name), spec(method, positions="original")
    if matrix.refusal(model, methods) is not None:
        return
    batch = families.batch(name, model, media=media)
    given = batch.inputs
    if name == "ministral3":  # scales queries by positions, which a plain call counts from the padding on
        given = given | {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    with vtprune.prune(model, methods) as session:
        logits = model(**to_half(given)).logits
    report = session.report
    with vtprune.prune(exact, methods) as reference:
        exact(**given)
    for sample, inputs in enumerate(batch.singles):
        first, layers = batch.first_column(sample), range(report.depth)
        kept = [report.kept(sample, layer) - first for layer in layers]
        lines = separators(exact, inputs)  # how many of them go depends on which tokens do
        for ours, layer in zip(kept, layers, strict=True):
            theirs = reference.report.kept(sample, layer) - first
            assert len(set(ours.tolist()) - lines) == len(set(theirs.tolist()) - lines)
        if (name, method) in JUMPY or name in RESTLESS:
            continue
        sources = report.sources(sample, 0)
        nothing = torch.empty(0, dtype=torch.long)
        expected = recompute(model, to_half(inputs), nothing, kept, "original", sources)[-1]
        assert torch.nn.functional.cosine_similarity(logits[sample, -1].float(), expected.float(), dim=-1) > 0.98


@every_method()
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
    assert_method_recomputed(plain, batch, session.report, output, name, "original")
