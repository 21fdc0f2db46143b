# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune import VTPruneError
from vtprune.ops import bipartite_merging as module
from vtprune.ops.bipartite_merging import bipartite_match, bipartite_merging


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(features, k, quirks, metric=None):
    """The algorithm for one group, token by token, on lists of (feature, metric, place, original tokens)."""
    metric = features if metric is None else metric
    tokens = [(x.double(), m.double(), i, {i}) for i, (x, m) in enumerate(zip(features, metric, strict=True))]
    while len(tokens) > max(k, 1):
        sources, partners = tokens[::2], tokens[1::2]
        cosine = torch.tensor([[torch.cosine_similarity(a[1], b[1], dim=0) for b in partners] for a in sources])
        best, choice = cosine.max(dim=1)
        ranking = sorted(range(len(sources)), key=lambda i: -best[i])
        merging = ranking[: min(len(tokens) // 2, len(tokens) - k)]
        merged = []
        for j, (x, m, place, members) in enumerate(partners):
            joining = [sources[i] for i in merging if choice[i] == j]
            count = len(joining) + 1
            merged.append(
                (
                    (x + sum(other[0] for other in joining)) / count,
                    (m + sum(other[1] for other in joining)) / count,
                    place,
                    members.union(*(other[3] for other in joining)),
                )
            )
        tokens = [sources[i] for i in ranking[len(merging) :]] + merged
        if not quirks:
            tokens.sort(key=lambda token: token[2])
    return tokens


@given(st.integers(0, 10_000), st.integers(1, 23), st.integers(1, 24), st.booleans(), st.booleans())
@settings(max_examples=80, deadline=None)
def test_is_the_formula_token_by_token(seed, n, k, quirks, own_metric):
    features, metric = draw(n, 5, seed=seed), draw(n, 7, seed=seed + 1) if own_metric else None
    expected = one_by_one(features, k, quirks, metric)
    metric = None if metric is None else metric[None]
    merged = bipartite_merging(features[None], k, metric=metric, reference_quirks=quirks)
    assert merged.places[0].tolist() == [place for _, _, place, _ in expected]
    torch.testing.assert_close(merged.features[0], torch.stack([x for x, *_ in expected]).float())
    for _, _, place, members in expected:
        assert set((merged.sources[0] == place).nonzero()[:, 0].tolist()) == members
    assert merged.sizes[0].tolist() == [len(members) for *_, members in expected]


@given(st.data(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ragged_groups_are_what_they_are_alone(data, quirks):
    lengths = data.draw(st.lists(st.integers(0, 17), min_size=1, max_size=5))
    budgets = [data.draw(st.integers(0, 20)) for _ in lengths]
    features = draw(len(lengths), max(lengths) + 2, 6, seed=sum(lengths))
    valid = torch.arange(features.shape[1]) < torch.tensor(lengths)[:, None]
    features[~valid] = torch.nan
    together = bipartite_merging(
        features, torch.tensor(budgets), lengths=torch.tensor(lengths), reference_quirks=quirks
    )
    for group, (n, k) in enumerate(zip(lengths, budgets, strict=True)):
        alone = bipartite_merging(features[group : group + 1, :n], k, reference_quirks=quirks)
        left = min(n, k)
        assert alone.valid.sum() == left
        assert together.places[group].tolist()[:left] == alone.places[0].tolist()[:left]
        assert together.sources[group, :n].tolist() == alone.sources[0].tolist()
        torch.testing.assert_close(together.features[group, :left], alone.features[0, :left])
        assert not together.features[group, left:].any() and set(together.places[group, left:].tolist()) <= {-1}
        assert set(together.sources[group, n:].tolist()) == {-1}


def test_in_place_puts_each_token_where_it_stands():
    features = draw(3, 15, 4)
    merged = bipartite_merging(features, torch.tensor([4, 15, 0]))
    keep, replaced, sources = merged.in_place(features)
    assert keep.sum(1).tolist() == [4, 15, 0]
    torch.testing.assert_close(replaced[0, keep[0]], merged.features[0, :4])
    assert torch.equal(replaced[0, ~keep[0]], features[0, ~keep[0]])
    assert torch.equal(replaced[1:], features[1:]) and set(sources[2].tolist()) == {-1}
    assert sources[1].tolist() == list(range(15))
    assert keep[0].gather(0, sources[0]).all()


def test_alike_tokens_merge_first_and_copies_change_nothing():
    features = draw(1, 6, 8)
    features[:, 4] = features[:, 1] * 3
    merged = bipartite_merging(features, 5)
    assert merged.sources[0].tolist() == [0, 1, 2, 3, 1, 5]
    torch.testing.assert_close(merged.features[0, 1], features[0, 1] * 2)
    copies = draw(1, 1, 8).expand(2, 11, 8)
    for k in range(1, 12):
        merged = bipartite_merging(copies, k)
        torch.testing.assert_close(merged.features, copies[:, :k])
        assert merged.sizes.sum(1).tolist() == [11, 11]


def test_matching_in_blocks_is_matching(monkeypatch):
    metric, valid = draw(3, 31, 6), torch.arange(31) < torch.tensor([31, 2, 16])[:, None]
    whole = bipartite_match(metric, valid)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 100)
    for part, expected in zip(bipartite_match(metric, valid), whole, strict=True):
        torch.testing.assert_close(part, expected)
    assert whole[1][1].tolist()[1:] == [-torch.inf] * 15


def test_edges():
    merged = bipartite_merging(draw(2, 1, 3), 1)
    assert merged.places.tolist() == [[0], [0]]
    assert bipartite_merging(draw(0, 5, 3), 2).features.shape[0] == 0
    assert bipartite_merging(draw(2, 0, 3), 2).features.shape == (2, 0, 3)
    zeros = bipartite_merging(torch.zeros(1, 9, 3), 4)
    assert not zeros.features.any() and zeros.valid.all()


def test_low_precision_is_averaged_in_float32():
    features = torch.full((1, 64, 2), 60_000.0, dtype=torch.float16)
    merged = bipartite_merging(features, 1)
    assert merged.features.dtype == torch.float16 and merged.features.isfinite().all()
    metric = draw(1, 64, 4).bfloat16()
    assert bipartite_merging(features, 9, metric=metric).features.dtype == torch.float16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused(bad):
    features, metric = draw(2, 8, 3), draw(2, 8, 3, seed=1)
    metric[1, 2, 0] = bad
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        bipartite_merging(metric, 4)
    with pytest.raises(VTPruneError, match="NaN or infinite"):
        bipartite_merging(features, 4, metric=metric)
