# SPDX-License-Identifier: Apache-2.0
"""PageRank over attention (AIM, Zero-TPrune): a token is important if important tokens attend to it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vtprune.ops.attention import attention_rows

# Number of transitions in memory at a time, so that memory grows with the tokens and not with their square.
_BLOCK_ELEMENTS = 1 << 24


@torch.no_grad()
def attention_ranks(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Tensor | Callable[[int, int], Tensor] | None = None,
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
    start: Tensor | None = None,
) -> Tensor:
    """Ranks of the tokens in every head after a few steps of the power iteration (AIM, arXiv 2412.03248).

    A step is ``p <- (1 - damping) * p P + damping / n``. ``P`` is the layer's attention, sharpened by a temperature:
    row ``i`` says where the rank of token ``i`` goes. Heads are processed one after the other, or several together if
    tokens are few. With many tokens, the transitions are computed in blocks of rows, again in every iteration.

    Deviation: in a padded batch the padding has no rank; in the reference it is NaN.

    Args:
        queries: ``(batch, heads, n, head_dim)``, positions already applied.
        keys: ``(batch, kv_heads, past + n, head_dim)``, positions already applied. Past tokens have no rank: the rank
            that goes to them is lost.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        mask: bool, broadcastable to ``(batch, 1, n, past + n)``, True where a row may attend; or a function of
            ``first`` and ``last`` that gives rows ``first`` to ``last - 1`` of it. A token that is hidden from all rows
            (pruned, but not removed) has no rank, but its row still passes on the rank that it starts with. None: every
            row attends to all tokens.
        valid: ``(batch, n)`` bool, False for padding; by default all tokens are real. Their number is ``n`` in the
            formula.
        softcap, sinks: as in :func:`vtprune.ops.attention.attention_rows`. The rank that goes to sinks is lost.
        temperature: divisor of the scores, > 0.
        iterations: number of steps, at least 0.
        damping: share of the rank that each step spreads evenly over all valid tokens, in [0, 1].
        start: ``(batch | 1, n)`` float32, the ranks before the first step. Default: equal for all valid tokens, with
            sum 1.

    Returns:
        ``(batch, heads, n)`` float32 in [0, 1]. Each head has the sum of the start, unless rank is lost.
    """
    batch, heads, n, _ = queries.shape
    kv_heads, columns = keys.shape[1:3]
    group = max(min(_BLOCK_ELEMENTS // max(batch * n * columns, 1), heads), 1)
    size = max(_BLOCK_ELEMENTS // max(batch * columns * group, 1), 1)
    blocks = [(first, min(first + size, n)) for first in range(0, n, size)]
    if torch.is_tensor(mask):
        mask = functools.partial(_rows, mask.expand(*mask.shape[:-2], n, mask.shape[-1]))
    visible = functools.lru_cache(maxsize=1)(mask or _everything)
    equal = _equal_ranks(n, valid, keys.device)
    begin = equal if start is None else start.to(keys.device).unsqueeze(1)

    def transitions(chosen: slice, own_keys: Tensor, first: int, last: int) -> Tensor:
        return attention_rows(
            queries[:, chosen, first:last],
            own_keys,
            scale=scale / temperature,
            mask=visible(first, last),
            softcap=None if softcap is None else softcap / temperature,
            sinks=None if sinks is None else sinks[chosen] / temperature,
        )[..., -n:]

    ranks = []
    for head in range(0, heads, group):
        members = range(head, min(head + group, heads))
        own_keys = torch.stack([keys[:, member * kv_heads // heads] for member in members], dim=1)
        rows = functools.partial(transitions, slice(members.start, members.stop), own_keys)
        step = functools.partial(_step, functools.lru_cache(rows) if len(blocks) == 1 else rows, blocks)
        shape = (batch, len(members), n)
        ranks.append(_iterate(step, begin.expand(shape), equal.expand(shape), iterations, damping))
    return torch.cat(ranks, dim=1)


def over_heads(ranks: Tensor, counted: Tensor | None = None) -> Tensor:
    """Root mean square of the ranks over heads: one head that ranks a token high is enough to emphasise it.

    Args:
        ranks: ``(batch, heads, n)``.
        counted: ``(batch, heads)`` bool, the heads that count, at least one. Default: all.

    Returns:
        ``(batch, n)``.
    """
    if counted is None:
        return ranks.square().mean(dim=1).sqrt()
    weights = counted / counted.sum(dim=1, keepdim=True)
    return (ranks.square() * weights.unsqueeze(-1)).sum(dim=1).sqrt()


def _equal_ranks(n: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """(batch | 1, 1, n) float32: the same rank for every valid token, summing to one."""
    if valid is None:
        return torch.full((1, 1, n), 1 / max(n, 1), device=device)
    return (valid / valid.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1).float().to(device)


def _iterate(step: Callable[[Tensor], Tensor], start: Tensor, equal: Tensor, iterations: int, damping: float) -> Tensor:
    ranks = start
    for _ in range(iterations):
        ranks = (1 - damping) * step(ranks) + damping * equal
    return ranks


def _everything(first: int, last: int) -> None:
    """The mask of rows that attend to all tokens."""


def _rows(mask: Tensor, first: int, last: int) -> Tensor:
    return mask[..., first:last, :]


def _step(transitions: Callable[[int, int], Tensor], blocks: list[tuple[int, int]], ranks: Tensor) -> Tensor:
    """(batch, heads, n) the ranks after one step, computed from one block of rows after the other."""
    return sum((ranks[..., None, a:b] @ transitions(a, b)).squeeze(-2) for a, b in blocks)
