# SPDX-License-Identifier: Apache-2.0
"""Intervals of one row; differences between rows: paired intervals, p values, and their correction for many rows."""

import numpy as np
import pytest

from vtprune.eval.results.statistics import (
    RESAMPLES_OF_DIFFERENCES,
    difference,
    holm,
    mean_interval,
    retention_bound,
    retention_interval,
)


def right_or_wrong(seed, share, n=600):
    return (np.random.default_rng(seed).random(n) < share).astype(float)


def test_difference_agrees_with_the_normal_approximation():
    some = right_or_wrong(0, 0.9)
    others = np.where(right_or_wrong(1, 0.1) == 1, 1 - some, some)
    found = difference(some, others)
    gap = some - others
    error = 1.96 * gap.std() / len(gap) ** 0.5
    assert found.mean == pytest.approx(gap.mean())
    assert found.interval == pytest.approx([gap.mean() - error, gap.mean() + error], abs=0.004)
    assert found.significant and found.p < 0.001
    assert difference(some, others) == found


def test_the_other_way_round_is_the_mirror_image():
    some, others = right_or_wrong(0, 0.6), right_or_wrong(1, 0.55)
    there, back = difference(some, others), difference(others, some)
    assert back.mean == pytest.approx(-there.mean)
    assert back.interval == pytest.approx([-bound for bound in reversed(there.interval)], abs=0.006)
    assert back.p == pytest.approx(there.p, abs=0.03)


def test_equal_rows_do_not_differ_and_only_pairing_tells():
    some = right_or_wrong(0, 0.5)
    same = difference(some, some)
    assert (same.mean, same.interval, same.p, same.significant) == (0.0, [0.0, 0.0], 1.0, False)
    # One question in a hundred gained and none lost: certain on the same questions, invisible on others.
    better = some.copy()
    better[np.flatnonzero(some == 0)[:6]] = 1
    assert difference(better, some).significant
    assert not difference(np.random.default_rng(2).permutation(better), some).significant


def test_p_is_level_where_nothing_differs():
    p_values = [difference(right_or_wrong(2 * i, 0.7, 300), right_or_wrong(2 * i + 1, 0.7, 300)).p for i in range(60)]
    assert 0.3 < np.mean(p_values) < 0.7
    assert sum(p < 0.05 for p in p_values) <= 9  # 3 expected


def test_graded_scores_are_drawn_example_by_example_to_the_same_end():
    rng = np.random.default_rng(0)
    gap = rng.normal(0.05, 0.3, 400)
    found = difference(gap, np.zeros(400))
    error = 1.96 * gap.std() / 20
    assert found.interval == pytest.approx([gap.mean() - error, gap.mean() + error], abs=0.003)
    assert found.p >= 2 / (RESAMPLES_OF_DIFFERENCES + 1)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_interval_of_a_mean_agrees_with_the_normal_approximation():
    scores = [1.0] * 240 + [0.0] * 160
    mean, (low, high) = mean_interval(scores)
    error = 1.96 * (0.6 * 0.4 / 400) ** 0.5
    assert mean == 0.6
    assert [low, high] == pytest.approx([0.6 - error, 0.6 + error], abs=0.01)
    assert mean_interval(scores) == (mean, [low, high])


def test_retention_is_paired():
    rng = np.random.default_rng(1)
    full = (rng.random(500) < 0.8).astype(float).tolist()
    same = retention_interval(full, full)
    assert same == (1.0, [1.0, 1.0])  # unpaired resampling would not know that these are the same answers
    shuffled = rng.permutation(full).tolist()
    ratio, (low, high) = retention_interval(shuffled, full)
    assert ratio == pytest.approx(1.0)
    assert low < 0.96 and high > 1.04
    assert retention_interval(full, [0.0] * 500) == (None, None)


def test_the_bound_of_the_retention_knows_that_few_examples_show_little():
    """Without a loss it is about the exact bound: at most -log(error) losses are likely."""
    for n in (100, 300, 1000):
        assert 1 - 6 / n <= retention_bound([1.0] * n, [1.0] * n, 0.05) < 1 - 3 / n
    lost = [0.0] * 50 + [1.0] * 950
    assert retention_bound(lost, [1.0] * 1000, 0.025) == pytest.approx(0.934, abs=0.003)
    assert retention_bound([0.0], [0.0], 0.05) is None
