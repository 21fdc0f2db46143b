# SPDX-License-Identifier: Apache-2.0
"""PageRank over attention (AIM): a token is important if important tokens attend to it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vtprune.ops.attention import attention_rows

# Number of transitions in memory at a time, so that memory grows with the tokens and not with their square.
_BLOCK_ELEMENTS = 1 << 24


def page_rank(transitions: Tensor, valid: Tensor | None = None, *, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """A few steps of the power iteration from equal ranks: ``p <- (1 - damping) * p P + damping / n``.

    Args:
        transitions: ``(batch, heads, n, n)``, ``P``: row ``i`` says where the rank of token ``i`` goes. Rows sum to
            one.
        valid: ``(batch, n)`` bool, the tokens that start with a rank; their number is ``n`` in the formula. By default
            all tokens.
        iterations: number of steps, at least 0.
        damping: share of the rank that each step spreads evenly over all tokens, in [0, 1].

    Returns:
        ``(batch, heads, n)`` float32, summing to one.
    """
    equal = _equal_ranks(transitions.shape[-1], valid).to(transitions.device).expand(transitions.shape[:-1])
    transitions = transitions.float()
    return _iterate(lambda ranks: (ranks.unsqueeze(-2) @ transitions).squeeze(-2), equal, iterations, damping)


def _equal_ranks(n: int, valid: Tensor | None) -> Tensor:
    """(batch | 1, 1, n) float32: the same rank for every valid token, summing to one."""
    if valid is None:
        return torch.full((1, 1, n), 1 / max(n, 1))
    return (valid / valid.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1).float()


def _iterate(step: Callable[[Tensor], Tensor], equal: Tensor, iterations: int, damping: float) -> Tensor:
    ranks = equal
    for _ in range(iterations):
        ranks = (1 - damping) * step(ranks) + damping * equal
    return ranks


@torch.no_grad()
def attention_page_rank(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Tensor | Callable[[int, int], Tensor],
    valid: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """Importance of every token by the attention of a decoder layer (AIM, arXiv 2412.03248).

    It is the root mean square over heads of the ranks of :func:`page_rank`. The transitions are the layer's attention,
    sharpened by a temperature. All tokens of the prompt take part, text and visual tokens. Heads are processed one
    after the other. With many tokens, the transitions are computed in blocks of rows, again in every iteration.

    Deviation: in a padded batch the padding has no rank; in the reference it is NaN.

    Args:
        queries: ``(batch, heads, n, head_dim)``, positions already applied.
        keys: ``(batch, kv_heads, past + n, head_dim)``, positions already applied. Past tokens have no rank: the rank
            that goes to them is lost.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        mask: bool, broadcastable to ``(batch, 1, n, past + n)``, True where a row may attend; or a function of
            ``first`` and ``last`` that gives rows ``first`` to ``last - 1`` of it. A token that is hidden from all rows
            (pruned, but not removed) has no importance, but its row still passes on the rank that it starts with.
        valid: ``(batch, n)`` bool, False for padding; by default all tokens are real.
        softcap, sinks: as in :func:`vtprune.ops.attention.attention_rows`. The rank that goes to sinks is lost.
        temperature: divisor of the scores, > 0.
        iterations, damping: as in :func:`page_rank`.

    Returns:
        ``(batch, n)`` float32 in [0, 1]. With a causal mask and no damping the ranks of late tokens go to zero.
    """
    batch, heads, n, _ = queries.shape
    kv_heads = keys.shape[1]
    size = max(_BLOCK_ELEMENTS // max(batch * keys.shape[2], 1), 1)
    blocks = [(first, min(first + size, n)) for first in range(0, n, size)]
    if torch.is_tensor(mask):
        mask = functools.partial(_rows, mask.expand(*mask.shape[:-2], n, mask.shape[-1]))
    visible = functools.lru_cache(maxsize=1)(mask)
    equal = _equal_ranks(n, valid).to(keys.device).expand(batch, 1, n)

    def transitions(head: int, first: int, last: int) -> Tensor:
        return attention_rows(
            queries[:, head, first:last].unsqueeze(1),
            keys[:, head * kv_heads // heads].unsqueeze(1),
            scale=scale / temperature,
            mask=visible(first, last),
            softcap=None if softcap is None else softcap / temperature,
            sinks=None if sinks is None else sinks[head : head + 1] / temperature,
        )[..., -n:]

    importance = keys.new_zeros(batch, n, dtype=torch.float32)
    for head in range(heads):
        rows = functools.partial(transitions, head)
        step = functools.partial(_step, functools.lru_cache(rows) if len(blocks) == 1 else rows, blocks)
        importance += _iterate(step, equal, iterations, damping).squeeze(1).square()
    return (importance / heads).sqrt()


def _rows(mask: Tensor, first: int, last: int) -> Tensor:
    return mask[..., first:last, :]


def _step(transitions: Callable[[int, int], Tensor], blocks: list[tuple[int, int]], ranks: Tensor) -> Tensor:
    """(batch, 1, n) the ranks after one step, computed from one block of rows after the other."""
    return sum((ranks[..., None, a:b] @ transitions(a, b)).squeeze(-2) for a, b in blocks)
