# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which tokens are dropped inside the LLM, several rounds of merging, budgets."""

import pytest
import torch

import vtprune
from vtprune.methods.base import AfterPrefill
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.testing import families
from vtprune.tokens import ModelShape, Selection
from vtprune.transformers_private import CACHE

SHAPE = ModelShape(encoder_layers=26, decoder_layers=28, feature_layer=25, has_cls=False)
DEPTH = 8


def parts(shape=SHAPE, **fields):
    return vtprune.AIM(**fields).parts(shape)


def test_the_published_setting():
    merge, prune = parts(keep_ratio=0.25 * 18.5 / 28)
    assert merge.keep_ratio == pytest.approx(0.25) and merge.scope == "crop"
    assert prune.cuts(SHAPE) == tuple(range(15, 23))
    assert prune.shares() == tuple(eighths / 8 for eighths in (7, 6, 5, 4, 3, 2, 1, 0))
    counts = prune.budgets(SHAPE, torch.tensor([49 * 32]), torch.tensor([32]))
    assert counts[:, 0].tolist() == [196 * eighths for eighths in (7, 6, 5, 4, 3, 2, 1, 0)]


@pytest.mark.parametrize("ratio", [0.1, 0.4, 0.66, 0.8])
@pytest.mark.parametrize("layers", [None, (0, 3), (20, 28)])
def test_both_stages_together_meet_the_ratio(ratio, layers):
    merge, prune = parts(keep_ratio=ratio, layers=layers)
    assert merge.keep_ratio * prune.keep_ratio == pytest.approx(ratio)
    entering = round(merge.keep_ratio * 10_000)
    counts = prune.budgets(SHAPE, torch.tensor([entering]), torch.tensor([1]))[:, 0].tolist()
    cuts = prune.cuts(SHAPE)
    ranges = zip([0, *cuts], [*cuts, 28], [entering, *counts], strict=True)
    assert sum((end - start) * n for start, end, n in ranges) / 280_000 == pytest.approx(ratio, abs=1e-3)
    assert merge.keep_ratio == 1 or counts[-1] == (0 if layers != (20, 28) else pytest.approx(entering / 8, abs=4))


def test_layers_are_rescaled_and_checked():
    shallow = ModelShape(encoder_layers=4, decoder_layers=DEPTH, feature_layer=3, has_cls=False)
    assert parts(shallow, keep_ratio=0.1)[1].cuts(shallow) == (5, 6)
    assert parts(shallow, keep_ratio=0.1, layers=(5, 8))[1].shares() == pytest.approx((2 / 3, 1 / 3))
    for layers in ((4, 4), (7, 8), (2, 9), (-1, 3)):
        with pytest.raises(vtprune.ConfigError, match="must ascend within 0..8"):
            vtprune.AIM(keep_ratio=0.1, layers=layers).check_budget(shallow)
    with pytest.raises(vtprune.BudgetError, match="needs a budget"):
        vtprune.AIM().check_budget(shallow)


@torch.no_grad()
@pytest.mark.parametrize(("name", "media"), [("llava", "image"), ("llava_next", "image"), ("qwen2_vl", "video")])
@pytest.mark.parametrize("budget", [{"keep_ratio": 0.3}, {"keep_ratio": 0.8}, {"keep_tokens": 1}, {"keep_tokens": 3}])
def test_the_measured_average_is_the_budget(name, media, budget):
    model = families.shared(name)
    batch = families.batch(name, model, media=media)
    with vtprune.prune(model, "aim", **budget) as session:
        model(**batch.inputs)
    report = session.report
    for sample in range(len(batch)):
        content = torch.tensor(report.original_tokens)[sample].item()
        measured = report.counts[sample].float().mean().item()
        if "keep_ratio" in budget and name != "llava_next":  # newlines stay as long as their line
            assert measured / content == pytest.approx(budget["keep_ratio"], abs=0.06)
        elif name == "llava":
            images = len(batch.singles[sample]["pixel_values"])
            assert measured == pytest.approx(images * budget["keep_tokens"], abs=0.5)
        assert measured < content


