# SPDX-License-Identifier: Apache-2.0
"""Attention rows: the rows of an attention matrix that a method asks for, without the rest of the matrix."""

from collections.abc import Callable

import torch
from torch import Tensor


def attention_rows(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Post-softmax attention of the given query rows over all keys, in float32.

    Costs ``rows * keys``, not ``keys ** 2``; grouped key heads (GQA, MQA) are read in place, not repeated.

    Args:
        queries: ``(batch, heads, rows, head_dim)``, positions already applied.
        keys: ``(batch, kv_heads, keys, head_dim)``; ``heads`` is a multiple of ``kv_heads`` and query head ``h``
            reads key head ``h // (heads // kv_heads)``.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        softcap: bound ``c`` of the scores, which become ``c * tanh(score / c)`` (Gemma 2). None: no bound.
        sinks: ``(heads,)`` one logit a head (gpt-oss). It takes part in the softmax of all rows of its head like the
            logit of one more key, which has no column in the result. None: no sinks.
        mask: bool, broadcastable to ``(batch, 1 | heads, rows, keys)``, True where a row may attend.

    Returns:
        ``(batch, heads, rows, keys)`` float32. Rows sum to one, with sinks to less than one. A row that may attend to
        nothing is all zeros.
    """
    batch, heads, rows, head_dim = queries.shape
    kv_heads = keys.shape[1]
    # The query heads that share a key head become rows of one matrix product.
    grouped = (queries.float() * scale).reshape(batch, kv_heads, -1, head_dim)
    scores = (grouped @ keys.float().transpose(-1, -2)).view(batch, heads, rows, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores).view(1, -1, 1, 1).expand(batch, heads, rows, 1)
        return torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    weights = scores.softmax(dim=-1)
    return weights if mask is None else weights.masked_fill_(~mask.any(dim=-1, keepdim=True), 0.0)


def attention_received(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Callable[[int, int], Tensor] | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows_at_once: int = 128,
) -> Tensor:
    """Mean attention that each key receives, over heads and all query rows.

    Args:
        queries: ``(batch, heads, rows, head_dim)``.
        keys: ``(batch, kv_heads, tokens, head_dim)``.
        scale: factor on the dot products.
        mask: a function of ``first`` and ``last`` that gives the mask of rows ``first`` to ``last - 1``, as in
            :func:`attention_rows`; by default all rows attend to all keys.
        valid: ``(batch, rows)`` bool, the query rows that count; by default all.
        softcap, sinks: as in :func:`attention_rows`.
        rows_at_once: number of query rows in memory at a time; the whole attention matrix never exists.

    Returns:
        ``(batch, tokens)`` float32; each row sums to one, with sinks to less than one.
    """
    total = keys.new_zeros(len(keys), keys.shape[2], dtype=torch.float32)
    count = queries.shape[2]
    for first in range(0, count, rows_at_once):
        last = min(first + rows_at_once, count)
        visible = None if mask is None else mask(first, last)
        bounds = {"scale": scale, "mask": visible, "softcap": softcap, "sinks": sinks}
        rows = attention_rows(queries[:, :, first:last], keys, **bounds).mean(1)
        total += rows.sum(1) if valid is None else (rows * valid[:, first:last, None]).sum(1)
    return total / (count if valid is None else valid.sum(1, keepdim=True).clamp_min(1))
