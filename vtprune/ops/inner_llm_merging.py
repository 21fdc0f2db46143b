# SPDX-License-Identifier: Apache-2.0
"""Dropping tokens without losing all that they carry: each is absorbed by the kept token that it resembles most."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Elements of the similarity matrix that exist at a time.
_BLOCK_ELEMENTS = 1 << 22


def absorb_dropped(
    hidden: Tensor, weights: Tensor, k: int, *, runs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the ``k`` tokens of the largest weight and let them absorb the others (HoliTom, arXiv 2505.21334).

    A dropped token goes into the kept one of the largest cosine, of equal ones that of the larger weight. A kept token
    takes what it absorbs in one after another, in the order of the sequence, each time becoming the mean of itself
    and the next: later ones count more.

    Args:
        hidden: ``(tokens, dim)`` hidden states of visual tokens that enter a decoder layer.
        weights: ``(tokens,)`` how much attention each has just received; HoliTom: in the layer before, from the last
            token of the prompt, averaged over heads. Of equal weights the lower index is kept.
        k: tokens to keep, at least 0.
        runs: ``(tokens,)`` long, which run of visual tokens each is of. Tokens are absorbed within their run,
            because text that stands between two must not see the later one; without a kept token in it they are
            lost. None: all are of one.

    Returns:
        keep: ``(tokens,)`` bool.
        merged: ``(tokens, dim)``, the hidden states with those of kept tokens replaced.
        sources: ``(tokens,)`` long, index of the kept token that each went into, -1 for tokens that are lost.
    """
    best = weights.argsort(descending=True, stable=True)[:k]
    keep = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    keep[best] = True
    sources = torch.where(keep, torch.arange(len(hidden), device=hidden.device), -1)
    dropped = (~keep).nonzero()[:, 0]
    if not len(best) or not len(dropped):
        return keep, hidden, sources
    directions = normalize(hidden.float(), dim=-1)
    for block in dropped.split(max(_BLOCK_ELEMENTS // len(best), 1)):
        similarity = directions[block] @ directions[best].T
        if runs is not None:
            similarity.masked_fill_(runs[block][:, None] != runs[best], -torch.inf)
        highest, target = similarity.max(dim=1)
        sources[block] = torch.where(highest > -torch.inf, best[target], -1)

    # The n-th tokens that different targets absorb do not meet, so each round takes one of every target.
    absorbed = dropped[sources[dropped] >= 0]
    absorbed = absorbed[sources[absorbed].argsort(stable=True)]
    counts = sources[absorbed].bincount(minlength=len(hidden))
    turn = torch.arange(len(absorbed), device=hidden.device) - (counts.cumsum(0) - counts)[sources[absorbed]]
    merged = hidden.to(torch.float, copy=True)
    for taken in absorbed[turn.argsort(stable=True)].split(turn.bincount().tolist()):
        targets = sources[taken]
        merged[targets] = (merged[targets] + merged[taken]) / 2
    return keep, merged.to(hidden.dtype), sources
