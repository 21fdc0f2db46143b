# SPDX-License-Identifier: Apache-2.0
"""Redundant tokens: similarity to later tokens (TextMonkey), and information density (Token correlation)."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.ops.outliers import above_quartiles
from vtprune.ops.selection import top_k_mask

# Number of similarities in memory at a time, so that memory grows with the tokens and not with their square.
_BLOCK_ELEMENTS = 1 << 22


def _cosines(features: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks: numbers of tokens, ``(rows, 1)``, and their cosines with all, ``(groups, rows, tokens)``."""
    directions = normalize(features.float(), dim=-1, eps=1e-8)
    groups, tokens, _ = features.shape
    at_once = max(_BLOCK_ELEMENTS // max(groups * tokens, 1), 1)
    for begin in range(0, tokens, at_once):
        rows = directions[:, begin : begin + at_once]
        numbers = torch.arange(begin, begin + rows.shape[1], device=features.device)
        yield numbers.unsqueeze(1), rows @ directions.transpose(1, 2)


def similarity_to_later(features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosine of each token with the most similar later token (the filter of TextMonkey, arXiv 2403.04473).

    If the tokens with the lowest values are kept, the last of several similar tokens stays.

    Deviation: the similarity of a zero vector is 0, not NaN.

    Args:
        features: ``(groups, tokens, dim)``.
        valid: ``(groups, tokens)`` bool, False for padding at the end of a row; by default all tokens count.

    Returns:
        ``(groups, tokens)`` float32; -1, the lowest cosine, for the last token of a group and for padding.
    """
    groups, tokens, _ = features.shape
    numbers = torch.arange(tokens, device=features.device)
    values = [features.new_empty(groups, 0, dtype=torch.float32)]
    for rows, cosines in _cosines(features):
        counts = numbers > rows
        if valid is not None:
            counts = counts & valid.unsqueeze(1)
        values.append(cosines.masked_fill_(~counts, -1).amax(2))
    return torch.cat(values, dim=1)


def repeated(features: Tensor, valid: Tensor | None = None, *, similarity: float, count: int) -> Tensor:
    """Mark the tokens with at least ``count`` others, before or after them, whose cosine is above ``similarity``.

    Args:
        features: ``(groups, tokens, dim)``.
        valid: ``(groups, tokens)`` bool, False for padding; by default all tokens count.
        similarity: cosine above which two tokens are similar, in [-1, 1].
        count: number of similar tokens that makes a token redundant, at least 1.

    Returns:
        ``(groups, tokens)`` bool, False for padding.
    """
    groups, tokens, _ = features.shape
    numbers = torch.arange(tokens, device=features.device)
    found = [features.new_empty(groups, 0, dtype=torch.bool)]
    for rows, cosines in _cosines(features):
        alike = (cosines > similarity) & (numbers != rows)
        if valid is not None:
            alike &= valid.unsqueeze(1)
        found.append(alike.sum(2) >= count)
    result = torch.cat(found, dim=1)
    return result if valid is None else result & valid


def information_density(
    keys: Tensor, valid: Tensor | None = None, *, similarity: float = 0.9, count: int = 8
) -> Tensor:
    """Share of a group's tokens that are not :func:`repeated`: low for empty paper, high for dense print.

    Inspired by Token-level Correlation-guided Compression (arXiv 2407.14439). The paper does not publish the values of
    ``similarity`` and ``count``.

    Args:
        keys: ``(groups, tokens, dim)``, keys of an early encoder layer.
        valid: ``(groups, tokens)`` bool, False for padding; by default all tokens count.
        similarity, count: as in :func:`repeated`.

    Returns:
        ``(groups,)`` float32 in [0, 1]; 0 for a group without tokens.
    """
    if valid is None:
        valid = keys.new_ones(keys.shape[:2], dtype=torch.bool)
    fresh = valid & ~repeated(keys, valid, similarity=similarity, count=count)
    return fresh.sum(1) / valid.sum(1).clamp_min(1)


def global_and_local(
    global_attention: Tensor,
    local_attention: Tensor,
    density: Tensor,
    valid: Tensor,
    budget: Tensor | None = None,
    *,
    whiskers: float = 1.5,
    noise: Tensor | None = None,
) -> Tensor:
    """Mark global tokens by attention of a deep layer, and local tokens by attention of an early layer.

    Inspired by Token-level Correlation-guided Compression (arXiv 2407.14439). The authors do not publish all details;
    these are chosen here. Global tokens are those whose attention is an outlier
    (:func:`~vtprune.ops.outliers.above_quartiles`). Local tokens are those that CLS attends to most in the early layer;
    their number is ``density * tokens``, rounded. Both are kept. With a budget, global tokens come first, by their
    attention, then local tokens, by theirs.

    Args:
        global_attention: ``(groups, tokens)``, CLS attention of a deep layer.
        local_attention: ``(groups, tokens)``, at least 0, CLS attention of an early layer.
        density: ``(groups,)`` in [0, 1], the result of :func:`information_density`; unused with a budget.
        valid: ``(groups, tokens)`` bool.
        budget: ``(groups,)`` long, exact number of tokens to keep; default: all global and local tokens.
        whiskers: as in :func:`~vtprune.ops.outliers.above_quartiles`.
        noise: ``(groups, tokens)`` uniform in (0, 1). With it, local tokens are drawn without replacement, with
            probabilities in proportion to their attention. Default: no draw; those with the largest attention.

    Returns:
        ``(groups, tokens)`` bool.
    """
    local_order = local_attention.float()
    if noise is not None:
        # The largest log-probabilities plus Gumbel noise are a draw without replacement.
        local_order = local_order.log() - noise.float().log().neg().log()
    outliers = above_quartiles(global_attention, valid, whiskers)
    if budget is None:
        local = (density * valid.sum(1)).round().long()
        return outliers | top_k_mask(local_order, valid, local)
    ahead = _ranks(global_attention.float()) + global_attention.shape[1]
    return top_k_mask(torch.where(outliers, ahead, _ranks(local_order)), valid, budget)


def _ranks(values: Tensor) -> Tensor:
    """``(groups, tokens)`` long: 0 for the smallest value of a group; of equal values the first ranks higher."""
    falling = values.argsort(dim=1, descending=True, stable=True)
    return values.shape[1] - 1 - falling.argsort(dim=1)
