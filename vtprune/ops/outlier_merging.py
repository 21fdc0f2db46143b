# SPDX-License-Identifier: Apache-2.0
"""PruMerge's merge: each kept token gathers the tokens with the most similar keys, and one token gathers the rest."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def one_wide_head(rows: Tensor) -> Tensor:
    """The attention of all heads as if they were one, from the attention of each.

    The logits of one wide head are the sum of those of the heads, over the root of their number. The logarithm of
    a head's attention is its logit less a constant, which a softmax does not see.

    Args:
        rows: ``(..., heads, tokens)``, sums to 1 over all tokens that the query sees.

    Returns:
        ``(..., tokens)`` float32, sums to 1.
    """
    logits = rows.float().clamp_min(torch.finfo(torch.float32).tiny).log().sum(-2)
    return (logits / rows.shape[-2] ** 0.5).softmax(-1)


def even_steps(counts: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """Mark tokens at an even stride, about three for each of a count (PruMerge+, arXiv 2403.15388).

    Args:
        counts: ``(groups,)`` long, at least 0; the stride is a third of the length over the count, rounded down twice.
        lengths: ``(groups,)`` long, number of valid tokens of each group.
        tokens: width of the result.

    Returns:
        ``(groups, tokens)`` bool; the last token of a group is never marked, unless the stride is 1; without a count,
        nothing is.
    """
    stride = (lengths // counts.clamp_min(1) // 3).clamp_min(1).unsqueeze(1)
    place, length = torch.arange(tokens, device=counts.device), lengths.unsqueeze(1)
    behind = place < torch.where(stride == 1, length, length - 1)
    return (place % stride == 0) & behind & (counts > 0).unsqueeze(1)


def gather_around(
    features: Tensor,
    keys: Tensor,
    weights: Tensor,
    kept: Tensor,
    valid: Tensor,
    most: int,
    neighbours: int = 32,
    *,
    reference_quirks: bool = False,
) -> tuple[Tensor, Tensor]:
    """What kept tokens become, and what gathers the others (PruMerge, arXiv 2403.15388).

    A kept token becomes the mean of itself, with weight 1, and of the other tokens with the most similar keys (cosine),
    with their weights; these may be kept tokens, and a token may be gathered several times. What is not kept has a mean
    of its own.

    Args:
        features: ``(groups, tokens, dim)``.
        keys: ``(groups, tokens, key_dim)``.
        weights: ``(groups, tokens)`` float, at least 0.
        kept: ``(groups, tokens)`` bool, part of ``valid``.
        valid: ``(groups, tokens)`` bool.
        most: the largest number of kept tokens of a group, on the CPU.
        neighbours: number of tokens that each kept one gathers, at least 0.
        reference_quirks: sums instead of means.

    Returns:
        features: ``(groups, tokens, dim)``; rows of kept tokens are replaced.
        rest: ``(groups, dim)``, the mean of what is not kept.
    """
    weights = weights.float().masked_fill(~valid, 0.0)
    values = features.float().masked_fill(~valid.unsqueeze(2), 0.0)
    left = weights.masked_fill(kept, 0.0).unsqueeze(1)
    rest = (left @ values).squeeze(1)
    if not reference_quirks:
        rest = rest / left.sum(2).clamp_min(torch.finfo(torch.float32).tiny)
    near = min(neighbours, valid.shape[1] - 1)
    if most and near > 0:
        places = kept.logical_not().byte().argsort(dim=1, stable=True)[:, :most]
        directions = normalize(keys.float(), dim=2)
        own = directions.gather(1, places.unsqueeze(2).expand(-1, -1, directions.shape[2]))
        cosines = (own @ directions.mT).masked_fill(~valid.unsqueeze(1), -torch.inf)
        nearest = cosines.scatter_(2, places.unsqueeze(2), -torch.inf).topk(near, dim=2).indices
        # A product and not a gathered sum: memory stays that of a table of kept tokens and all tokens.
        table = torch.zeros_like(cosines).scatter_(2, nearest, 1.0) * weights.unsqueeze(1)
        table = table.scatter_(2, places.unsqueeze(2), 1.0)
        merged = table @ values
        if not reference_quirks:
            merged = merged / table.sum(2, keepdim=True)
        at = places.unsqueeze(2).expand_as(merged)
        real = kept.gather(1, places).unsqueeze(2)
        merged = torch.where(real, merged.to(features.dtype), features.gather(1, at))
        features = features.scatter(1, at, merged)
    return features, rest.to(features.dtype)
