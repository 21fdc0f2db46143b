# SPDX-License-Identifier: Apache-2.0
"""Promise 2: generation with a pruned cache equals a recompute without cache and without the same tokens."""

import pytest
import torch

import vtprune
from vtprune.transformers_private import CACHE

from . import models
from .methods import every_method, every_method_and_model, evicts, numbered, revives, spec
from .models import IMAGE_TOKEN, Prompts, batch_of_three, prompts
from .reference import (
    ATOL,
    assert_method_recomputed,
    assert_recomputed,
    cached_columns,
    depth,
    expected_steps,
    generate,
    kept_columns,
    recompute,
)

POSITIONS = ("original", "compact")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@every_method_and_model()
def test_batched_generation_equals_recompute(model_name, name, positions, attention):
    model = models.shared(model_name, attention)
    batch = batch_of_three(model)
    with vtprune.prune(model, spec(name, positions=positions)) as session:
        output = generate(model, batch.inputs())
    counts = session.report.counts
    assert counts.shape == (3, depth(model))
    assert (counts[:, -1] < torch.tensor([1, 2, 1]) * models.tokens_per_image(model)).all()
    assert_method_recomputed(model, batch, session.report, output, name, positions)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@every_method()
def test_one_sample_without_padding(name, positions, attention):
    """No padding: masks are None, another path through the model."""
    model = models.shared("gqa", attention)
    batch = prompts(model, "ttIttttIttt")
    with vtprune.prune(model, spec(name, positions=positions)) as session:
        output = generate(model, batch.inputs())
    assert_method_recomputed(model, batch, session.report, output, name, positions)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune", "vtc_cls+fastv"])
def test_without_a_mask(gqa, name, positions, use_cache):
    """With neither mask nor cache transformers takes gaps in the positions for packed sequences."""
    batch = prompts(gqa, "ttIttttIttt")
    inputs = batch.inputs()
    del inputs["attention_mask"]
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        logits = gqa(**inputs, use_cache=use_cache).logits[0]
    kept = kept_columns(session.report, batch, 0, depth(gqa))
    expected = recompute(gqa, batch.ids[0], batch.images[0], kept, positions)
    alive = ~expected.isnan().any(-1)
    torch.testing.assert_close(logits[alive], expected[alive], atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["uniform", "zero", "fastv", "transprune-iga", "mmtok"])
def test_prompt_that_ends_with_the_image(gqa, name, positions):
    """The first token is predicted by the last column that survived, whichever that is."""
    batch = prompts(gqa, "ttI", "tttttI")
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        output = generate(gqa, batch.inputs())
    for sample, prompt in enumerate(batch.ids):
        generated = output.sequences[sample, -len(output.logits) :]
        kept = kept_columns(session.report, batch, sample, depth(gqa))
        logits = recompute(gqa, torch.cat([prompt, generated[:-1]]), batch.images[sample], kept, positions)
        expected = logits[~logits.isnan().any(-1)][-len(generated) :]
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("second", ["fastv", "transprune"])
def test_compact_before_the_llm_then_original_inside_it(mha, second):
    """Each method of a list has positions of its own: the first renumbers, the second leaves that numbering alone."""
    methods = spec("vtc_cls", positions="compact") + spec(second, positions="original")
    batch = batch_of_three(mha)
    with vtprune.prune(mha, methods) as session:
        output = generate(mha, batch.inputs())
    assert_recomputed(mha, batch, session.report, output, "compact once")


def test_the_comparison_can_fail(mha):
    """Wrong positions, one wrong token, one layer off: each moves logits far beyond the tolerance."""
    batch = prompts(mha, "tIttttt")
    with vtprune.prune(mha, spec("fastv", positions="original", layer=2)) as session:
        output = generate(mha, batch.inputs())
    ids = torch.cat([batch.ids[0], output.sequences[0, len(batch.ids[0]) : -1]])
    kept = kept_columns(session.report, batch, 0, depth(mha))
    got = torch.stack(output.logits, 1)[0]

    def error(kept, positions="original"):
        expected = recompute(mha, ids, batch.images[0], kept, positions)[-len(got) :]
        return (got - expected).abs().max().item()

    dropped = next(column for column in kept[0].tolist() if column not in kept[-1].tolist())
    other = [*kept[:2], *(torch.cat([k[1:], torch.tensor([dropped])]).sort().values for k in kept[2:])]
    assert error(kept) < ATOL
    assert error(kept, "compact") > 100 * ATOL
    assert error(other) > 100 * ATOL
    assert error([kept[0], *kept[2:], kept[-1]]) > 100 * ATOL


@every_method(without=evicts)  # from a cache
def test_without_a_cache_every_forward_equals_recompute(name):
    """`use_cache=False`: each step is a prefill of its own, with a report of its own."""
    pruned, plain = models.build("gqa"), models.shared("gqa")
    batch = batch_of_three(plain)
    inputs = batch.inputs()
    methods = spec(name, positions="original")
    with vtprune.prune(pruned, methods) as session:
        for _ in range(3):
            logits = pruned(**inputs, use_cache=False).logits[:, -1]
            for sample in range(len(batch)):
                kept = kept_columns(session.report, batch, sample, depth(plain))
                sources = session.report.sources(sample, 0)
                ids = inputs["input_ids"][sample, batch.first_column(sample) :]
                expected = recompute(plain, ids, batch.images[sample], kept, "original", sources)[-1]
                torch.testing.assert_close(logits[sample], expected, atol=ATOL, rtol=0)
            logits[:, IMAGE_TOKEN] = float("-inf")
            inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1)[:, None]], 1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(len(batch), 1).long()], 1)


