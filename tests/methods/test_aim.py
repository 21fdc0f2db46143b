# SPDX-License-Identifier: Apache-2.0
"""What the conformance matrix leaves out: which tokens go inside the LLM, several rounds of merging, budgets."""

import pytest
import torch
from conformance import families

import vtprune
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.tokens import ModelShape

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
    spans = zip([0, *cuts], [*cuts, 28], [entering, *counts], strict=True)
    assert sum((end - start) * n for start, end, n in spans) / 280_000 == pytest.approx(ratio, abs=1e-3)
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
    """Ranks (n,) from eager weights (heads, n, past + n), which a temperature of 0.1 raises to the tenth power."""
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
    """By the attention that the pruned model itself computes in the layer before every cut."""
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
            more = {"past_key_values": model(**first, use_cache=True).past_key_values, "attention_mask": mask}
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
        # Newline tokens go with their line, not by rank.
        stays = torch.isin(alive, left)
        content = torch.isin(alive, newlines(model, inputs), invert=True)
        if (stays & content).any() and (~stays & content).any():
            assert ranks[stays & content].min() >= ranks[~stays & content].max() * (1 - 1e-4)
            checked += 1
    assert checked >= 2


def newlines(model, inputs):
    """Columns that hold the model's newline embedding."""
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
    """A small budget, for which half of the tokens go more than once."""
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
