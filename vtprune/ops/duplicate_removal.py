# SPDX-License-Identifier: Apache-2.0
"""VisPruner's duplicate removal: keep the important tokens, and remove the most duplicated of the others in rounds."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError


def important_and_distinct(
    scores: Tensor,
    features: Tensor,
    valid: Tensor,
    budget: Tensor,
    *,
    important_ratio: float = 0.5,
    step: int = 8,
) -> Tensor:
    """Keep the best tokens by score, and fill the budget with the least duplicated ones (VisPruner, arXiv 2412.01818).

    ``floor(budget * important_ratio)`` tokens stay because of their score. The other tokens form a list, ordered by
    falling score. While the list is too long, each token at an even place is compared with all tokens at odd places. At
    most ``step`` tokens at even places are removed: those with the most similar partner (cosine). The new list has the
    other tokens of the even places first, the most similar ones leading, and then those of the odd places in their
    order.

    Deviations: in a list of odd length the even places have one token more, and a round never removes more tokens than
    there are odd places; the reference fails in both cases. Of equal scores the lower index comes first, of equal
    similarities the earlier place.

    Args:
        scores: ``(groups, tokens)``, higher is more important.
        features: ``(groups, tokens, dim)``.
        valid: ``(groups, tokens)`` bool; a token that is not valid is never kept.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.
        important_ratio: share of the budget that is kept by score, in ``[0, 1]``.
        step: number of tokens that a round removes, at least 1.

    Returns:
        ``(groups, tokens)`` bool.

    Raises:
        VTPruneError: a score or feature of a valid token is NaN or infinite.
    """
    groups = torch.arange(len(valid), device=valid.device).unsqueeze(1)
    scores = scores.float().masked_fill(~valid, -torch.inf)
    features = features.float().masked_fill(~valid.unsqueeze(2), 0.0)
    if not (scores[valid].isfinite().all() and features.isfinite().all()):
        raise VTPruneError("scores or features hold NaN or infinite values: tokens cannot be ranked")
    directions = normalize(features, dim=2, eps=1e-8)
    similarity = directions @ directions.transpose(1, 2)

    lengths = valid.sum(1)
    budget = torch.minimum(budget.to(lengths.device), lengths)
    important = torch.tensor([int(k * important_ratio) for k in budget.tolist()], device=lengths.device).long()
    # Padding has the lowest scores, so it is at the end of the list.
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device)
    kept = torch.zeros_like(valid).scatter(1, order, ranks < important.unsqueeze(1))

    wanted = budget - important
    remaining = torch.where(wanted > 0, lengths - important, 0)
    # Wrapping around keeps `rest` a permutation, so the final scatter writes each token once.
    rest = order.gather(1, (important.unsqueeze(1) + ranks) % max(len(ranks), 1))
    while bool((remaining > wanted).any()):
        rest = rest[:, : int(remaining.max())]
        going = torch.minimum((remaining - wanted).clamp(max=step), remaining // 2).unsqueeze(1)
        evens, odds = ((remaining + 1) // 2).unsqueeze(1), (remaining // 2).unsqueeze(1)
        even, odd = rest[:, 0::2], rest[:, 1::2]
        even_ranks, odd_ranks = ranks[: even.shape[1]], ranks[: odd.shape[1]]
        partner = similarity[groups.unsqueeze(2), even.unsqueeze(2), odd.unsqueeze(1)]
        partner = partner.masked_fill((odd_ranks >= odds).unsqueeze(1), -torch.inf).amax(2)
        partner = partner.masked_fill(even_ranks >= evens, -torch.inf)
        even = even.gather(1, partner.argsort(dim=1, descending=True, stable=True))
        alive = torch.cat(((even_ranks >= going) & (even_ranks < evens), odd_ranks < odds), dim=1)
        rest = torch.cat((even, odd), dim=1).gather(1, (~alive).long().argsort(dim=1, stable=True))
        remaining = remaining - going.squeeze(1)
    stays = ranks[: rest.shape[1]] < remaining.unsqueeze(1)
    return kept.scatter(1, rest, kept.gather(1, rest) | stays)