def page_rank(attention):
    """Ranks (n,) from eager weights (heads, n, past + n). A temperature of 0.1 raises them to the tenth power."""
    sharp = attention.double().pow(10)
    n = sharp.shape[1]
    sharp = (sharp / sharp.sum(-1, keepdim=True))[..., -n:]
    ranks = torch.full((len(sharp), 1, n), 1 / n).double()
    for _ in range(5):
        ranks = ranks @ sharp
    return ranks[:, 0].square().mean(0).sqrt()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "turn"),
    [("llava", 1), ("qwen3_vl", 1), ("gemma3", 1), ("paligemma2", 1), ("llava_onevision", 1)]
    + [("llava", 2), ("gemma3", 2), ("paligemma2", 2)],
)
def test_inside_the_llm_the_lowest_ranks_go_first(name, turn):
    """Tokens are chosen by the attention that the pruned model computes in the layer before every cut."""
    model = families.shared(name, "eager")
    first, inputs, _ = families.batch(name, model).singles
    weights = {}

    def watch(layer):
        return lambda module, args, output: weights.update({layer: output[1][0]})

    layers = model.get_decoder().layers
    with vtprune.prune(model, "aim", keep_ratio=0.5, layers=(2, 6)) as session:
        past, more = 0, {}
        if turn == 2:
            past = first["input_ids"].shape[1]
            mask = torch.ones(1, past + inputs["input_ids"].shape[1], dtype=torch.long)
            more = {CACHE: model(**first, use_cache=True)[CACHE], "attention_mask": mask}
        handles = [layer.self_attn.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
        model(**inputs | more)
        for handle in handles:
            handle.remove()
    report = session.report
    visual = report.visual[0] - past
    text = (~torch.isin(torch.arange(inputs["input_ids"].shape[1]), visual)).nonzero()[:, 0]
    checked = 0
    for cut in range(3, 7):
        alive, left = report.kept(0, cut - 1) - past, report.kept(0, cut) - past
        columns = torch.cat([text, alive]).sort().values
        ranks = page_rank(weights[cut - 1])[torch.searchsorted(columns, alive)]
        # Newline tokens are dropped with their line, not by rank.
        stays = torch.isin(alive, left)
        content = torch.isin(alive, newlines(model, inputs), invert=True)
        if (stays & content).any() and (~stays & content).any():
            assert ranks[stays & content].min() >= ranks[~stays & content].max() * (1 - 1e-4)
            checked += 1
    assert checked >= 2


def newlines(model, inputs):
    """Columns with the model's newline embedding."""
    newline = getattr(model.model, "image_newline", None)
    if newline is None:
        return torch.empty(0, dtype=torch.long)
    seen = {}
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    model(**inputs)
    handle.remove()
    return (seen["inputs_embeds"][0] == newline).all(-1).nonzero()[:, 0]


@torch.no_grad()
def test_each_image_is_merged_in_rounds_of_its_own():
    """A small budget, which needs more than one round of merging half of the tokens."""
    model = families.shared("llava")
    inputs = families.batch("llava", model).singles[1]
    entering = []
    with vtprune.prune(model, "aim", keep_ratio=0.12) as session:
        watch = model.get_decoder().layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        model(**inputs)
        watch.remove()
    report, average = session.report, (5 + 0.5) / DEPTH
    images = model.model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert len(images) == 2
    kept, rows = report.kept(0, 0), []
    for features in images:
        k = round(0.12 / average * len(features))
        assert k < len(features) / 4
        merged = bipartite_merging(features[None], k)
        rows.append(merged.features[0])
    text = (~torch.isin(torch.arange(inputs["input_ids"].shape[1]), report.visual[0])).nonzero()[:, 0]
    places = torch.searchsorted(torch.cat([text, kept]).sort().values, kept)
    torch.testing.assert_close(entering[0][0, places], torch.cat(rows))


# -- masking ----------------------------------------------------------------------------------------------------------


def recomputed(model, inputs, sequences, report):
    """Logits of whole sequences without a cache; each layer hides the visual tokens that it does not keep."""
    length = sequences.shape[1]
    more = length - inputs["input_ids"].shape[1]
    whole = inputs | {"input_ids": sequences}
    for name, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if name in inputs:
            whole[name] = torch.nn.functional.pad(inputs[name], (0, more), value=fill)

    def hide(layer):
        seen = torch.ones(len(sequences), length, dtype=torch.bool)
        for sample, visual in enumerate(report.visual):
            seen[sample, visual] = torch.isin(visual, report.kept(sample, layer))
        seen = seen[:, None, None]

        def hook(module, args, kwargs):
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()
            mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
            return args, kwargs | {"attention_mask": mask}

        return hook

    layers = model.get_decoder().layers
    handles = [layer.register_forward_pre_hook(hide(i), with_kwargs=True) for i, layer in enumerate(layers)]
    logits = model(**whole, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits


LATER_CUT = {"name": "fastv", "layer": 6, "keep_ratio": 0.8, "positions": "original"}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_vl", "gemma3"])
def test_masked_generation_is_a_recompute_under_masks(name, side, attention):
    model = families.shared(name, attention)
    batch = families.batch(name, model, padding_side=side)
    mask = batch.inputs["attention_mask"].clone()
    with vtprune.prune(model, "aim", keep_ratio=0.75, removal="masking") as session:
        prefill = model(**batch.inputs).logits
        if side == "left":
            out = model.generate(**batch.inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
    report, start = session.report, mask.shape[1]
    assert torch.equal(mask, batch.inputs["attention_mask"])
    assert 0 < int(report.counts[:, -1].sum()) < int(report.counts[:, 0].sum())
    sequences = out.sequences if side == "left" else batch.inputs["input_ids"]
    expected = recomputed(model, batch.inputs, sequences, report)
    real = mask.bool()
    torch.testing.assert_close(prefill[real], expected[:, :start][real], atol=1e-4, rtol=1e-4)
    if side == "left":
        logits = torch.stack(out.logits, dim=1)
        torch.testing.assert_close(logits, expected[:, start - 1 : -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_later_removal_takes_what_is_masked_with_it():
    model = families.shared("llava")
    batch = families.batch("llava", model)
    aim = {"name": "aim", "keep_ratio": 0.75, "removal": "masking", "layers": (2, 12)}
    with pytest.raises(vtprune.ConfigError, match="must ascend"):
        vtprune.prune(model, aim)
    aim["layers"] = (2, 7)
    with vtprune.prune(model, [aim, LATER_CUT]) as session:
        out = model.generate(**batch.inputs, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        stored = [layer.physical for layer in out[CACHE].layers]
    report, start = session.report, batch.inputs["input_ids"].shape[1]
    assert stored[5] == start + 3 and stored[6] < stored[5]
    assert (report.counts[:, 5] < report.counts[:, 2]).all() and (report.counts[:, 6] < report.counts[:, 5]).all()
    expected = recomputed(model, batch.inputs, out.sequences, report)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected[:, start - 1 : -1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_masked_tokens_are_reported_as_gone_and_paid_for():
    model = families.shared("llava")
    batch = families.batch("llava", model)
    with vtprune.prune(model, "aim", keep_ratio=0.75, removal="masking") as session:
        cache = model(**batch.inputs)[CACHE]
        masked = session.report
        for sample, alone in enumerate(batch.singles):
            model(**alone)
            first = batch.first_column(sample)
            for layer in range(DEPTH):
                assert masked.kept(sample, layer).tolist() == (session.report.kept(0, layer) + first).tolist()
    with vtprune.prune(model, "aim", keep_ratio=0.75) as session:
        model(**batch.inputs)
    removed = session.report
    assert torch.equal(masked.counts, removed.counts) and masked.keep_ratio < 0.8
    assert masked.kv_bytes == masked.unpruned_kv_bytes > removed.kv_bytes
    assert masked.prefill_flops == masked.unpruned_prefill_flops > removed.prefill_flops
    assert torch.equal(masked.cached(0), masked.visual[0])
    assert (masked.sources(0) == -1).sum() == masked.original_tokens[0] - masked.final_tokens[0]
    assert {layer.physical for layer in cache.layers} == {batch.inputs["input_ids"].shape[1]}


class Evict(AfterPrefill):
    """Keeps three visual tokens in the cache of one layer."""

    name = "evict"
    signal = "-"
    needs_budget = False

    def layers(self, shape):
        return (6,)

    def select(self, tokens):
        return Selection(tokens.valid & (torch.arange(tokens.valid.shape[1]) < 3))


@torch.no_grad()
def test_what_is_masked_is_held_until_it_is_evicted():
    model = families.shared("llava")
    first, *_ = families.batch("llava", model).singles
    with vtprune.prune(model, [vtprune.AIM(keep_ratio=0.75, removal="masking"), Evict()]) as session:
        cache = model(**first)[CACHE]
        report, length = session.report, first["input_ids"].shape[1]
    text = length - len(report.visual[0])
    stored = [layer.physical for layer in cache.layers]
    assert report.kv_lengths[0].tolist() == stored
    assert stored[6] == text + 3 and stored[5] == stored[7] == length
    assert report.cached(0, 6).tolist() == report.kept(0, 6)[:3].tolist()


@torch.no_grad()
def test_what_is_masked_stays_masked_in_the_next_turn():
    """A second prompt on the same cache sees the tokens of the first prompt that the first prompt saw."""
    model = families.shared("llava")
    first, second, _ = families.batch("llava", model).singles
    text = second["input_ids"][:, -4:]
    logits = {}
    for removal in ("masking", "physical"):
        # With one cut, the ranks that removed tokens would pass on have no effect.
        with vtprune.prune(model, "aim", keep_ratio=0.95, removal=removal, layers=(6, 8)) as session:
            cache = model(**first, use_cache=True)[CACHE]
            kept = session.report.kept(0, 7).tolist()
            mask = torch.ones(1, cache.get_seq_length() + 4, dtype=torch.long)
            logits[removal] = kept, model(input_ids=text, attention_mask=mask, **{CACHE: cache}).logits
    assert logits["masking"][0] == logits["physical"][0]
    torch.testing.assert_close(logits["masking"][1], logits["physical"][1], atol=1e-4, rtol=1e-4)
    with vtprune.prune(model, "aim", keep_ratio=1.0):
        cache = model(**first, use_cache=True)[CACHE]
        unpruned = model(input_ids=text, attention_mask=mask, **{CACHE: cache}).logits
    assert not torch.allclose(unpruned, logits["masking"][1], atol=1e-3)
