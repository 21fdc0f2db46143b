# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.condensation import condensation, condensation_counts, coreset


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def attention_of(batch, n, seed=0):
    return draw(batch, n, seed=seed + 1).softmax(-1)


def clusters_of(points, count, start):
    """Greedy k-centre, point by point: centres, the cluster of each point, and weights that sum to one in each."""
    points = points.double()
    distance = [[float((a - b).norm()) for b in points] for a in points]
    centres = [start]
    while len(centres) < count:
        rest = [point for point in range(len(points)) if point not in centres]
        centres.append(max(rest, key=lambda point: min(distance[point][centre] for centre in centres)))
    cluster = [
        centres.index(point) if point in centres else min(range(count), key=lambda k: distance[point][centres[k]])
        for point in range(len(points))
    ]
    raw = [1 / (distance[point][centres[k]] or 1) for point, k in enumerate(cluster)]
    totals = [sum(weight for weight, own in zip(raw, cluster, strict=True) if own == k) for k in range(count)]
    return centres, cluster, [weight / totals[k] for weight, k in zip(raw, cluster, strict=True)]


@given(st.integers(0, 10_000), st.integers(1, 20), st.integers(1, 6), st.integers(0, 19))
@settings(max_examples=60, deadline=None)
def test_a_coreset_is_the_algorithm_point_by_point(seed, n, count, start):
    points, count = draw(2, n, 4, seed=seed), min(n, count)
    starts = torch.tensor([start % n, (start + 1) % n])
    means = coreset(points, count, starts)
    for sample in range(2):
        centres, cluster, weights = clusters_of(points[sample], count, int(starts[sample]))
        assert means.into[sample].tolist() == cluster
        assert means.into[sample, centres].tolist() == list(range(count))
        torch.testing.assert_close(means.weights[sample], torch.tensor(weights).float(), rtol=1e-4, atol=1e-6)


def test_copies_of_a_centre_leave_no_cluster_empty():
    points = draw(1, 1, 4).expand(1, 6, 4)
    means = coreset(points, 4)
    assert means.sizes().tolist() == [[3, 1, 1, 1]]
    torch.testing.assert_close(means.features(points), points[:, :4])
    tiny = torch.tensor([0, 1e-38, 2e-38, 1.0, 3e-38])[None, :, None]
    assert coreset(tiny, 2).features(tiny).isfinite().all()


@given(
    st.integers(0, 10_000),
    st.integers(1, 40),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 4),
    st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_is_the_algorithm_token_by_token(seed, n, drop_rate, protected, with_start):
    protected = min(protected, n)
    features, attention = draw(2, n, 4, seed=seed), attention_of(2, n, seed=seed)
    stay, clustered, dropped = condensation_counts(n - protected, drop_rate)
    start = torch.tensor([0, 1]) * (clustered > 1) if with_start else None
    reduction = condensation(features, attention, drop_rate, start=start, protected=protected)
    if not dropped:
        assert reduction is None
        return
    rows = reduction.features(features)
    assert rows.shape[1] == protected + stay + min(4, clustered) + 1
    for sample in range(2):
        x, weight = features[sample], attention[sample]
        ranking = sorted(range(protected, n), key=lambda token: -weight[token])
        expected = [*x[:protected], *x[ranking[:stay]]]
        members = ranking[stay : stay + clustered]
        count = min(4, clustered)
        _, cluster, shares = clusters_of(x[members], count, 0 if start is None else int(start[sample]))
        for k in range(count):
            own = [i for i, number in enumerate(cluster) if number == k]
            expected.append(sum(shares[i] * x[members[i]] for i in own))
        expected.append(sum(weight[token] * x[token] for token in ranking[stay + clustered :]))
        torch.testing.assert_close(rows[sample], torch.stack(expected), rtol=1e-4, atol=1e-5)
    # A token that stays keeps its bits.
    same = reduction.into[0] < protected + stay
    assert torch.equal(rows[0, reduction.into[0, same]], features[0, same])


@given(st.integers(0, 600), st.floats(0, 1, exclude_max=True))
@settings(max_examples=100, deadline=None)
def test_counts(patches, drop_rate):
    stay, clustered, dropped = condensation_counts(patches, drop_rate)
    assert stay + clustered + dropped == patches and min(stay, clustered, dropped) >= 0
    left = math.ceil((1 - drop_rate) * patches)
    if left >= 2 * (dropped + 1):
        assert (stay, clustered) == (left - 2 * (dropped + 1), 2 * (dropped + 1))
    else:
        assert (stay, clustered) == (0, left)
    assert not patches or clustered


def test_the_published_lengths():
    lengths = {0.1: [197, 143, 104, 77], 0.035: [197, 182, 167, 155]}
    for drop_rate, tokens in lengths.items():
        for before, after in zip(tokens, tokens[1:], strict=False):
            reduction = condensation(draw(1, before, 3), attention_of(1, before), drop_rate)
            assert reduction.rows == after


def test_aggressive_rates_cluster_what_is_left():
    assert condensation_counts(20, 0.6) == (0, 8, 12)
    assert condensation_counts(3, 0.9) == (0, 1, 2)
    reduction = condensation(draw(1, 4, 2), attention_of(1, 4), 0.9)
    assert reduction.rows == 3 and reduction.sizes().tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_of_a_batch_are_what_they_are_alone(dtype):
    features, attention = draw(3, 40, 5).to(dtype), attention_of(3, 40)
    together = condensation(features, attention, 0.1)
    for sample in range(3):
        alone = condensation(features[sample : sample + 1], attention[sample : sample + 1], 0.1)
        assert alone.into[0].tolist() == together.into[sample].tolist()
        torch.testing.assert_close(alone.weights[0], together.weights[sample])
    assert together.features(features).dtype == dtype
