# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.ops.weighted_page_rank import rank_pruning, weighted_page_rank


def draw(batch=2, heads=3, n=9, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, n, dim, generator=generator) for _ in range(2))


def written_out(queries, keys, scale, iterations, damping=0.0, temperature=1.0, cls_start=False, variances=None):
    """Importance of the tokens of one sample, head by head."""
    n, ranks = queries.shape[1], []
    for query, key in zip(queries.double(), keys.double(), strict=True):
        transitions = (query @ key.T * scale / temperature).softmax(-1)
        rank = torch.ones(n).double()
        rank[0] = n**0.5 if cls_start else 1.0
        rank /= rank.sum()
        for _ in range(iterations):
            rank = (1 - damping) * rank @ transitions + damping / n
        ranks.append(rank)
    if variances is not None:
        low, high = variances
        ranks = [r for r in ranks if low <= ((r * n - 1) ** 2).mean() <= high] or ranks
    return (sum(r**2 for r in ranks) / len(ranks)).sqrt().float()


@given(
    st.integers(0, 10_000),
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.2]),
    st.booleans(),
    st.sampled_from([None, (0.01, 0.7), (0.2, 0.4), (5.0, 9.0)]),
)
@settings(max_examples=60, deadline=None)
def test_is_the_formula(seed, n, iterations, damping, cls_start, variances):
    queries, keys = draw(n=n, seed=seed)
    options = dict(
        scale=0.5, iterations=iterations, damping=damping, temperature=0.7, cls_start=cls_start, variances=variances
    )
    importance = weighted_page_rank(queries, keys, **options)
    expected = torch.stack([written_out(q, k, **options) for q, k in zip(queries, keys, strict=True)])
    torch.testing.assert_close(importance, expected, rtol=1e-4, atol=1e-6)


def test_heads_out_of_the_range_do_not_count():
    queries, keys = draw(batch=1, heads=3, n=8)
    queries[:, 0] = 0  # equal attention: variance 0
    keys[:, 1, 3], queries[:, 1] = 30.0, 1.0  # all attend to token 3: variance 7
    options = dict(scale=0.5, iterations=1)
    third = weighted_page_rank(queries[:, 2:], keys[:, 2:], **options)
    torch.testing.assert_close(weighted_page_rank(queries, keys, variances=(0.001, 5.0), **options), third)
    every = weighted_page_rank(queries, keys, **options)
    torch.testing.assert_close(weighted_page_rank(queries, keys, variances=(100.0, 200.0), **options), every)
    assert not torch.allclose(every, third)


def pruned(queries, keys, keep, similar, protected, iterations, **options):
    """Places of the tokens of one sample that stay, token by token."""
    n = queries.shape[1]
    left, similar = list(range(n)), min(similar, (n - protected) // 2, n - protected - keep)
    if similar > 0:
        importance = written_out(queries, keys, iterations=1, **options)
        ranking = sorted(range(protected, n), key=lambda token: importance[token])
        half = len(ranking) // 2
        flat = keys.transpose(0, 1).flatten(1).double()
        cosine = torch.cosine_similarity(flat[:, None], flat[None], dim=-1)
        alike = {token: max(cosine[token, other] for other in ranking[half:]) for token in ranking[:half]}
        for token in sorted(alike, key=lambda token: -alike[token])[:similar]:
            left.remove(token)
    importance = written_out(queries[:, left], keys[:, left], iterations=iterations, **options)
    best = sorted(range(protected, len(left)), key=lambda place: -importance[place])[:keep]
    return left[:protected] + [left[place] for place in sorted(best)]


@given(st.integers(0, 10_000), st.integers(2, 16), st.integers(0, 16), st.integers(0, 9), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_drops_token_by_token(seed, n, keep, similar, protected):
    queries, keys = draw(n=n, seed=seed)
    protected = min(protected, n)
    options = dict(scale=0.5, cls_start=protected > 0, iterations=4, variances=(0.01, 0.7))
    reduction = rank_pruning(queries, keys, keep, similar=similar, protected=protected, **options)
    if keep >= n - protected:
        assert reduction is None
        return
    assert reduction.rows == protected + keep
    for sample in range(2):
        expected = pruned(queries[sample], keys[sample], keep, similar, protected, **options)
        assert (reduction.into[sample] >= 0).nonzero()[:, 0].tolist() == expected
        assert reduction.into[sample, expected].tolist() == list(range(len(expected)))


def test_an_unimportant_copy_goes_before_unimportant_others():
    # Tokens 1 to 4 are attended to. Token 6 has the key of token 1, except that nothing attends to it.
    keys = torch.nn.functional.pad(torch.eye(8), (1, 0))[None, None].clone()
    keys[0, 0, 6] = keys[0, 0, 1]
    queries = torch.zeros(1, 1, 8, 9)
    queries[..., 3:6] = 5.0
    queries[..., 2] = -5.0
    for similar, gone in ((0, {6, 1}), (1, {6})):
        kept = rank_pruning(queries, keys, 5, scale=1.0, similar=similar).into[0] >= 0
        assert gone <= set((~kept).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_samples_of_a_batch_are_what_they_are_alone(dtype):
    queries, keys = (x.to(dtype) for x in draw(batch=3, n=15))
    options = dict(scale=0.5, similar=3, cls_start=True, variances=(0.01, 0.7))
    together = rank_pruning(queries, keys, 6, **options)
    for sample in range(3):
        alone = rank_pruning(queries[sample : sample + 1], keys[sample : sample + 1], 6, **options)
        assert alone.into[0].tolist() == together.into[sample].tolist()
