# SPDX-License-Identifier: Apache-2.0
"""Attention rows: the rows of an attention matrix that a method asks for, without the rest of the matrix."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Scores that are in memory at a time: they stay in a processor's cache, and keep an accelerator busy.
_AT_ONCE_ON_CPU, _AT_ONCE = 1 << 20, 1 << 26


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


@torch.no_grad()
def attention_received(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Callable[[int, int], Tensor] | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    rows_at_once: int = 256,
) -> Tensor:
    """Mean attention that each key receives, over heads and all query rows.

    Args:
        queries: ``(batch, heads, rows, head_dim)``.
        keys: ``(batch, kv_heads, tokens, head_dim)``.
        scale: factor on the dot products.
        mask: a function of ``first`` and ``last`` that gives the mask of rows ``first`` to ``last - 1``, ``(batch | 1,
            1, rows | 1, reach)`` bool, True where a row may attend. Keys behind the first ``reach`` are seen by none of
            these rows, and nothing is computed for them. By default all rows attend to all keys.
        valid: ``(batch, rows)`` bool, the query rows that count; by default all.
        softcap, sinks: as in :func:`attention_rows`.
        rows_at_once: number of query rows in memory at a time; the whole attention matrix never exists.

    Returns:
        ``(batch, tokens)`` float32; each row sums to one, with sinks to less than one. Rows that may attend to nothing
        add nothing.
    """
    batch, heads, count, _ = queries.shape
    kv_heads, tokens = keys.shape[1:3]
    total = keys.new_zeros(batch, tokens, dtype=torch.float32)
    for first in range(0, count, rows_at_once):
        last = min(first + rows_at_once, count)
        hidden, reach = None, tokens
        counted = total.new_ones(batch, last - first) if valid is None else valid[:, first:last].float()
        if mask is not None:
            visible = mask(first, last)
            hidden, reach = ~visible, visible.shape[-1]
            counted = counted * visible.any(-1)[:, 0]
        for samples, here in _blocks(batch, kv_heads, heads // kv_heads * (last - first) * reach, keys.device):
            few = slice(here.start * heads // kv_heads, here.stop * heads // kv_heads)
            rows = queries[samples, few, first:last].float() * scale
            scores = _products(
                rows.unflatten(1, (here.stop - here.start, -1)).flatten(2, 3), keys[samples, here, :reach]
            )
            scores = scores.reshape(*rows.shape[:3], reach)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if hidden is not None:
                # Not minus infinity: rows that see nothing must not become NaN, for they are then multiplied by zero.
                scores.masked_fill_(hidden if len(hidden) == 1 else hidden[samples], torch.finfo(scores.dtype).min)
            if sinks is not None:
                column = sinks[few].to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
                scores = torch.cat([scores, column], dim=-1)
            weights = scores.softmax(dim=-1).mul_(counted[samples, None, :, None])
            total[samples, :reach] += weights.sum((1, 2))[:, :reach]
    number = count if valid is None else valid.sum(1, keepdim=True).clamp_min(1)
    return total / number / heads


def _blocks(batch: int, kv_heads: int, elements: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Samples and key heads whose scores are computed together, each pair of which has so many elements."""
    most = max((_AT_ONCE_ON_CPU if device.type == "cpu" else _AT_ONCE) // max(elements, 1), 1)
    here, samples = min(most, kv_heads), max(most // kv_heads, 1)
    for sample in range(0, batch, samples):
        for head in range(0, kv_heads, here):
            yield slice(sample, min(sample + samples, batch)), slice(head, min(head + here, kv_heads))


def _products(rows: Tensor, keys: Tensor) -> Tensor:
    """``(samples, kv_heads, rows, keys)`` float32 dot products; rows: ``(samples, kv_heads, rows, head_dim)``."""
    keys = keys.float()
    if rows.device.type != "cpu":
        return rows @ keys.mT
    # A batch of products takes up to twice as long there as one product after another.
    products = rows.new_empty(*rows.shape[:3], keys.shape[2])
    for row, key, product in zip(rows.flatten(0, 1), keys.flatten(0, 1), products.flatten(0, 1), strict=True):
        torch.mm(row, key.T, out=product)
    return products
