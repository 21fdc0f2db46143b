# SPDX-License-Identifier: Apache-2.0
"""HoliTom's merge inside the LLM: each dropped token goes into the kept token that is most similar to it."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Elements of the similarity matrix that exist at a time.
_BLOCK_ELEMENTS = 1 << 22


def absorb_dropped(
    hidden: Tensor, weights: Tensor, k: int, *, runs: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the ``k`` tokens of the largest weight and let them absorb the others (HoliTom, arXiv 2505.21334).

    A dropped token goes into the kept token with the largest cosine; of equal cosines, into the one with the larger
    weight. A kept token absorbs its tokens one after another, in the order of the sequence. Each time it becomes the
    mean of itself and the next token, so later tokens count more.

    Args:
        hidden: ``(tokens, dim)`` hidden states of visual tokens that enter a decoder layer.
        weights: ``(tokens,)`` attention that each token has just received. In HoliTom it comes from the last token of
            the prompt, in the layer before, averaged over heads. Of equal weights the lower index is kept.
        k: tokens to keep, at least 0.
        runs: ``(tokens,)`` long, the run of visual tokens that each token belongs to. Tokens are absorbed only within
            their run, because text between two runs must not see the later one. In a run without a kept token they
            are lost. None: all tokens belong to one run.

    Returns:
        keep: ``(tokens,)`` bool.
        merged: ``(tokens, dim)``, the hidden states; those of kept tokens are replaced.
        sources: ``(tokens,)`` long, index of the kept token that each token went into, -1 for lost tokens.
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

    # Targets do not depend on one another, so round n lets every target absorb its n-th token.
    absorbed = dropped[sources[dropped] >= 0]
    absorbed = absorbed[sources[absorbed].argsort(stable=True)]
    counts = sources[absorbed].bincount(minlength=len(hidden))
    turn = torch.arange(len(absorbed), device=hidden.device) - (counts.cumsum(0) - counts)[sources[absorbed]]
    merged = hidden.to(torch.float, copy=True)
    for taken in absorbed[turn.argsort(stable=True)].split(turn.bincount().tolist()):
        targets = sources[taken]
        merged[targets] = (merged[targets] + merged[taken]) / 2
    return keep, merged.to(hidden.dtype), sources
