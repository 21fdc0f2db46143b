# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: the attention by which tokens are dropped, and how many."""

import pytest
import torch

import vtprune
from vtprune import PyramidDrop
from vtprune.testing import families
from vtprune.tokens import ModelShape


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "paligemma2"])
@torch.no_grad()
def test_what_the_last_token_attends_to_in_the_next_layer_stays(name):
    """A cut before a layer keeps the tokens that the eager weights of this layer name, if nothing was cut earlier."""
    model = families.shared(name, "eager")
    inputs = families.batch(name, model).singles[1]
    length = inputs["input_ids"].shape[1]
    schedule, layers = (0.6, 0.3), (2, 4)
    for cuts in (0, 1):
        weights = []
        attention = model.get_decoder().layers[layers[cuts]].self_attn
        watch = attention.register_forward_hook(lambda module, args, output, into=weights: into.append(output[1][0]))
        if cuts:
            with vtprune.prune(model, PyramidDrop(layers=layers[:cuts], schedule=schedule[:cuts])):
                model(**inputs)
        else:
            model(**inputs)
        watch.remove()
        with vtprune.prune(model, PyramidDrop(layers=layers, schedule=schedule)) as session:
            model(**inputs)
        report = session.report
        before, after = report.kept(0, layers[cuts] - 1), report.kept(0, layers[cuts])
        columns = torch.arange(length)
        columns = columns[~torch.isin(columns, report.visual[0]) | torch.isin(columns, before)]
        row = weights[0].mean(0)[-1]
        assert len(row) == len(columns)
        seen = row[torch.searchsorted(columns, before)]
        assert len(after) == int(len(report.visual[0]) * schedule[cuts])
        left = torch.isin(before, after)
        assert seen[left].min() >= seen[~left].max() - 1e-6


def test_counts_are_shares_of_what_enters():
    shape = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
    method = PyramidDrop()
    assert method.cuts(shape) == (8, 16, 24)
    counts = method.budgets(shape, torch.tensor([576, 49, 3, 0]), torch.tensor([1, 1, 1, 0]))
    assert counts.T.tolist() == [[288, 144, 72], [24, 12, 6], [1, 0, 0], [0, 0, 0]]
    budget = PyramidDrop(keep_ratio=0.4).budgets(shape, torch.tensor([576]), torch.tensor([1]))[:, 0]
    assert 8 * (576 + int(budget.sum())) == pytest.approx(0.4 * 576 * 32, abs=4)
    with pytest.raises(vtprune.BudgetError, match="cannot go under 25.0%"):
        PyramidDrop(keep_ratio=0.2).check_budget(shape)


def test_schedules():
    with pytest.raises(vtprune.ConfigError, match="3 shares that do not increase"):
        PyramidDrop(schedule=(0.5, 0.6, 0.1))
    assert PyramidDrop(layers=(4, 9), schedule=(0.5, 0.25)).shares() == (0.5, 0.25)