@every_method(without=lambda name: revives(name) or evicts(name))  # which need one
def test_generation_without_a_cache_equals_generation_with_one(gqa, name):
    """generate() then sends the growing sequence each time; what its first call chose holds for the whole answer."""
    inputs = batch_of_three(gqa).inputs()
    with vtprune.prune(gqa, spec(name)):
        cached, uncached = generate(gqa, inputs), generate(gqa, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@every_method()
def test_sampling(gqa, name, positions):
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        torch.manual_seed(11)
        output = generate(gqa, batch.inputs(), do_sample=True, temperature=1.5)
    length = max(map(len, batch.ids))
    numbers = "original" if revives(name) else numbered(spec(name, positions=positions))
    for sample in range(len(batch)):
        generated = output.sequences[sample, length:]
        expected = expected_steps(gqa, batch, session.report, sample, generated, numbers, revives=revives(name))
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@every_method(without=revives)  # tests/conformance/test_decode.py has their beams
def test_beam_search(gqa, name, positions):
    """The cache is reordered between steps; the winner's score is the recomputed log-likelihood of its tokens."""
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        beams = generate(gqa, batch.inputs(), num_beams=3, output_scores=True, length_penalty=0.0)
    numbers = numbered(spec(name, positions=positions))
    assert len(session.report.counts) == len(batch), "a sample stands for all its beams"
    length = max(map(len, batch.ids))
    for sample in range(len(batch)):
        generated = beams.sequences[sample, length:]
        ids = torch.cat([batch.ids[sample], generated[:-1]])
        kept = kept_columns(session.report, batch, sample, depth(gqa))
        cached = cached_columns(session.report, batch, sample, depth(gqa))
        sources, prompt = session.report.sources(sample, 0), len(batch.ids[sample])
        logits = recompute(gqa, ids, batch.images[sample], kept, numbers, sources, cached, prompt=prompt)
        expected = logits[-len(generated) :].log_softmax(-1).gather(1, generated[:, None]).sum()
        torch.testing.assert_close(beams.sequences_scores[sample], expected, atol=10 * ATOL, rtol=0)


@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "fastv", "transprune"])
def test_beam_search_without_a_cache(gqa, name):
    inputs = batch_of_three(gqa).inputs()
    options = dict(num_beams=3, output_scores=True)
    with vtprune.prune(gqa, spec(name)):
        cached, uncached = generate(gqa, inputs, **options), generate(gqa, inputs, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=10 * ATOL, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune"])
def test_several_sequences_of_each_prompt(gqa, name):
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions="compact")) as session:
        torch.manual_seed(2)
        output = generate(gqa, batch.inputs(), do_sample=True, num_return_sequences=2)
    length = max(map(len, batch.ids))
    for row, sequence in enumerate(output.sequences):
        sample = row // 2
        ids = torch.cat([batch.ids[sample], sequence[length:-1]])
        kept = kept_columns(session.report, batch, sample, depth(gqa))
        expected = recompute(gqa, ids, batch.images[sample], kept, "compact")[len(batch.ids[sample]) - 1 :]
        torch.testing.assert_close(torch.stack(output.logits, 1)[row], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune"])
def test_prompt_lookup_decoding_equals_greedy(gqa, name):
    """Speculative decoding feeds several tokens at once and crops the cache when a guess was wrong."""
    inputs = prompts(gqa, "ttIttttttt").inputs()
    with vtprune.prune(gqa, spec(name)):
        greedy = generate(gqa, inputs, new_tokens=12)
        guessed = generate(gqa, inputs, new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)


def continue_by_hand(model, batch: Prompts, steps: int, forced: int | None = None):
    """A generator that feeds one token a time without generate(), and yields (ids, logits) so far after each."""
    output = model(**batch.inputs(), use_cache=True)
    ids, logits = [], []
    for _ in range(steps):
        logits.append(output.logits[0, -1])
        ids.append(logits[-1].argmax() if forced is None else torch.tensor(forced))
        yield torch.stack(ids), torch.stack(logits)
        output = model(input_ids=ids[-1].view(1, 1), **{CACHE: output[CACHE]}, use_cache=True)


def assert_by_hand(model, batch: Prompts, kept, ids, logits):
    prompt = batch.ids[0]
    expected = recompute(model, torch.cat([prompt, ids[:-1]]), batch.images[0], kept, "original", prompt=len(prompt))
    torch.testing.assert_close(logits, expected[len(batch.ids[0]) - 1 :], atol=ATOL, rtol=0)


@pytest.mark.parametrize("forced", [None, IMAGE_TOKEN], ids=["greedy", "image-token"])
@pytest.mark.parametrize("name", ["vtc_cls", "fastv", "transprune"])
def test_step_by_step_by_hand(gqa, name, forced):
    """Calls on a cache; an image token that the model itself generates is text."""
    batch = prompts(gqa, "ttIttt")
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        *_, (ids, logits) = continue_by_hand(gqa, batch, 5, forced)
    assert_by_hand(gqa, batch, kept_columns(session.report, batch, 0, depth(gqa)), ids, logits)


@pytest.mark.parametrize("name", ["vtc_cls", "fastv", "transprune"])
def test_two_generations_that_take_turns(gqa, name):
    """What a generation needs to go on belongs to its cache, not to the session."""
    batches = [prompts(gqa, "ttIttt", seed=1), prompts(gqa, "tItIttttt", seed=2)]
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        kept, running = [], []
        for batch in batches:
            running.append(continue_by_hand(gqa, batch, 5))
            next(running[-1])
            kept.append(kept_columns(session.report, batch, 0, depth(gqa)))
        for _ in range(4):
            results = [next(generation) for generation in running]
    for batch, columns, (ids, logits) in zip(batches, kept, results, strict=True):
        assert_by_hand(gqa, batch, columns, ids, logits)
