# SPDX-License-Identifier: Apache-2.0
"""Promise 7: deterministic; no global random state is touched."""

import random

import numpy as np
import pytest
import torch

import vtprune
from vtprune.testing import families

from .matrix import CELLS, in_turns, refusal
from .methods import every_method, spec
from .models import batch_of_three
from .reference import depth, generate


def kept(report, layers):
    return [[report.kept(sample, layer).tolist() for layer in range(layers)] for sample in range(3)]


def global_state():
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def assert_same_state(before, after):
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    np.testing.assert_equal(before[2], after[2])


def assert_global_state_is_untouched_and_unread(run):
    """run() -> (what was kept, tensors); after other global seeds it gives the same."""
    seen = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = global_state()
        seen.append(run())
        assert_same_state(before, global_state())
    assert seen[0][0] == seen[1][0]
    assert all(map(torch.equal, seen[0][1], seen[1][1]))


@every_method()
def test_global_random_state_is_untouched_and_unread(gqa, name):
    inputs = batch_of_three(gqa).inputs()

    def run():
        with vtprune.prune(gqa, spec(name)) as session:
            output = generate(gqa, inputs, new_tokens=3)
        return kept(session.report, depth(gqa)), output.logits

    assert_global_state_is_untouched_and_unread(run)


@pytest.mark.parametrize(("name", "media", "method"), [cell for cell in CELLS if in_turns(*cell)], ids=str)
@torch.no_grad()
def test_no_family_brings_chance_in(name, media, method):
    """Every method on every family once, with media in turns: the same in the second run, after other global seeds."""
    model = families.shared(name)
    if refusal(model, spec(method)) is not None:
        return
    inputs = families.batch(name, model, media=media).inputs

    def run():
        with vtprune.prune(model, spec(method)) as session:
            logits = model(**inputs).logits
        return kept(session.report, session.report.depth), [logits]

    assert_global_state_is_untouched_and_unread(run)


def test_random_takes_a_seed(gqa):
    inputs, seen = batch_of_three(gqa).inputs(), []
    for seed in (0, 0, 1):
        with vtprune.prune(gqa, {"name": "random", "keep_ratio": 0.4, "seed": seed}) as session:
            gqa(**inputs)
        seen.append(kept(session.report, depth(gqa)))
    assert seen[0] == seen[1] != seen[2]
    first, second = seen[0][1][0][:10], seen[0][1][0][10:]
    assert [c - first[0] for c in first] != [c - second[0] for c in second], "both images lost the same tokens"
