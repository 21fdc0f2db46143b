# SPDX-License-Identifier: Apache-2.0
"""Pruning by how much attention a token receives: against a threshold, against the best, or down a falling rate."""

import math

import torch
from torch import Tensor

_SMALLEST_THRESHOLD = 1e-5


def mean_received(attention: Tensor, alive: Tensor, *, reference_quirks: bool = False) -> Tensor:
    """Attention each token receives, the mean over heads and queries (Learned Token Pruning, arXiv 2107.00910).

    Args:
        attention: ``(batch, heads, tokens, tokens)`` post-softmax, tokens that are not alive masked as keys.
        alive: ``(batch, tokens)`` bool, False for padding and for tokens pruned before: their queries do not count.
        reference_quirks: divide by the padded length as the reference does, so that padding dilutes the scores, instead
            of by the number of tokens alive.

    Returns:
        ``(batch, tokens)`` float32. Over the tokens alive the mean is one over their number.
    """
    queries = alive.float()
    counted = torch.full_like(queries[:, :1], alive.shape[1]) if reference_quirks else queries.sum(1, keepdim=True)
    return torch.einsum("bhqk,bq->bk", attention.float(), queries) / (counted.clamp_min(1) * attention.shape[1])


def rising_threshold(final: float, layer: int, layers: int) -> float:
    """Threshold of a layer: from 0 at the first in even steps towards ``final`` after the last one.

    Args:
        final: the value that a layer after the last would have.
        layer: 0-based.
    """
    return final * layer / layers


def above_threshold(scores: Tensor, alive: Tensor, threshold: float, *, reference_quirks: bool = False) -> Tensor:
    """Tokens whose score reaches a fixed threshold, counted in multiples of the average score.

    The average is one over the number of tokens alive, so a threshold means the same at any length. Below 1 a token is
    always left, for the best is at least average.

    Args:
        scores: ``(batch, tokens)``, of :func:`mean_received`.
        alive: ``(batch, tokens)`` bool.
        threshold: 0 prunes only what receives next to nothing.
        reference_quirks: take the threshold as it is. Published ones (0.01) are for short texts and would prune nearly
            all of several hundred visual tokens.

    Returns:
        ``(batch, tokens)`` bool, the tokens kept of those alive.
    """
    unit = 1 if reference_quirks else 1 / alive.sum(1, keepdim=True).clamp_min(1)
    limit = torch.as_tensor(threshold * unit, dtype=torch.float32, device=scores.device)
    return alive & (scores >= limit.clamp_min(_SMALLEST_THRESHOLD))


def near_best(scores: Tensor, alive: Tensor, share: float) -> Tensor:
    """Tokens whose score is at least ``share`` of the largest in their sample.

    Args:
        scores: ``(batch, tokens)``, not negative.
        alive: ``(batch, tokens)`` bool.

    Returns:
        ``(batch, tokens)`` bool, the tokens kept of those alive: at least one of each sample that has any.
    """
    best = scores.masked_fill(~alive, 0).amax(1, keepdim=True)
    return alive & (scores >= share * best)


def cascade_rate(final: float, layer: int, layers: int) -> float:
    """Share of the tokens alive after a layer of a cascade of top-k selections (SpAtten, arXiv 2012.09852).

    The first ``max(3, 15 %)`` layers prune nothing; then the share falls evenly, to ``final`` at the last layer.

    Args:
        final: share left after the last layer.
        layer: 0-based.

    Returns:
        A share of all tokens of a sample; rounded to a count, that many with the highest scores stay.
    """
    untouched = max(3, math.ceil(0.15 * layers))
    if layer < untouched:
        return 1.0
    return 1 - (1 - final) * (layer - untouched + 1) / (layers - untouched)
