# SPDX-License-Identifier: Apache-2.0
"""Promise 2 over two turns: the second one continues on the kept, pruned cache of the first."""

import pytest
import torch

import vtprune
from vtprune.transformers_private import CACHE

from . import models
from .methods import EVERY, every_method, evicts, numbered, revives, spec
from .models import IMAGE_TOKEN, Prompts, prompts
from .reference import ATOL, cached_columns, depth, generate, kept_columns, recompute

pytestmark = pytest.mark.release

# In-LLM methods choose anew among the second turn's visual tokens; compositions are covered by their parts.
ONE_METHOD = [name for name in EVERY if "+" not in name]


def second_turn(model, first, batch: Prompts, layout: str) -> tuple[dict, Prompts]:
    """Inputs of the second turn, and each sample's whole conversation, unpadded, with the images of both turns."""
    turns = prompts(model, *[layout] * len(batch), seed=9)
    ids = torch.stack([turn[1:] for turn in turns.ids])  # no second BOS
    length = max(map(len, batch.ids))
    answers = first.sequences[:, length:]
    mask = torch.cat([batch.inputs()["attention_mask"], torch.ones_like(answers), torch.ones_like(ids)], 1)
    inputs = {"input_ids": torch.cat([first.sequences, ids], 1), "attention_mask": mask}
    if "I" in layout:
        inputs["pixel_values"] = torch.cat(turns.images)
    whole = Prompts(
        tuple(map(torch.cat, zip(batch.ids, answers, ids, strict=True))),
        tuple(map(torch.cat, zip(batch.images, turns.images, strict=True))),
    )
    return inputs, whole


def check_second_turn(model, whole: Prompts, kept, output, positions, sources=None, cached=None, prompts=None):
    """prompts: lengths of what counts as each sample's prompt, to which `cached` is compared; default all."""
    start = output.sequences.shape[1] - len(output.logits)
    for sample, conversation in enumerate(whole.ids):
        generated = output.sequences[sample, start:]
        expected = recompute(
            model,
            torch.cat([conversation, generated[:-1]]),
            whole.images[sample],
            kept[sample],
            positions,
            sources and sources[sample],
            cached and cached[sample],
            prompt=prompts[sample] if prompts else len(conversation),
        )[len(conversation) - 1 :]
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)


ONE = ("ttIttIttt",)
THREE = ("tItttt", "ttIttItttttt", "tttIttttttttt")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layouts", [ONE, THREE], ids=["one", "batch"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@every_method(without=revives)  # tests/conformance/test_decode.py has their second turn
def test_second_turn_of_text(name, positions, layouts, attention):
    model = models.shared("gqa", attention)
    batch = prompts(model, *layouts)
    methods = spec(name, positions=positions)
    with vtprune.prune(model, methods) as session:
        first = generate(model, batch.inputs(), new_tokens=4)
        report, samples = session.report, range(len(batch))
        kept = [kept_columns(report, batch, sample, depth(model)) for sample in samples]
        cached = [cached_columns(report, batch, sample, depth(model)) for sample in samples]
        sources = [report.sources(sample, 0) for sample in samples]
        inputs, whole = second_turn(model, first, batch, "tttt")
        second = generate(model, inputs, new_tokens=5, **{CACHE: first[CACHE]})
    lengths = [*map(len, batch.ids)]
    check_second_turn(model, whole, kept, second, numbered(methods), sources, cached, lengths)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layouts", [ONE, THREE], ids=["one", "batch"])
@every_method(names=ONE_METHOD, without=lambda name: revives(name) or evicts(name))  # which recompute has one turn only
def test_second_turn_with_another_image(gqa, layouts, name, positions):
    batch, methods = prompts(gqa, *layouts), spec(name, positions=positions)
    with vtprune.prune(gqa, methods) as session:
        first = generate(gqa, batch.inputs(), new_tokens=4)
        kept = [kept_columns(session.report, batch, sample, depth(gqa)) for sample in range(len(batch))]
        sources = [session.report.sources(sample, 0) for sample in range(len(batch))]
        inputs, whole = second_turn(gqa, first, batch, "ttItt")
        second = generate(gqa, inputs, new_tokens=5, **{CACHE: first[CACHE]})
        again = [kept_columns(session.report, batch, sample, depth(gqa)) for sample in range(len(batch))]
    columns = inputs["input_ids"].shape[1]
    for sample, layers in enumerate(again):
        for layer, alive in enumerate(layers):
            new = alive[alive >= first.sequences.shape[1] - batch.first_column(sample)]
            # columns of input_ids as generate() was given them, so the new image lies behind the first answer
            assert len(new) == session.report.counts[sample, layer]
            assert (inputs["input_ids"][sample, new + batch.first_column(sample)] == IMAGE_TOKEN).all()
            assert (new < columns).all()
            if layer == 0:
                into = session.report.sources(sample, 0)
                sources[sample] = torch.cat([sources[sample], into + len(kept[sample][0]) * (into >= 0)])
            kept[sample][layer] = torch.cat([kept[sample][layer], new])
    check_second_turn(gqa, whole, kept, second, numbered(methods), sources)


def test_a_cache_that_was_not_pruned_can_be_continued(gqa):
    """Turn one before the session: its visual tokens stay, those of turn two are pruned."""
    batch = prompts(gqa, "ttIttt")
    first = generate(gqa, batch.inputs(), new_tokens=4)
    inputs, whole = second_turn(gqa, first, batch, "ttItt")
    with vtprune.prune(gqa, spec("vtc_cls", positions="compact")) as session:
        second = generate(gqa, inputs, new_tokens=5, **{CACHE: first[CACHE]})
    old = (batch.ids[0] == IMAGE_TOKEN).nonzero().flatten()
    kept = [torch.cat([old, columns]) for columns in kept_columns(session.report, batch, 0, depth(gqa))]
    check_second_turn(gqa, whole, [kept], second, "compact")
