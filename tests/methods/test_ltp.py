# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: thresholds, and the attention by which tokens are dropped."""

import pytest
import torch

import vtprune
from vtprune.testing import families
from vtprune.tokens import ModelShape

DEPTH = 8
SHAPE = ModelShape(encoder_layers=4, decoder_layers=DEPTH, feature_layer=3, has_cls=False)


@torch.no_grad()
def run(name, **settings):
    """The report of a pruned prefill of one prompt and, for each layer but the last, the visual tokens alive there and
    what they receive: the sum of the eager weights (heads, n, n) over rows, the mean over heads."""
    model = families.shared(name, "eager")
    inputs = families.batch(name, model).singles[1]
    weights = {}

    def watch(layer):
        return lambda module, args, output: weights.update({layer: output[1][0]})

    layers = model.get_decoder().layers
    with vtprune.prune(model, "ltp", **settings) as session:
        handles = [layer.self_attn.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
        model(**inputs)
        for handle in handles:
            handle.remove()
    report = session.report
    text = (~torch.isin(torch.arange(inputs["input_ids"].shape[1]), report.visual[0])).nonzero()[:, 0]
    received = []
    for layer in range(DEPTH - 1):
        alive = report.kept(0, layer)
        columns = torch.cat([text, alive]).sort().values
        assert weights[layer].shape[1:] == (len(columns), len(columns))
        received.append((alive, weights[layer].sum(1).mean(0)[torch.searchsorted(columns, alive)]))
    return report, received


@pytest.mark.parametrize("threshold", [1.0, 2.0])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "paligemma2"])
def test_what_receives_less_than_the_threshold_of_its_layer_goes(name, threshold):
    report, received = run(name, threshold=threshold)
    dropped = 0
    for layer, (alive, shares) in enumerate(received):
        limit = threshold * layer / DEPTH
        left = torch.isin(alive, report.kept(0, layer + 1))
        assert (shares[left] >= limit - 1e-4).all() and (shares[~left] < limit + 1e-4).all()
        dropped += int((~left).sum())
    assert dropped > 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_the_reference_dilutes_scores_by_padding_and_takes_thresholds_as_they_are(name):
    """Sums of the eager weights over the real rows, divided by the length of the padded batch."""
    model = families.shared(name, "eager")
    batch = families.batch(name, model)
    padded = batch.inputs["input_ids"].shape[1]
    assert batch.pads[0] > 0 and batch.padding_side == "left"
    weights = {}

    def watch(layer):
        return lambda module, args, output: weights.update({layer: output[1]})

    layers = model.get_decoder().layers
    with vtprune.prune(model, "ltp", threshold=0.03, reference_quirks=True) as session:
        handles = [layer.self_attn.register_forward_hook(watch(i)) for i, layer in enumerate(layers)]
        model(**batch.inputs)
        for handle in handles:
            handle.remove()
    report, outcomes = session.report, set()
    for sample, pads in enumerate(batch.pads):
        text = (~torch.isin(torch.arange(pads, padded), report.visual[sample])).nonzero()[:, 0] + pads
        for layer in range(DEPTH - 1):
            alive = report.kept(sample, layer)
            columns = torch.cat([text, alive]).sort().values
            own = weights[layer][sample, :, -len(columns) :, -len(columns) :]
            scores = own.mean(0).sum(0)[torch.searchsorted(columns, alive)] / padded
            left = torch.isin(alive, report.kept(sample, layer + 1))
            limit = max(0.03 * layer / DEPTH, 1e-5)
            assert (scores[left] >= limit - 1e-6).all() and (scores[~left] < limit + 1e-6).all()
            outcomes.update(left.tolist() if layer else [])
    assert outcomes == {True, False}


def test_without_a_threshold_all_stay():
    with pytest.raises(vtprune.NothingPrunedError):
        run("llava", threshold=0)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "paligemma2"])
@pytest.mark.parametrize("ratio", [0.3, 0.7])
def test_with_a_budget_those_that_receive_least_go(name, ratio):
    report, received = run(name, keep_ratio=ratio)
    counts = report.counts[0].float()
    assert counts.mean() / counts[0] == pytest.approx(ratio, abs=0.02)
    cuts = 0
    for layer, (alive, shares) in enumerate(received):
        left = torch.isin(alive, report.kept(0, layer + 1))
        if left.any() and not left.all():
            assert shares[left].min() >= shares[~left].max() - 1e-5
            cuts += 1
    assert cuts >= 3


def test_budgets():
    budgets = vtprune.LTP(keep_ratio=0.5).budgets(SHAPE, torch.tensor([80, 0]), torch.tensor([1, 0]))
    assert budgets[:, 1].tolist() == [0] * 7
    assert (80 + int(budgets[:, 0].sum())) / 8 == 40 and (budgets[:, 0].diff() <= 0).all()
    by_count = vtprune.LTP(keep_tokens=20).budgets(SHAPE, torch.tensor([80]), torch.tensor([2]))
    assert torch.equal(by_count[:, 0], budgets[:, 0])
    with pytest.raises(vtprune.BudgetError, match="larger than the image"):
        vtprune.LTP(keep_tokens=50).budgets(SHAPE, torch.tensor([80]), torch.tensor([2]))
    with pytest.raises(vtprune.BudgetError, match="cannot go under 12.5%"):
        vtprune.LTP(keep_ratio=0.1).check_budget(SHAPE)
    with pytest.raises(vtprune.ConfigError, match="threshold"):
        vtprune.LTP(threshold=-1)
