# SPDX-License-Identifier: Apache-2.0
"""Pruning by weighted page rank (Zero-TPrune): unimportant tokens and tokens similar to important ones are dropped."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.ops.page_rank import attention_ranks, over_heads
from vtprune.ops.token_reduction import Reduction


@torch.no_grad()
def weighted_page_rank(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    temperature: float = 1.0,
    iterations: int = 5,
    damping: float = 0.0,
    cls_start: bool = False,
    variances: tuple[float, float] | None = None,
) -> Tensor:
    """Importance of every token by the attention of an encoder layer (Zero-TPrune, arXiv 2305.17328).

    It is the root mean square over heads of the ranks of :func:`vtprune.ops.page_rank.attention_ranks`, of those heads
    whose ranks have a variance in a range.

    Deviations: the ranks of a head sum to one, so their variance is below ``1 / n``, and no head would reach the
    paper's range. Here, the variance is that of ``n`` times the ranks, whose mean is 1. If no head is in the range, all
    heads count.

    Args:
        queries, keys: ``(batch, heads, n, head_dim)``, as the layer's attention multiplies them.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        temperature: divisor of the scores, > 0; at 1 the ranks follow the layer's own attention.
        iterations: number of steps, at least 1. The paper takes 30 to 50 in the first layers, 5 to 10 in the middle and
            1 in the last ones.
        damping: share of the rank that each step spreads evenly over all tokens, in [0, 1].
        cls_start: token 0 is a CLS token and starts with ``sqrt(n)`` times the rank of others. Otherwise all tokens
            start with the same rank.
        variances: smallest and largest variance of a head that counts; (0.01, 0.7) in the paper. Default: all count.

    Returns:
        ``(batch, n)`` float32 in [0, 1].
    """
    n = queries.shape[2]
    start = None
    if cls_start:
        start = queries.new_ones((1, n), dtype=torch.float32)
        start[:, 0] = n**0.5
        start = start / start.sum()
    ranks = attention_ranks(
        queries, keys, scale=scale, temperature=temperature, iterations=iterations, damping=damping, start=start
    )
    if variances is None:
        return over_heads(ranks)
    spread = (n * ranks).var(dim=2, correction=0)
    counted = (spread >= variances[0]) & (spread <= variances[1])
    return over_heads(ranks, counted | ~counted.any(dim=1, keepdim=True))


@torch.no_grad()
def rank_pruning(
    queries: Tensor,
    keys: Tensor,
    keep: int,
    *,
    scale: float,
    similar: int = 0,
    protected: int = 1,
    temperature: float = 1.0,
    iterations: int = 5,
    damping: float = 0.0,
    cls_start: bool = False,
    variances: tuple[float, float] | None = None,
) -> Reduction | None:
    """Drop tokens by similarity, then by importance (Zero-TPrune, arXiv 2305.17328).

    First, one step of the page rank divides the tokens into a less and a more important half. The ``similar`` tokens of
    the less important half that are most similar to a token of the other half are dropped. Then the tokens that are
    left are ranked by :func:`weighted_page_rank`, and the most important ones stay. They keep their order, and nothing
    is merged.

    What the paper leaves open: two keys are compared by the cosine of the keys of all heads, concatenated. Protected
    tokens are in neither half. In the second ranking the attention is renormalised among the tokens that are left. With
    an odd number of tokens, the more important half has one more.

    Args:
        queries, keys: ``(batch, heads, n, head_dim)``, as the layer's attention multiplies them.
        keep: number of tokens that stay, the protected ones not counted, at least 0.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        similar: how many tokens are dropped by similarity, at least 0. No more are than half of the tokens, and than
            all that are to be dropped.
        protected: number of tokens at the front (CLS, registers) that stay. They take part in the ranking.
        temperature, iterations, damping, cls_start, variances: as in :func:`weighted_page_rank`.

    Returns:
        ``protected + keep`` rows; None if nothing is to be dropped.
    """
    batch, heads, n, head_dim = queries.shape
    patches = n - protected
    if keep >= patches:
        return None
    rank = {
        "scale": scale,
        "temperature": temperature,
        "damping": damping,
        "cls_start": cls_start,
        "variances": variances,
    }
    places = torch.arange(n, device=queries.device).expand(batch, -1)
    similar = min(similar, patches // 2, patches - keep)
    if similar > 0:
        importance = weighted_page_rank(queries, keys, iterations=1, **rank)[:, protected:]
        left = _less_similar(keys[:, :, protected:], importance, similar) + protected
        places = torch.cat([places[:, :protected], left], dim=1)
        index = places[:, None, :, None].expand(-1, heads, -1, head_dim)
        queries, keys = queries.gather(2, index), keys.gather(2, index)
    importance = weighted_page_rank(queries, keys, iterations=iterations, **rank)[:, protected:]
    best = importance.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values + protected
    return Reduction.gather(torch.cat([places[:, :protected], places.gather(1, best)], dim=1), n)


def _less_similar(keys: Tensor, importance: Tensor, count: int) -> Tensor:
    """(batch, n - count) long, ascending: the tokens left after dropping unimportant ones similar to important ones.

    Args:
        keys: ``(batch, heads, n, head_dim)``.
        importance: ``(batch, n)``.
        count: number of tokens to drop, at most ``n // 2``.
    """
    batch, heads, n, head_dim = keys.shape
    order = importance.argsort(dim=1, stable=True)
    directions = normalize(keys.transpose(1, 2).reshape(batch, n, heads * head_dim).float(), dim=-1, eps=1e-8)
    ordered = directions.gather(1, order.unsqueeze(-1).expand(-1, -1, heads * head_dim))
    less, more = ordered[:, : n // 2], ordered[:, n // 2 :]
    similarity = (less @ more.transpose(1, 2)).amax(dim=2)
    dropped = similarity.argsort(dim=1, descending=True, stable=True)[:, :count]
    left = torch.ones_like(order, dtype=torch.bool).scatter(1, order.gather(1, dropped), False)
    return left.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : n - count]
