# SPDX-License-Identifier: Apache-2.0
"""Promise 2: generation with a pruned cache equals a recompute without cache and without the same tokens."""

import pytest
import torch

import vtprune

from . import models
from .methods import IN_LLM, MERGING, SPECS, on_every_model, spec
from .models import IMAGE_TOKEN, batch_of_three, prompts
from .reference import ATOL, assert_recomputed, depth, expected_steps, generate, kept_columns, recompute

POSITIONS = ("original", "compact")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("positions", POSITIONS)
@on_every_model()
def test_batched_generation_equals_recompute(model_name, name, positions, attention):
    model = models.shared(model_name, attention)
    batch = batch_of_three(model)
    with vtprune.prune(model, spec(name, positions=positions)) as session:
        output = generate(model, batch.inputs())
    counts = session.report.counts
    assert counts.shape == (3, depth(model))
    assert (counts[:, -1] < torch.tensor([1, 2, 1]) * models.tokens_per_image(model)).all()
    assert_recomputed(model, batch, session.report, output, positions, merged=name in MERGING)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["uniform", "transprune-ttv", "vtc_cls+fastv"])
def test_one_sample_without_padding(gqa, name, positions):
    """No padding: masks are None, another path through the model."""
    batch = prompts(gqa, "ttIttttIttt")
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        output = generate(gqa, batch.inputs())
    assert_recomputed(gqa, batch, session.report, output, positions)


def test_the_comparison_can_fail(mha):
    """Wrong positions, one wrong token, one layer off: each moves logits far beyond the tolerance."""
    batch = prompts(mha, "tIttttt")
    with vtprune.prune(mha, spec("fastv", positions="original")) as session:
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


@pytest.mark.parametrize("name", SPECS)
def test_without_a_cache_every_forward_equals_recompute(name):
    """`use_cache=False`: each step is a prefill of its own, with a report of its own."""
    pruned, plain = models.build("gqa"), models.shared("gqa")
    batch = batch_of_three(plain)
    inputs = batch.inputs()
    with vtprune.prune(pruned, spec(name, positions="original")) as session:
        for _ in range(3):
            logits = pruned(**inputs, use_cache=False).logits[:, -1]
            for sample in range(len(batch)):
                kept = kept_columns(session.report, batch, sample, depth(plain))
                sources = session.report.sources(sample, 0) if name in MERGING else None
                ids = inputs["input_ids"][sample, batch.first_column(sample) :]
                expected = recompute(plain, ids, batch.images[sample], kept, "original", sources)[-1]
                torch.testing.assert_close(logits[sample], expected, atol=ATOL, rtol=0)
            logits[:, IMAGE_TOKEN] = float("-inf")
            inputs["input_ids"] = torch.cat([inputs["input_ids"], logits.argmax(-1)[:, None]], 1)
            inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(len(batch), 1).long()], 1)


