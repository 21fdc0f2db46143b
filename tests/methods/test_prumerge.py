# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: counts without a budget, and what is merged."""

import pytest
import torch

import vtprune
from vtprune.methods.prumerge import WideAttention
from vtprune.signals import EncoderKeys
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
LENGTHS = (48, 30, 0)


def crops(k: int) -> VisualTokens:
    """Three crops of LENGTHS tokens; 5 and 20 are outliers of the first, 7 of the second."""
    generator = torch.Generator().manual_seed(0)
    attention = torch.rand(3, 48, generator=generator).div_(100) + 0.01
    attention[0, [5, 20]], attention[1, 7] = 0.3, 0.3
    valid = torch.arange(48) < torch.tensor(LENGTHS)[:, None]
    features = torch.randn(3, 48, 4, generator=generator)
    return VisualTokens(
        features=features.masked_fill(~valid[..., None], 0.0),
        valid=valid,
        budget=torch.full((3,), k) if k < 0 else torch.tensor(LENGTHS).clamp(max=k),
        signals={WideAttention(23): attention, EncoderKeys(23): torch.randn(3, 48, 6, generator=generator)},
        shape=SHAPE,
    )


def test_without_a_budget_outliers_say_how_many():
    selection = vtprune.PruMerge().select(crops(-1))
    assert selection.keep.sum(1).tolist() == [2 + 1, 1 + 1, 0]
    assert selection.keep[0, [5, 20]].all() and selection.keep[1, 7]
    plus = vtprune.PruMergePlus(merge=False).select(crops(-1)).keep
    assert plus[0].nonzero()[:, 0].tolist() == sorted({5, 20, *range(0, 47, 8)})
    assert plus[1].nonzero()[:, 0].tolist() == sorted({7, *range(0, 29, 10)})


@pytest.mark.parametrize("method", [vtprune.PruMerge, vtprune.PruMergePlus])
@pytest.mark.parametrize("k", [1, 2, 9, 30, 47, 48])
@pytest.mark.parametrize("merge", [True, False])
def test_budgets_are_met(method, k, merge):
    tokens = crops(k)
    selection = method(keep_tokens=k, merge=merge).choose(tokens)
    assert selection.keep.sum(1).tolist() == [min(k, length) for length in LENGTHS]
    if k >= 30:  # nothing to merge
        assert selection.features is None or torch.equal(selection.features[1], tokens.features[1])


def test_what_a_token_becomes():
    tokens = crops(3)
    selection = vtprune.PruMerge(keep_tokens=3, neighbours=2).select(tokens)
    attention, keys = (tokens[signal][0] for signal in (WideAttention(23), EncoderKeys(23)))
    directions = torch.nn.functional.normalize(keys, dim=1)
    for token in (5, 20):
        likeness = directions @ directions[token]
        likeness[token] = -2
        near = likeness.topk(2).indices
        weights = torch.cat((torch.ones(1), attention[near]))
        members = tokens.features[0, torch.cat((torch.tensor([token]), near))]
        torch.testing.assert_close(selection.features[0, token], (weights @ members) / weights.sum())
    left = torch.ones(48).index_fill(0, torch.tensor([5, 20]), 0) * attention
    place = int(left.argmax())
    assert selection.keep[0].nonzero()[:, 0].tolist() == sorted([5, 20, place])
    torch.testing.assert_close(selection.features[0, place], left @ tokens.features[0] / left.sum())
    assert set(selection.sources[0].tolist()) == {5, 20, place}


def test_a_crop_is_pruned_as_if_alone():
    together = vtprune.PruMerge().select(crops(-1))
    tokens = crops(-1)
    alone = VisualTokens(
        features=tokens.features[1:2, :30],
        valid=tokens.valid[1:2, :30],
        budget=tokens.budget[1:2],
        signals={key: values[1:2, :30] for key, values in tokens.signals.items()},
        shape=SHAPE,
    )
    selection = vtprune.PruMerge().select(alone)
    assert torch.equal(selection.keep[0], together.keep[1, :30])
    kept = selection.keep[0]
    torch.testing.assert_close(selection.features[0][kept], together.features[1, :30][kept])
