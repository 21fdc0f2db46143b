# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

from vtprune.stages.ahead import KeysAhead, hand_keys


@pytest.fixture
def handed():
    ahead, projection = KeysAhead(), nn.Linear(4, 3)
    handles = list(hand_keys(projection, lambda: ahead))
    yield ahead, projection
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_keys_are_handed_over_once(handed):
    ahead, projection = handed
    states, keys = torch.randn(2, 5, 4), torch.randn(2, 8, 3)
    own = projection(states)
    seen = []
    projection.register_forward_hook(lambda module, args, output: seen.append(output))
    index, present = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]), torch.ones(2, 5, dtype=torch.bool)
    present[1, 0] = False
    keys[1, 3] = torch.nan
    ahead.note(keys, index, present)
    given = projection(states)
    assert torch.equal(given[0], keys[0, :5]) and torch.equal(given[1, 1:], keys[1, 4:])
    assert not given[1, 0].any(), "a padded key that is NaN would spread"
    assert seen[0] is given, "hooks of others see what the layer gets"
    torch.testing.assert_close(projection(states), own)


@torch.no_grad()
def test_keys_of_other_columns_are_not_handed_over(handed):
    ahead, projection = handed
    ahead.note(torch.randn(1, 5, 3), None, torch.ones(1, 5, dtype=torch.bool))
    states = torch.randn(1, 4, 4)
    torch.testing.assert_close(projection(states), states @ projection.weight.T + projection.bias)
    assert projection(torch.randn(1, 5, 4)).shape == (1, 5, 3) and ahead.keys is None


def test_nothing_is_handed_over_where_gradients_are_wanted(handed):
    ahead, projection = handed
    ahead.note(torch.randn(1, 5, 3), None, torch.ones(1, 5, dtype=torch.bool))
    assert ahead.keys is None
    assert projection(torch.randn(1, 5, 4)).requires_grad
