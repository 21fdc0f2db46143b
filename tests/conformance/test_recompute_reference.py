# SPDX-License-Identifier: Apache-2.0
"""The recompute reference is right: it agrees with the unpatched models wherever they can say what is right."""

from __future__ import annotations

import pytest
import torch

from vtprune.adapters import adapter_for
from vtprune.testing import families
from vtprune.testing.recompute import keep_all, prompt_positions, recompute, visual_columns
from vtprune.transformers_private import key_sources

ATOL = 1e-4
NEW = 5
CASES = [(name, media) for name in families.NAMES for media in families.MEDIA[name]]
every_case = pytest.mark.parametrize(("name", "media"), CASES, ids=["-".join(case) for case in CASES])
NO_POSITIONS = ("nemotron_h_omni", "glm5_next")
"""Families whose language model knows tokens by their order alone."""
every_family = pytest.mark.parametrize("name", families.NAMES)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])

NONE = torch.empty(0, dtype=torch.long)


def some(columns: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """About half of the columns, ascending."""
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
    return columns[order[: len(columns) // 2].sort().values]


def assert_same(got, expected, what: str):
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0, msg=lambda m: f"{what}: {m}")


@both_attentions
@every_case
def test_nothing_removed_is_the_unpatched_model(name, media, attention):
    model = families.shared(name, attention)
    batch = families.batch(name, model, media=media)
    output = model.generate(
        **batch.inputs,
        max_new_tokens=NEW,
        suppress_tokens=list(batch.visual_ids),
        output_logits=True,
        return_dict_in_generate=True,
    )
    steps = torch.stack(output.logits, 1)
    for sample, inputs in enumerate(batch.singles):
        assert_same(recompute(model, inputs, NONE, keep_all(model, inputs)), model(**inputs).logits[0], "forward")
        generated = output.sequences[sample, -NEW:]
        logits = recompute(model, inputs, generated[:-1], keep_all(model, inputs))[-NEW:]
        assert_same(steps[sample], logits, f"generated from sample {sample}")
        logits[:, list(batch.visual_ids)] = float("-inf")
        assert generated.tolist() == logits.argmax(-1).tolist()


@both_attentions
@pytest.mark.parametrize(("name", "media"), [case for case in CASES if case[0] in families.PRUNED_INSIDE])
def test_removed_before_the_first_layer_is_hidden_by_a_mask(name, media, attention):
    # The model's own padding mask hides columns from all others: as if they were not there, positions kept. (A state
    # that goes from token to token still changes with each of them.)
    model = families.shared(name, attention)
    inputs = families.batch(name, model, media=media).singles[1]
    visual = visual_columns(model, inputs)
    kept = some(visual)
    hidden = inputs["attention_mask"].clone()
    hidden[0, visual[~torch.isin(visual, kept)]] = 0
    positions = torch.arange(hidden.shape[1])[None]
    if hasattr(model.base_model, "get_rope_index"):
        positions = prompt_positions(model, inputs, 0)
    # The masked columns' own rows are of no interest; a cache of nothing but this call is none.
    expected = model(**inputs | {"attention_mask": hidden}, position_ids=positions, use_cache=False).logits[0]
    got = recompute(model, inputs, NONE, [kept] * len(keep_all(model, inputs)))
    alive = ~torch.isin(torch.arange(len(got)), visual) | torch.isin(torch.arange(len(got)), kept)
    assert got[~alive].isnan().all() and got[alive].isfinite().all()
    assert_same(got[alive], expected[alive], "masked")


@every_family
def test_where_tokens_go_and_which_and_their_positions_all_matter(name):
    model = families.shared(name)
    inputs = families.batch(name, model).singles[0]
    visual, depth = visual_columns(model, inputs), len(adapter_for(model).decoder_layers)
    half, other = some(visual), some(visual, seed=1)
    # Nothing goes behind a layer whose keys are read in later ones.
    sources = key_sources(model.get_decoder().config, depth)
    last = min(source for source in sources if sources.count(source) > 1 or source == depth - 1)
    accounts = {
        "everything": ([visual] * depth, "original"),
        "from the start": ([half] * depth, "original"),
        "compact": ([half] * depth, "compact"),
        "others": ([other] * depth, "original"),
        "one token less": ([visual[1:]] * depth, "original"),
        "from layer 2": ([visual] * 2 + [half] * (depth - 2), "original"),
        "from layer 2, compact": ([visual] * 2 + [half] * (depth - 2), "compact"),
        "from the last layer": ([visual] * last + [half] * (depth - last), "original"),
        "all gone": ([NONE] * depth, "original"),
    }
    if name in NO_POSITIONS:
        accounts = {what: account for what, account in accounts.items() if account[1] == "original"}
    if name in families.CARRY_STATE:  # all layers see the same tokens
        accounts = {what: account for what, account in accounts.items() if len(account[0][0]) == len(account[0][-1])}
    logits = {what: recompute(model, inputs, NONE, *account)[-1] for what, account in accounts.items()}
    for what in logits:
        for another in logits:
            if what < another:
                assert (logits[what] - logits[another]).abs().max() > 1e-2, f"{what} and {another} are the same"


@pytest.mark.parametrize("media", ["image", "video", "mixed"])
def test_deepstack_planes_leave_with_their_tokens(media):
    model = families.shared("qwen3_vl")
    inputs = families.batch("qwen3_vl", model, media=media).singles[0]
    visual, depth = visual_columns(model, inputs), len(adapter_for(model).decoder_layers)
    half = some(visual)
    logits = [recompute(model, inputs, NONE, [visual] * k + [half] * (depth - k))[-1] for k in range(4)]
    for k in range(3):
        assert (logits[k] - logits[k + 1]).abs().max() > 1e-2


@both_attentions
@pytest.mark.parametrize("name", ["gemma3", "paligemma2", "pixtral", "gemma4", "gemma4_31b"])
def test_windows_shorter_than_the_sequence(name, attention):
    model = families.build(name, attention, sliding_window=12)
    inputs = families.batch(name, model).singles[0]
    everything = keep_all(model, inputs)
    output = model.generate(**inputs, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True)
    generated = output.sequences[0, -NEW:-1]
    got = recompute(model, inputs, generated, everything)
    assert_same(torch.cat(output.logits), got[-NEW:], "generated")
    assert_same(recompute(model, inputs, NONE, everything), model(**inputs).logits[0], "forward")
    wide = families.build(name, attention)
    assert (recompute(wide, inputs, generated, everything)[-1] - got[-1]).abs().max() > 1e-2


@every_family
def test_batches_are_ragged_and_hold_each_sample(name):
    model = families.shared(name)
    for media in families.MEDIA[name]:
        for side in ("left", "right"):
            batch = families.batch(name, model, media=media, padding_side=side)
            assert len(batch) == 3 and len(set(batch.pads)) == 3 and min(batch.pads) == 0
            for sample, inputs in enumerate(batch.singles):
                first, length = batch.first_column(sample), inputs["input_ids"].shape[1]
                assert torch.equal(batch.inputs["input_ids"][sample, first : first + length], inputs["input_ids"][0])
                assert int(batch.inputs["attention_mask"][sample].sum()) == length
                assert inputs["attention_mask"].all()


@both_attentions
@pytest.mark.parametrize("name", [name for name in families.NAMES if name not in NO_POSITIONS])
def test_a_wrong_mask_or_position_would_show(name, attention):
    # Negative control of the tolerance: positions off by one for half of the tokens.
    model = families.shared(name, attention)
    inputs = families.batch(name, model).singles[0]
    length = inputs["input_ids"].shape[1]
    logits = model(**inputs).logits[0, -1]
    shifted = torch.arange(length)[None] + (torch.arange(length) >= length // 2).long()
    assert (model(**inputs, position_ids=shifted, use_cache=False).logits[0, -1] - logits).abs().max() > 100 * ATOL
