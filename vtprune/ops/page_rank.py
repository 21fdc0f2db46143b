# SPDX-License-Identifier: Apache-2.0
"""PageRank over attention: a token is important if important tokens attend to it."""

import torch
from torch import Tensor

from vtprune.ops.attention import attention_rows


def page_rank(transitions: Tensor, valid: Tensor | None = None, *, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """A few steps of the power iteration from equal ranks: ``p <- (1 - damping) * p P + damping / n``.

    Args:
        transitions: ``(batch, heads, n, n)``, ``P``: row ``i`` says where token ``i``'s rank goes; rows sum to one.
        valid: ``(batch, n)`` bool, the tokens that have a rank to begin with, ``n`` of them; by default all.
        iterations: number of steps, at least 0.
        damping: share of the rank that is dealt out anew to all in each step, in [0, 1].

    Returns:
        ``(batch, heads, n)`` float32, summing to one.
    """
    if valid is None:
        equal = transitions.new_full((1, 1, transitions.shape[-1]), 1 / max(transitions.shape[-1], 1))
    else:
        equal = (valid / valid.sum(1, keepdim=True).clamp_min(1)).unsqueeze(1)
    equal = equal.float().expand(transitions.shape[:-1])
    ranks = equal
    for _ in range(iterations):
        ranks = (1 - damping) * (ranks.unsqueeze(-2) @ transitions.float()).squeeze(-2) + damping * equal
    return ranks


@torch.no_grad()
def attention_page_rank(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float,
    mask: Tensor,
    valid: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 0.1,
    iterations: int = 5,
    damping: float = 0.0,
) -> Tensor:
    """Importance of every token of a decoder layer by its attention scores (AIM, arXiv 2412.03248).

    The ranks of :func:`page_rank` on the layer's attention, sharpened by a temperature, as root mean square over heads.
    All tokens of the prompt take part, text as well as visual ones. Heads come one after the other, so that one
    ``n * n`` matrix a sample is held and not one a head.

    Deviation: in a padded batch the padding has no rank, where it is NaN in the reference.

    Args:
        queries: ``(batch, heads, n, head_dim)``, positions already applied.
        keys: ``(batch, kv_heads, n, head_dim)``, likewise.
        scale: factor on the dot products, usually ``head_dim ** -0.5``.
        mask: bool, broadcastable to ``(batch, 1, n, n)``, True where a row may attend. A token whose column is masked
            throughout (pruned, but not removed) has no importance, and its row still passes on the rank that it begins
            with.
        valid: ``(batch, n)`` bool, False for padding; by default all tokens are real.
        softcap: as in :func:`vtprune.ops.attention.attention_rows`.
        temperature: divisor of the scores, > 0.
        iterations, damping: as in :func:`page_rank`.

    Returns:
        ``(batch, n)`` float32 in [0, 1]. With a causal mask and no damping the ranks of late tokens vanish.
    """
    kv_heads = keys.shape[1]
    importance = keys.new_zeros(keys.shape[0], keys.shape[2], dtype=torch.float32)
    for head, query in enumerate(queries.unbind(1)):
        transitions = attention_rows(
            query.unsqueeze(1),
            keys[:, head * kv_heads // queries.shape[1]].unsqueeze(1),
            scale=scale / temperature,
            mask=mask,
            softcap=None if softcap is None else softcap / temperature,
        )
        ranks = page_rank(transitions, valid, iterations=iterations, damping=damping)
        importance += ranks.squeeze(1).square()
    return (importance / queries.shape[1]).sqrt()
