# SPDX-License-Identifier: Apache-2.0
"""Tokens that come back while decoding, beyond `generate` with a greedy choice: the matrix has that on every family."""

import copy

import pytest
import torch
from transformers import DynamicCache

import vtprune
from vtprune.testing import families
from vtprune.transformers_private import CACHE

from .lazy_reference import cuts_of, lazy_recompute

ATOL = 1e-4
NEW = 6
LAZY = vtprune.LazyLLM(keep_ratio=0.5)


@pytest.fixture(scope="module")
def model():
    return families.shared("llava")


@pytest.fixture(scope="module")
def batch(model):
    return families.batch("llava", model)


def generate(model, inputs, **options):
    options = {"max_new_tokens": NEW, "suppress_tokens": [families.IMAGE, families.VIDEO]} | options
    return model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **options)


def test_beams_come_back_to_their_own(model, batch):
    """Beams reorder the cache after every step, and with it all that is known of its slots and stored."""
    inputs = batch.singles[0]
    with vtprune.prune(model, LAZY) as session:
        output = generate(model, inputs, num_beams=3, num_return_sequences=3, max_new_tokens=8, output_scores=True)
        cuts = cuts_of(session.report)
    for sequence, score in zip(output.sequences, output.sequences_scores, strict=True):
        generated = sequence[inputs["input_ids"].shape[1] :]
        logits = lazy_recompute(model, inputs, generated[:-1], cuts).logits
        picked = logits.log_softmax(-1).gather(1, generated[:, None])
        assert abs(float(picked.sum()) / len(generated) - float(score)) < ATOL


def test_sampled_sequences_are_apart(model, batch):
    torch.manual_seed(0)
    with vtprune.prune(model, LAZY) as session:
        output = generate(model, batch.singles[1], do_sample=True, num_return_sequences=3)
        cuts = cuts_of(session.report)
    length = batch.singles[1]["input_ids"].shape[1]
    assert len({tuple(row.tolist()) for row in output.sequences}) == 3
    for row, sequence in enumerate(output.sequences):
        expected = lazy_recompute(model, batch.singles[1], sequence[length:-1], cuts).logits
        torch.testing.assert_close(torch.stack(output.logits, 1)[row], expected, atol=ATOL, rtol=0)


def test_several_tokens_at_once_are_one_step(model, batch):
    """A second turn of text: its last token decides who comes back, all its tokens see them; also right-padded."""
    inputs, cache = batch.inputs, DynamicCache(config=model.config)
    torch.manual_seed(0)
    more = torch.randint(10, 30, (len(batch), 4))
    mask = torch.ones_like(more)
    mask[1, 3:] = 0
    alone = []
    with vtprune.prune(model, LAZY):
        model(**inputs, **{CACHE: cache})
        whole = torch.cat([inputs["attention_mask"], mask], 1)
        together = model(input_ids=more, attention_mask=whole, **{CACHE: cache}).logits
        for row, single in enumerate(batch.singles):
            own, n = DynamicCache(config=model.config), int(mask[row].sum())
            model(**single, **{CACHE: own})
            alone.append(model(input_ids=more[row : row + 1, :n], **{CACHE: own}).logits[0])
    for row, logits in enumerate(alone):
        torch.testing.assert_close(together[row, : len(logits)], logits, atol=ATOL, rtol=0)


def test_what_stays_aside_is_reported(model, batch):
    with vtprune.prune(model, LAZY) as session:
        generate(model, batch.singles[0], max_new_tokens=1)
        first = session.report
        generate(model, batch.singles[0], max_new_tokens=12)
        last = session.report
    after = session.report
    visual = len(first.visual[0])
    assert torch.equal(first.kv_lengths, first.counts + first.text_tokens[0])
    width, dropped = model.config.text_config.hidden_size, visual - first.final_tokens[0]
    assert first.auxiliary_bytes == dropped * width * 4
    assert torch.equal(last.counts, first.counts)
    assert (last.kv_lengths >= first.kv_lengths).all() and (last.kv_lengths > first.kv_lengths).any()
    assert last.auxiliary_bytes < first.auxiliary_bytes and last.kv_bytes > first.kv_bytes
    cached = {tuple(last.cached(0, layer).tolist()) for layer in range(last.depth)}
    assert all(
        set(first.kept(0, layer).tolist()) <= set(last.cached(0, layer).tolist()) for layer in range(first.depth)
    )
    assert len(cached) > 1 and "kept for revival" in str(last)
    assert after.to_dict() == last.to_dict(), "the report stays when the session goes"


