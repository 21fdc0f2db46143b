# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.multi_criteria_fusion import OneStepAhead, fused_attention, fusion, fusion_count
from vtprune.ops.token_reduction import Reduction


def generator(seed):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def attention_of(batch, n, heads=2, seed=0):
    return draw(batch, heads, n, n, seed=seed).softmax(-1)


def pair_weight(features, importance, sizes, taus):
    """The weight of a pair of tokens, as a function of both."""
    features, importance = features.double(), importance.double()
    sizes = None if sizes is None else sizes.double()

    def weight(a, b):
        cosine = torch.cosine_similarity(features[a], features[b], dim=0)
        product = ((cosine + 1) / 2) ** (1 / taus[0]) if taus[0] else 1.0
        for values, tau in ((importance, taus[1]), (sizes, taus[2])):
            if tau and values is not None:
                product = product * (values.min() / values[a] * (values.min() / values[b])) ** (1 / tau)
        return float(product)

    return weight


def by_pairs(features, importance, sizes, count, taus, bidirectional, protected):
    """The algorithm for one sample, token by token: rows in order, each a list of tokens."""
    weight, n = pair_weight(features, importance, sizes, taus), len(features)
    even = [token for token in range(protected, n) if token % 2 == 0]
    odd = [token for token in range(protected, n) if token % 2 == 1]
    goes = list(range(n))

    def best(tokens, partners):
        partner = {t: max(partners, key=lambda p: weight(t, p)) for t in tokens}
        return partner, sorted(tokens, key=lambda t: -weight(t, partner[t]))

    count = min(count, (n - protected) // 2)
    first = count // 2 if bidirectional else count
    partner, ranking = best(even, odd)
    for token in ranking[:first]:
        goes[token] = partner[token]
    left_even = sorted(ranking[first:]) if protected else ranking[first:]
    left_odd = odd
    if bidirectional:
        partner, ranking = best(odd, left_even)
        second = count - first
        for token in ranking[:second]:
            goes[token] = partner[token]
        left_odd = ranking[second:]
    goes = [goes[goes[token]] for token in range(n)]
    rows = [*range(protected), *left_even, *left_odd]
    return [[token for token in range(n) if goes[token] == row] for row in rows]


def rows_of(reduction, sample):
    into = reduction.into[sample].tolist()
    return [[token for token, row in enumerate(into) if row == wanted] for wanted in range(reduction.rows)]


@given(
    st.integers(0, 10_000),
    st.integers(2, 19),
    st.integers(1, 10),
    st.booleans(),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([(1.0, 20.0, 40.0), (2.0, 5.0, 0.0), (0.0, 1.0, 1.0), (0.5, 0.0, 2.0)]),
)
@settings(max_examples=120, deadline=None)
def test_is_the_algorithm_token_by_token(seed, n, count, bidirectional, protected, with_sizes, taus):
    features, protected = draw(2, n, 5, seed=seed), min(protected, n)
    importance = attention_of(2, n, seed=seed).mean((1, 2))
    sizes = torch.randint(1, 6, (2, n), generator=generator(seed)).float() if with_sizes else None
    settings = dict(zip(("tau_similarity", "tau_information", "tau_size"), taus, strict=True))
    reduction = fusion(
        features, importance, count, sizes=sizes, bidirectional=bidirectional, protected=protected, **settings
    )
    if (n - protected) // 2 == 0:
        assert reduction is None
        return
    means = reduction.features(features)
    for sample in range(2):
        own = None if sizes is None else sizes[sample]
        rows = by_pairs(features[sample], importance[sample], own, count, taus, bidirectional, protected)
        assert rows_of(reduction, sample) == rows
        for row, members in enumerate(rows):
            weights = importance[sample, members] * (1 if own is None else own[members])
            expected = (weights[:, None] * features[sample, members]).sum(0) / weights.sum()
            torch.testing.assert_close(means[sample, row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["importance", "size", "mean", "max"])
def test_poolings(pooling):
    features, importance = draw(1, 8, 4), torch.rand(1, 8, generator=generator(0)) + 0.1
    sizes = torch.arange(1.0, 9.0)[None]
    reduction = fusion(features, importance, 3, sizes=sizes, pooling=pooling)
    pooled = reduction.features(features)
    for row, members in enumerate(rows_of(reduction, 0)):
        tokens = features[0, members]
        weights = {
            "importance": importance[0, members] * sizes[0, members],
            "size": sizes[0, members],
            "mean": torch.ones(len(members)),
        }
        if pooling == "max":
            expected = tokens.max(dim=0).values
        else:
            expected = (weights[pooling][:, None] * tokens).sum(0) / weights[pooling].sum()
        torch.testing.assert_close(pooled[0, row], expected)
    assert reduction.sizes(sizes).sum() == sizes.sum()


@given(st.integers(0, 10_000), st.integers(4, 16), st.integers(1, 3), st.sampled_from(["importance", "mean", "max"]))
@settings(max_examples=40, deadline=None)
def test_attention_is_fused_like_the_tokens(seed, n, heads, pooling):
    attention = attention_of(2, n, heads, seed=seed)
    reduction = fusion(draw(2, n, 4, seed=seed), attention.mean((1, 2)), n // 3, pooling=pooling)
    fused = fused_attention(attention, reduction)
    for sample in range(2):
        for head in range(heads):
            groups = rows_of(reduction, sample)
            columns = torch.stack([attention[sample, head][:, members].sum(1) for members in groups], dim=1)
            for row, members in enumerate(groups):
                weights = reduction.weights[sample, members, None]
                expected = columns[members].max(0).values if pooling == "max" else (weights * columns[members]).sum(0)
                torch.testing.assert_close(fused[sample, head, row], expected)
    if pooling != "max":
        torch.testing.assert_close(fused.sum(-1), torch.ones(fused.shape[:3]))


@given(st.integers(0, 10_000), st.integers(4, 16), st.integers(1, 3), st.sampled_from(["importance", "mean", "max"]))
@settings(max_examples=40, deadline=None)
def test_the_rows_attend_by_the_fused_attention(seed, n, heads, pooling):
    attention = attention_of(2, n, heads, seed=seed)
    reduction = fusion(draw(2, n, 4, seed=seed), attention.mean((1, 2)), n // 3, pooling=pooling)
    ahead = OneStepAhead(attention, reduction)
    values = draw(2, heads * reduction.rows, 5, seed=seed + 1).view(2, heads, reduction.rows, 5)
    torch.testing.assert_close(ahead.attend(values), fused_attention(attention, reduction) @ values)


def test_dropped_tokens_are_not_attended_to():
    attention = attention_of(1, 4, 2, seed=0)
    reduction = Reduction.gather(torch.tensor([[0, 2, 3]]), 4)
    values = draw(1, 6, 5, seed=1).view(1, 2, 3, 5)
    expected = attention[:, :, [0, 2, 3]][..., [0, 2, 3]] @ values
    torch.testing.assert_close(OneStepAhead(attention, reduction).attend(values), expected)


def test_groups_chain():
    # Tokens 1 to 4 are alike and no other; token 2 goes into 3, and 3 with it into 4.
    features = torch.eye(8)[None].clone()
    features[0, 2], features[0, 3], features[0, 4] = (
        torch.tensor([0.0, 0, 0, a, b, 0, 0, 0]) for a, b in ((1, 0), (1, 0.1), (1, 0.6))
    )
    reduction = fusion(features, torch.ones(1, 8), 2)
    assert [2, 3, 4] in rows_of(reduction, 0)


def test_tokens_without_attention_and_opposite_tokens_are_no_nan():
    features = torch.tensor([1.0, -1.0]).repeat(5)[None, :, None] * torch.rand(1, 1, 7, generator=generator(1))
    reduction = fusion(features, torch.zeros(1, 10), 4, tau_similarity=3.0)
    assert reduction.weights.isfinite().all() and reduction.features(features).isfinite().all()
    assert fusion(torch.zeros(1, 10, 3), torch.ones(1, 10), 4).rows == 6


def test_how_many_merge():
    assert fusion_count(197, 16) == 16 and fusion_count(21, 16) == 10 and fusion_count(10, 16) == 0
    assert fusion_count(197, 0.35) == int(196 * 0.35) and fusion_count(9, 3) == 0 and fusion_count(10, 0.35) == 0
    assert fusion_count(40, 25) == 19 and fusion_count(40, 25, protected=0) == 20 and fusion_count(40, 0) == 0
    assert fusion(draw(1, 3, 2), torch.ones(1, 3), 0) is None and fusion(draw(1, 2, 2), torch.ones(1, 2), 4) is None


def test_samples_of_a_batch_are_what_they_are_alone():
    features, importance = draw(3, 15, 6), attention_of(3, 15).mean((1, 2))
    together = fusion(features, importance, 6)
    for sample in range(3):
        alone = fusion(features[sample : sample + 1], importance[sample : sample + 1], 6)
        assert alone.into[0].tolist() == together.into[sample].tolist()
        torch.testing.assert_close(alone.weights[0], together.weights[sample])
