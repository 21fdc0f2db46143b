# SPDX-License-Identifier: Apache-2.0
"""Not in the conformance matrix: counts without a budget, draws, layers."""

import pytest
import torch

import vtprune
from vtprune.signals import ClsAttention, EncoderKeys, SampleKeys
from vtprune.tokens import ModelShape, VisualTokens

SHAPE = ModelShape(encoder_layers=24, decoder_layers=32, feature_layer=22, has_cls=True)
LAYERS = (6, 22)


def page(k: int, fresh: int = 5) -> VisualTokens:
    """Forty tokens: the first `fresh` have different keys, the others equal ones; 30 and 31 are outliers."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.cat([torch.eye(fresh, 8), torch.ones(40 - fresh, 8)])[None]
    attention = torch.rand(1, 2, 4, 40, generator=generator).div_(100)
    attention[0, 0, :, 10:20] += 0.05  # local
    attention[0, 1, :, 30:32] += 0.4  # global
    return VisualTokens(
        features=torch.randn(1, 40, 3, generator=generator),
        valid=torch.ones(1, 40, dtype=torch.bool),
        budget=torch.tensor([k]),
        signals={ClsAttention(LAYERS): attention, EncoderKeys(LAYERS[0]): keys, SampleKeys(): [7]},
        shape=SHAPE,
    )


def kept(k: int, fresh: int = 5, **fields) -> list[int]:
    return vtprune.TokenCorrelation(**fields).select(page(k, fresh)).keep[0].nonzero()[:, 0].tolist()


def test_without_a_budget_density_says_how_many():
    places = kept(-1)
    assert {30, 31} < set(places) and len(places) == 2 + 5
    assert set(places) - {30, 31} <= set(range(10, 20))
    assert len(kept(-1, fresh=8)) == 2 + 8
    # nothing is redundant any more
    assert len(kept(-1, count=40)) == 40


def test_a_budget_takes_global_tokens_first():
    assert kept(2) == [30, 31]
    assert set(kept(6)) - {30, 31} <= set(range(10, 20)) and len(kept(6)) == 6


def test_draws_are_seeded():
    draws = [tuple(kept(8, seed=seed)) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) > 1
    assert all({30, 31} < set(draw) and len(draw) == 8 for draw in draws)


def test_layers_are_rescaled_and_checked():
    assert vtprune.TokenCorrelation().layers(SHAPE) == LAYERS
    assert vtprune.TokenCorrelation(local_layer=2, global_layer=23).layers(SHAPE) == (2, 23)
    with pytest.raises(vtprune.ConfigError, match="global_layer=24"):
        vtprune.TokenCorrelation(global_layer=24).signals(SHAPE)
