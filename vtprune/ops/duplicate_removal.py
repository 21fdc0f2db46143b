# SPDX-License-Identifier: Apache-2.0
"""VisPruner's duplicate removal: keep the important tokens, and remove the most duplicated of the others in rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from vtprune.checks import require, with_short_cut
from vtprune.devices import send
from vtprune.ops.token_pairs import directions_of, nearest_neighbours

# Each token is compared with so many of its nearest neighbours. It nearly always finds one at an odd place among them.
_NEIGHBOURS = 96
# When no more than this share of them is left, neighbours are found again, among the tokens that are left.
_RENEW = 0.75


def important_and_distinct(
    scores: Tensor,
    features: Tensor,
    valid: Tensor,
    lengths: Tensor,
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
        lengths: ``(groups,)`` long, on the CPU: the number of valid tokens.
        budget: ``(groups,)`` long, on the CPU; at least 0; a budget above the number of valid tokens keeps them all.
        important_ratio: share of the budget that is kept by score, in ``[0, 1]``.
        step: number of tokens that a round removes, at least 1.

    Returns:
        ``(groups, tokens)`` bool.

    Raises:
        VTPruneError: a score or feature of a valid token is NaN or infinite.
    """
    scores = scores.float().masked_fill(~valid, -torch.inf)
    directions = directions_of(features, valid)
    require(
        (scores.isfinite() | ~valid).all() & directions.isfinite().all(),
        "scores or features hold NaN or infinite values: tokens cannot be ranked",
    )
    budget = torch.minimum(budget, lengths)
    important = torch.tensor([int(k * important_ratio) for k in budget.tolist()], dtype=torch.long)
    # Padding has the lowest scores, so it is at the end of the list.
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(order.shape[1], device=order.device)
    first = send(important, order.device).unsqueeze(1)
    kept = torch.zeros_like(valid).scatter(1, order, ranks < first)

    wanted = budget - important
    remaining = torch.where(wanted > 0, lengths - important, 0)
    # Wrapping around keeps the list a permutation, so the final scatter writes each token once.
    listed = order.gather(1, (first + ranks) % max(len(ranks), 1))[:, : _largest(remaining)]
    rounds = _rounds(remaining, wanted, step)

    def thin(neighbours: int) -> tuple[Tensor, Tensor]:
        return _thin(directions, listed, rounds, neighbours)

    left = with_short_cut(lambda: thin(_NEIGHBOURS), lambda: thin(listed.shape[1])[0])
    stays = ranks[: left.shape[1]] < send(rounds[-1], ranks.device).unsqueeze(1)
    return kept.scatter(1, left, kept.gather(1, left) | stays)


def _largest(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0


def _rounds(remaining: Tensor, wanted: Tensor, step: int) -> Tensor:
    """``(rounds + 1, groups)`` long, on the CPU: tokens in each list before each round, and after the last one."""
    counts = [remaining]
    while bool((remaining > wanted).any()):
        remaining = remaining - torch.minimum((remaining - wanted).clamp(min=0, max=step), remaining // 2)
        counts.append(remaining)
    return torch.stack(counts)


def _thin(directions: Tensor, listed: Tensor, rounds: Tensor, neighbours: int) -> tuple[Tensor, Tensor]:
    """Remove tokens from the lists, round by round.

    Args:
        directions: ``(groups, tokens, dim)``.
        listed: ``(groups, places)`` long, the tokens of each list; behind its end other tokens, each once.
        rounds: what `_rounds` gives.
        neighbours: number of nearest neighbours that each token is compared with.

    Returns:
        ``(groups, places)`` long, the lists after the last round; and a bool, whether all tokens at even places had a
        neighbour at an odd place in every round. If not, the lists are not what they should be.
    """
    device, dim = directions.device, directions.shape[2]
    right = torch.ones((), dtype=torch.bool, device=device)
    lengths, counts = rounds.amax(1).tolist(), send(rounds, device).unsqueeze(2)
    tokens, slots, found = listed, listed, 0
    for number, length in enumerate(lengths[:-1]):
        count, going = counts[number], counts[number] - counts[number + 1]
        if not number or length <= _RENEW * found:
            # From here on the list has slots, i.e. places in the list as it is now.
            tokens, found = tokens.gather(1, slots)[:, :length] if number else listed[:, :length], length
            places = torch.arange(length, device=device)
            own = directions.gather(1, tokens.unsqueeze(2).expand(-1, -1, dim))
            near, likeness = nearest_neighbours(own, places < count, min(neighbours, length))
            slots = places.expand_as(tokens)
        slots, places = slots[:, :length], places[:length]
        even, odd = slots[:, 0::2], slots[:, 1::2]
        in_even, in_odd = places[: even.shape[1]] < (count + 1) // 2, places[: odd.shape[1]] < count // 2
        is_odd = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, odd, in_odd)
        partners = is_odd.gather(1, near.flatten(1)).view_as(near)
        best = torch.where(partners, likeness, -torch.inf).amax(2).gather(1, even)
        right &= (best.isfinite() | ~in_even | (going == 0)).all()
        even = even.gather(1, best.masked_fill_(~in_even, -torch.inf).argsort(dim=1, descending=True, stable=True))
        alive = torch.cat(((places[: even.shape[1]] >= going) & in_even, in_odd), dim=1)
        slots = torch.cat((even, odd), dim=1).gather(1, (~alive).byte().argsort(dim=1, stable=True))
    return tokens.gather(1, slots) if len(lengths) > 1 else listed, right
