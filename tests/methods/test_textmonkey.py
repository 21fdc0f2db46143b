# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: which similar tokens are dropped, and the published count."""

import torch

import vtprune
from vtprune.tokens import VisualTokens


def group(features: torch.Tensor, k: int) -> VisualTokens:
    valid = torch.ones(1, len(features), dtype=torch.bool)
    return VisualTokens(features=features[None], valid=valid, budget=torch.tensor([k]))


def test_the_last_of_every_group_of_repetitions_stays():
    directions = torch.eye(3)
    features = directions[[0, 1, 0, 2, 1, 0]]
    keep = vtprune.TextMonkey(keep_tokens=3).select(group(features, 3)).keep[0]
    assert keep.nonzero()[:, 0].tolist() == [3, 4, 5]


def test_without_a_budget_the_published_count_stays():
    lengths, images = torch.tensor([576, 100]), torch.tensor([0, 1])
    assert vtprune.TextMonkey().budgets(lengths, images).tolist() == [512, 100]
    assert vtprune.TextMonkey(keep_ratio=0.25).budgets(lengths, images).tolist() == [144, 25]
