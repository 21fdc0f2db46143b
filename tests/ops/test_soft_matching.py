# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops.soft_matching import kth_matching, layer_counts, random_matching, soft_matching


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosines(metric):
    metric = metric.double()
    return torch.cosine_similarity(metric[:, None], metric[None], dim=-1)


def grouped(order, goes):
    """Rows, in order, as lists of their tokens; `goes` says which token each token goes into."""
    return [[token for token, into in enumerate(goes) if into == row] for row in order]


def rows_of(reduction, sample):
    into = reduction.into[sample].tolist()
    return [[token for token, row in enumerate(into) if row == wanted] for wanted in range(reduction.rows)]


def by_pairs(metric, r, protected):
    """ToMe for one sample, token by token."""
    cosine, n = cosines(metric), len(metric)
    odd = [token for token in range(1, n, 2) if token >= protected]
    even = [token for token in range(0, n, 2) if token >= protected]
    best = {token: max(odd, key=lambda other: cosine[token, other]) for token in even} if odd else {}
    ranking = sorted(best, key=lambda token: -cosine[token, best[token]])
    r = min(r, (n - protected) // 2)
    goes = list(range(n))
    for token in ranking[:r]:
        goes[token] = best[token]
    unmerged = sorted(ranking[r:]) if protected else ranking[r:]
    return grouped([*range(protected), *unmerged, *(token for token in range(1, n, 2) if token >= protected)], goes)


@given(st.integers(0, 10_000), st.integers(2, 24), st.integers(1, 13), st.integers(0, 5))
@settings(max_examples=120, deadline=None)
def test_is_the_algorithm_token_by_token(seed, n, r, protected):
    metric, sizes = draw(2, n, 5, seed=seed), torch.randint(1, 9, (2, n), generator=torch.Generator().manual_seed(seed))
    protected = min(protected, n)
    reduction = soft_matching(metric, r, sizes=sizes, protected=protected)
    if (n - protected) // 2 == 0:
        assert reduction is None
        return
    values = draw(2, n, 3, seed=seed + 1)
    means, counts = reduction.features(values), reduction.sizes(sizes)
    assert reduction.rows == n - min(r, (n - protected) // 2)
    for sample in range(2):
        rows = rows_of(reduction, sample)
        assert rows == by_pairs(metric[sample], r, protected)
        for row, members in enumerate(rows):
            weights = sizes[sample, members].double()
            expected = (weights[:, None] * values[sample, members].double()).sum(0) / weights.sum()
            torch.testing.assert_close(means[sample, row].double(), expected, rtol=1e-5, atol=1e-6)
            assert counts[sample, row] == weights.sum()


@given(st.integers(0, 10_000), st.integers(1, 24), st.integers(1, 6), st.integers(0, 4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_kth_token_stays(seed, n, k, protected, quirks):
    metric, protected = draw(2, n, 5, seed=seed), min(protected, n)
    reduction = kth_matching(metric, k, protected=protected, reference_quirks=quirks)
    stays = list(range(protected + k - 1, n, k))
    if k == 1 or not stays:
        assert reduction is None
        return
    for sample in range(2):
        cosine = cosines(metric[sample])
        goes = [
            token
            if token < protected or token in stays
            else -1
            if quirks and token > stays[-1]
            else max(stays, key=lambda other, token=token: cosine[token, other])
            for token in range(n)
        ]
        assert rows_of(reduction, sample) == grouped([*range(protected), *stays], goes)
    assert (reduction.into < 0).any() == (quirks and stays[-1] < n - 1)


@given(st.integers(0, 10_000), st.integers(1, 16), st.integers(1, 16), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_random_tokens_go_into_the_most_similar_others(seed, n, r, protected):
    metric, protected = draw(2, n, 5, seed=seed), min(protected, n)
    draws = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    reduction = random_matching(metric, r, draws, protected=protected)
    r = min(r, n - protected - 1)
    if r <= 0:
        assert reduction is None
        return
    for sample in range(2):
        cosine, draw_of = cosines(metric[sample]), draws[sample].tolist()
        ranking = sorted(range(protected, n), key=lambda token: draw_of[token])
        merged, left = ranking[:r], sorted(ranking[r:])
        goes = list(range(n))
        for token in merged:
            goes[token] = max(left, key=lambda other, token=token: cosine[token, other])
        assert rows_of(reduction, sample) == grouped([*range(protected), *left], goes)


def test_samples_of_a_batch_are_what_they_are_alone():
    metric, draws = draw(4, 17, 6), torch.rand(4, 17, generator=torch.Generator().manual_seed(0))
    for match in (
        lambda rows: soft_matching(metric[rows], 5, protected=1),
        lambda rows: kth_matching(metric[rows], 3),
        lambda rows: random_matching(metric[rows], 5, draws[rows]),
    ):
        together = match(slice(None)).into
        assert together.tolist() == [match(slice(i, i + 1)).into[0].tolist() for i in range(4)]


def test_equal_cosines_merge_from_the_front():
    metric = torch.ones(1, 9, 3)
    assert soft_matching(metric, 2, protected=1).into.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]
    assert soft_matching(metric, 2).into.tolist() == [[3, 3, 3, 4, 0, 5, 1, 6, 2]]
    assert soft_matching(torch.zeros(1, 9, 3), 2).into.tolist() == [[3, 3, 3, 4, 0, 5, 1, 6, 2]]


def test_nothing_to_merge_is_none():
    metric = draw(1, 6, 3)
    assert soft_matching(metric, 0) is None and soft_matching(metric, -1) is None
    assert soft_matching(metric, 4, protected=5) is None and soft_matching(metric[:, :1], 1) is None
    assert random_matching(metric, 0, torch.zeros(1, 6)) is None


@given(st.integers(2, 50), st.integers(0, 40), st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_schedules_change_by_equal_steps(layers, r, inflect):
    counts = layer_counts(layers, (r, inflect))
    first = int(r * (1 - inflect))
    assert counts[0] == first and abs(counts[-1] - (2 * r - first)) <= 1
    assert len(counts) == layers and min(counts) >= 0
    assert abs(sum(counts) - r * layers) <= layers
    assert counts == sorted(counts, reverse=first > r)
    assert layer_counts(layers, r) == [r] * layers


def test_schedules_by_hand():
    assert layer_counts(12, (8, -1.0)) == [16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0]
    assert layer_counts(4, [5, 3]) == [5, 3, 0, 0] and layer_counts(2, []) == [0, 0]
    assert layer_counts(1, (6, -1.0)) == [6]


@pytest.mark.parametrize("r", [-1, (3, 1.5), (-2, 0.0), [1, -1], [1, 2, 3, 4]])
def test_impossible_schedules_are_refused(r):
    with pytest.raises(VTPruneError, match="r is"):
        layer_counts(3, r)