def test_merged_before_pruned_and_revived_inside(model, batch):
    """What goes before the LLM never comes back."""
    methods = [vtprune.DivPrune(keep_ratio=0.5, positions="original"), vtprune.LazyLLM(keep_ratio=0.6)]
    with vtprune.prune(model, methods) as session:
        together = generate(model, batch.inputs)
        report = session.report
        for sample, inputs in enumerate(batch.singles):
            alone = generate(model, inputs)
            torch.testing.assert_close(alone.logits[-1][0], together.logits[-1][sample], atol=ATOL, rtol=0)
            entered = set(report.kept(sample, 0).tolist())
            assert all(set(report.cached(sample, layer).tolist()) <= entered for layer in range(report.depth))


@pytest.mark.parametrize(
    ("why", "go"),
    [
        ("use_cache=True", lambda model, batch: generate(model, batch.singles[0], use_cache=False)),
        ("assisted decoding", lambda model, batch: generate(model, batch.singles[0], prompt_lookup_num_tokens=2)),
    ],
)
def test_what_cannot_work_is_refused(model, batch, why, go):
    with vtprune.prune(model, LAZY), pytest.raises(vtprune.UnsupportedStageError, match=why):
        go(model, batch)


def test_images_come_in_one_turn(model, batch):
    cache = DynamicCache(config=model.config)
    with vtprune.prune(model, LAZY):
        model(**batch.singles[0], **{CACHE: cache})
        with pytest.raises(vtprune.UnsupportedStageError, match="one turn"):
            model(**batch.singles[0], **{CACHE: cache})


def test_no_other_method_drops_inside_the_llm(model):
    with pytest.raises(vtprune.ConfigError, match="fastv"):
        vtprune.prune(model, [LAZY, vtprune.FastV(keep_ratio=0.5)])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_turns_of_text_with_positions_of_one_axis(name):
    """Calls without `generate()` come with one row of positions for all axes of M-RoPE."""
    model = families.build(name)
    inputs = families.batch(name, model).singles[0]
    with vtprune.prune(model, LAZY):
        generated = generate(model, inputs, max_new_tokens=6)
        cache = DynamicCache(config=model.config)
        logits = [model(**inputs, **{CACHE: cache}).logits[:, -1]]
        for token in generated.sequences[0, inputs["input_ids"].shape[1] : -1]:
            logits.append(model(input_ids=token.view(1, 1), **{CACHE: cache}).logits[:, -1])
        more = model(input_ids=torch.tensor([[11, 12, 13]]), **{CACHE: cache}).logits
    torch.testing.assert_close(torch.stack(logits), torch.stack(generated.logits), atol=ATOL, rtol=0)
    assert more.isfinite().all() and cache.get_seq_length() == inputs["input_ids"].shape[1] + 5 + 3


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("first", ["generate", "by hand"])
@torch.no_grad()
def test_a_second_turn_with_any_number_of_axes(name, first):
    """What holds three or four rows of positions takes one, three or four: they say the same of text."""
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    with vtprune.prune(model, LAZY):
        if first == "generate":
            turn = generate(model, inputs)
            ids = torch.cat([turn.sequences, torch.tensor([[12, 13]])], 1)
            cache = turn[CACHE]
        else:
            cache = DynamicCache(config=model.config)
            model(**inputs, **{CACHE: cache})
            ids = torch.cat([inputs["input_ids"], torch.tensor([[12, 13, 14]])], 1)
        past = cache.get_seq_length()
        again = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: copy.deepcopy(cache)}
        expected = generate(model, again).logits[0]
        start = past + int(model.model.rope_deltas.flatten()[0])
        one = torch.arange(start, start + ids.shape[1] - past)[None, None]
        for axes in (1, 3, 4):
            call = {"input_ids": ids[:, past:], "position_ids": one.expand(axes, 1, -1), CACHE: copy.deepcopy(cache)}
            torch.testing.assert_close(model(**call).logits[:, -1], expected, atol=ATOL, rtol=0)
