# SPDX-License-Identifier: Apache-2.0
"""Iterative bipartite merging (AIM, B-VLLM): each even token may go into the most similar odd token."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vtprune.checks import require
from vtprune.devices import send
from vtprune.ops.merging import Merged

# Number of similarities in memory at a time, so that memory grows with the tokens and not with their square.
_BLOCK_ELEMENTS = 1 << 22


def bipartite_match(metric: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the most similar odd token (by cosine) of every even token.

    Args:
        metric: ``(groups, tokens, dim)``, at least two tokens.
        valid: ``(groups, tokens)`` bool, False for padding; by default all tokens are real.

    Returns:
        ``(groups, ceil(tokens / 2))`` long, the partner of tokens 0, 2, 4, ... as a number of an odd token (0 means
        token 1, 1 means token 3); of equal cosines the first partner. And float32 of the same shape, the cosine of the
        pair, -inf for padding and for tokens without a partner.
    """
    metric = metric.float()
    lengths = torch.linalg.vector_norm(metric, dim=-1).clamp_min(1e-8)
    evens, odds = metric[:, ::2], metric[:, 1::2]
    partners, similarities = [], []
    for rows in evens.split(max(_BLOCK_ELEMENTS // odds[..., 0].numel(), 1), dim=1):
        # Dividing the products is cheaper than dividing the tokens. The length of the even token divides at the end.
        similarity = (rows @ odds.transpose(1, 2)).div_(lengths[:, None, 1::2])
        if valid is not None:
            similarity.masked_fill_(~valid[:, None, 1::2], -torch.inf)
        best = similarity.max(dim=2)
        partners.append(best.indices)
        similarities.append(best.values)
    partner, similarity = torch.cat(partners, dim=1), torch.cat(similarities, dim=1).div_(lengths[:, ::2])
    return partner, similarity if valid is None else similarity.masked_fill(~valid[:, ::2], -torch.inf)


@torch.no_grad()
def bipartite_merging(
    features: Tensor,
    k: int | Tensor,
    *,
    metric: Tensor | None = None,
    lengths: Tensor | None = None,
    reference_quirks: bool = False,
) -> Merged:
    """Merge the tokens of each group down to exactly ``k`` (AIM, arXiv 2412.03248).

    Merging runs in rounds. In a round, the even tokens that are most similar to their partners go into these partners
    (:func:`bipartite_match`): half of all tokens, or in the last round as many as are still too many. A partner keeps
    its place and becomes the plain mean of itself and the tokens that went into it. All of them have equal weight, no
    matter how many tokens each stood for already.

    Deviations: tokens keep their order, while the reference sorts unmerged even tokens by similarity. Where nothing is
    to be merged, the tokens come back as they are, not as None. Zero vectors have similarity 0.

    Args:
        features: ``(groups, tokens, dim)``.
        k: number of tokens to leave, at least 0; one number or ``(groups,)`` long on the CPU. A group with ``k`` tokens
            or fewer stays as it is.
        metric: ``(groups, tokens, metric_dim)`` vectors to compare tokens by; they are merged like the features.
            Default: the features.
        lengths: ``(groups,)`` long on the CPU, number of real tokens, behind which padding stands; by default all are
            real.
        reference_quirks: use the reference's order: after each round the unmerged even tokens by falling similarity,
            then the odd tokens. The order decides which tokens are even in the next round, and so changes the result.

    Returns:
        The tokens that are left. Features keep their dtype (means are taken in float32).

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    groups, tokens, dim = features.shape
    device = features.device
    lengths = torch.full((groups,), tokens) if lengths is None else lengths
    valid = alive = _first(lengths, tokens, device)
    # The metric is merged together with the features.
    state = features.float() if metric is None else torch.cat((features.float(), metric.float()), dim=-1)
    # A sum is finite if all its terms are.
    finite = (state.sum(dim=-1).isfinite() | ~alive).all()
    require(finite, "features hold NaN or infinite values: similarities are not defined on them")
    targets = torch.as_tensor(k).expand(groups)
    places = torch.arange(tokens, device=device).expand(groups, tokens)
    # The token of the present round that each original token has gone into.
    into = places
    for counts, left in _rounds(lengths.tolist(), targets.tolist()):
        remaining = max(left)
        matches = bipartite_match(state if metric is None else state[..., dim:], alive)
        order, joins = _assign(*matches, alive, send(torch.tensor(counts), device), remaining, reference_quirks)
        state = _means(state, joins, alive, remaining)
        into, places = joins.gather(1, into), places.gather(1, order)
        alive = _first(torch.tensor(left), remaining, device)

    # Merging leaves at least one token, so k = 0 is handled here.
    emptied = send(targets == 0, device).unsqueeze(1)
    sources = places.gather(1, into).masked_fill(emptied | ~valid, -1)
    alive = alive & ~emptied
    merged = state[..., :dim].masked_fill(~alive.unsqueeze(-1), 0).to(features.dtype)
    return Merged(merged, places.masked_fill(~alive, -1), sources)


def _first(counts: Tensor, width: int, device: torch.device) -> Tensor:
    """(groups, width) bool on a device: the first places of each group; counts (groups,) long on the CPU."""
    return torch.arange(width, device=device) < send(counts, device).unsqueeze(1)


def _rounds(lengths: list[int], targets: list[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield for each round how many tokens every group merges, and how many it has afterwards."""
    while True:
        counts = [max(min(n // 2, n - k), 0) for n, k in zip(lengths, targets, strict=True)]
        if not any(counts):
            return
        lengths = [n - count for n, count in zip(lengths, counts, strict=True)]
        yield counts, lengths


def _assign(
    partner: Tensor, similarity: Tensor, alive: Tensor, counts: Tensor, remaining: int, reference_quirks: bool
) -> tuple[Tensor, Tensor]:
    """Find which tokens stay after a round, and which of them each token goes into.

    Args:
        partner, similarity: ``(groups, ceil(tokens / 2))`` as :func:`bipartite_match` returns them.
        alive: ``(groups, tokens)`` bool.
        counts: ``(groups,)`` long, how many tokens to merge.
        remaining: the largest number of tokens that a group has after the round.
        reference_quirks: as in :func:`bipartite_merging`.

    Returns:
        ``(groups, remaining)`` long, the tokens that stay, in their new order. ``(groups, tokens)`` long, for each
        token the index in that order of the token that it goes into.
    """
    tokens = torch.arange(alive.shape[1], device=alive.device)
    counts = counts.unsqueeze(1)
    rank = similarity.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    goes = tokens.repeat(len(alive), 1)
    goes[:, ::2] = torch.where(rank < counts, 2 * partner + 1, goes[:, ::2])
    key = tokens.repeat(len(alive), 1)
    if reference_quirks:
        key[:, 1::2] += len(tokens)
        key[:, ::2] = rank
        key = torch.where(counts > 0, key, tokens)
    order = key.masked_fill(~alive | (goes != tokens), 2 * len(tokens)).argsort(dim=1, stable=True)
    # Merged tokens and padding come behind the first `remaining` places. Only padding points there; it is clamped.
    joins = order.argsort(dim=1).gather(1, goes).clamp_max(remaining - 1)
    return order[:, :remaining], joins


def _means(state: Tensor, joins: Tensor, alive: Tensor, remaining: int) -> Tensor:
    """Average the tokens of ``state`` (groups, tokens, dim) that have the same target in a group.

    Sums run in the order of tokens on every device; a scattered sum does not promise an order.
    """
    groups, _, dim = state.shape
    count = groups * remaining
    target = joins + remaining * torch.arange(groups, device=joins.device).unsqueeze(1)
    # Padding comes last, and behind all sums.
    target = target.masked_fill(~alive, count).flatten()
    sizes = target.new_zeros(count + 1).scatter_add(0, target, torch.ones_like(target))
    starts = sizes.cumsum(0) - sizes
    sums = embedding_bag(target.argsort(stable=True), state.flatten(0, 1), starts, mode="sum")[:count]
    sizes = sizes[:count]
    return sums.div_(sizes.clamp_min(1).unsqueeze(1)).view(groups, remaining, dim)