@pytest.mark.parametrize("name", ["vtc_cls", "divprune", "uniform", "pool", "zero"])
def test_generation_without_a_cache_equals_generation_with_one(gqa, name):
    """For methods that look at the image alone, so that a longer prompt changes nothing they choose."""
    inputs = batch_of_three(gqa).inputs()
    with vtprune.prune(gqa, spec(name)):
        cached, uncached = generate(gqa, inputs), generate(gqa, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", SPECS)
def test_sampling(gqa, name, positions):
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        torch.manual_seed(11)
        output = generate(gqa, batch.inputs(), do_sample=True, temperature=1.5)
    length = max(map(len, batch.ids))
    for sample in range(len(batch)):
        generated = output.sequences[sample, length:]
        expected = expected_steps(gqa, batch, session.report, sample, generated, positions, merged=name in MERGING)
        torch.testing.assert_close(torch.stack(output.logits, 1)[sample], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["vtc_cls", "mmtok", "pool", "zero", *IN_LLM, "vtc_cls+fastv"])
def test_beam_search(gqa, name, positions):
    """The cache is reordered between steps; the winner's score is the recomputed log-likelihood of its tokens."""
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions=positions)) as session:
        greedy = generate(gqa, batch.inputs())
        kept = [kept_columns(session.report, batch, sample, depth(gqa)) for sample in range(len(batch))]
        sources = [session.report.sources(sample, 0) for sample in range(len(batch))] if name in MERGING else [None] * 3
        beams = generate(gqa, batch.inputs(), num_beams=3, output_scores=True, length_penalty=0.0)
    assert not torch.equal(greedy.sequences, beams.sequences)
    length = max(map(len, batch.ids))
    for sample in range(len(batch)):
        generated = beams.sequences[sample, length:]
        ids = torch.cat([batch.ids[sample], generated[:-1]])
        logits = recompute(gqa, ids, batch.images[sample], kept[sample], positions, sources[sample])
        expected = logits[-len(generated) :].log_softmax(-1).gather(1, generated[:, None]).sum()
        torch.testing.assert_close(beams.sequences_scores[sample], expected, atol=10 * ATOL, rtol=0)


@pytest.mark.parametrize("name", ["vtc_cls", "divprune", "uniform"])
def test_beam_search_without_a_cache(gqa, name):
    inputs = batch_of_three(gqa).inputs()
    options = dict(num_beams=3, output_scores=True)
    with vtprune.prune(gqa, spec(name)):
        cached, uncached = generate(gqa, inputs, **options), generate(gqa, inputs, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores, atol=10 * ATOL, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune-both"])
def test_several_sequences_of_each_prompt(gqa, name):
    batch = batch_of_three(gqa)
    with vtprune.prune(gqa, spec(name, positions="compact")) as session:
        generate(gqa, batch.inputs(), new_tokens=1)
        kept = [kept_columns(session.report, batch, sample, depth(gqa)) for sample in range(len(batch))]
        torch.manual_seed(2)
        output = generate(gqa, batch.inputs(), do_sample=True, num_return_sequences=2)
    length = max(map(len, batch.ids))
    for row, sequence in enumerate(output.sequences):
        sample = row // 2
        ids = torch.cat([batch.ids[sample], sequence[length:-1]])
        expected = recompute(gqa, ids, batch.images[sample], kept[sample], "compact")[len(batch.ids[sample]) - 1 :]
        torch.testing.assert_close(torch.stack(output.logits, 1)[row], expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["uniform", "fastv", "transprune-both"])
def test_prompt_lookup_decoding_equals_greedy(gqa, name):
    """Speculative decoding feeds several tokens at once and crops the cache when a guess was wrong."""
    inputs = prompts(gqa, "ttIttttttt").inputs()
    with vtprune.prune(gqa, spec(name)):
        greedy = generate(gqa, inputs, new_tokens=12)
        guessed = generate(gqa, inputs, new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(greedy.sequences, guessed.sequences)


@pytest.mark.parametrize("name", ["vtc_cls", "fastv", "transprune-both"])
def test_step_by_step_by_hand(gqa, name):
    """`model(..., past_key_values=cache)` without generate()."""
    batch = prompts(gqa, "ttIttt")
    with vtprune.prune(gqa, spec(name, positions="original")) as session:
        output = gqa(**batch.inputs(), use_cache=True)
        cache, ids, steps = output.past_key_values, [], []
        for _ in range(4):
            steps.append(output.logits[0, -1])
            ids.append(steps[-1].argmax())
            output = gqa(input_ids=ids[-1].view(1, 1), past_key_values=cache, use_cache=True)
    full = torch.cat([batch.ids[0], torch.stack(ids)])
    kept = kept_columns(session.report, batch, 0, depth(gqa))
    expected = recompute(gqa, full, batch.images[0], kept, "original")[len(batch.ids[0]) - 1 : -1]
    torch.testing.assert_close(torch.stack(steps), expected, atol=ATOL, rtol=0)
