# SPDX-License-Identifier: Apache-2.0
"""Promise 7: deterministic; no global random state is touched."""

import random

import numpy as np
import pytest
import torch

import vtprune

from .methods import SPECS, spec
from .models import batch_of_three
from .reference import depth, generate


def kept(report, layers):
    return [[report.kept(sample, layer).tolist() for layer in range(layers)] for sample in range(3)]


@pytest.mark.parametrize("name", SPECS)
def test_global_random_state_is_untouched_and_unread(gqa, name):
    inputs, seen = batch_of_three(gqa).inputs(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()
        with vtprune.prune(gqa, spec(name)) as session:
            output = generate(gqa, inputs, new_tokens=3)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()
        assert torch.equal(before[0], after[0])
        assert before[1] == after[1]
        np.testing.assert_equal(before[2], after[2])
        seen.append((kept(session.report, depth(gqa)), output.logits))
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))


def test_random_takes_a_seed(gqa):
    inputs, seen = batch_of_three(gqa).inputs(), []
    for seed in (0, 0, 1):
        with vtprune.prune(gqa, {"name": "random", "keep_ratio": 0.4, "seed": seed}) as session:
            gqa(**inputs)
        seen.append(kept(session.report, depth(gqa)))
    assert seen[0] == seen[1] != seen[2]
    first, second = seen[0][1][0][:10], seen[0][1][0][10:]
    assert [c - first[0] for c in first] != [c - second[0] for c in second], "both images lost the same tokens"
