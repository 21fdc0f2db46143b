# SPDX-License-Identifier: Apache-2.0
"""HoloV's budgets: a crop is cut into runs of tokens, and each run gets a share of the budget by its attention."""

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.ops.selection import best_per_part, top_k_mask


def runs_of(valid: Tensor, count: int) -> Tensor:
    """Cut the valid tokens of every group into consecutive runs of nearly equal length; earlier ones are longer.

    Args:
        valid: ``(groups, tokens)`` bool, with padding at the end.
        count: number of runs, at least 1; a group of fewer tokens has a run a token.

    Returns:
        ``(groups, tokens)`` long, the run of each token, at most ``count - 1``; of padding it has no meaning.
    """
    lengths = valid.sum(1, keepdim=True)
    short, longer = lengths // count, lengths % count
    place = torch.arange(valid.shape[1], device=valid.device)[None]
    in_longer = longer * (short + 1)
    run = torch.where(place < in_longer, place // (short + 1), longer + (place - in_longer) // short.clamp_min(1))
    return run.clamp(max=count - 1)


def run_shares(saliency: Tensor, valid: Tensor, runs: Tensor, count: int, *, reference_quirks: bool = False) -> Tensor:
    """The share of each run in the budget, in proportion to its mean attention.

    Args:
        saliency: ``(groups, tokens)``, at least 0.
        valid: ``(groups, tokens)`` bool.
        runs: ``(groups, tokens)`` long, as :func:`runs_of` gives it.
        count: number of runs.
        reference_quirks: a run of one token weighs 1,090 times less.

    Returns:
        ``(groups, count)`` float64; each row sums to 1, or is zero if all attention is.
    """
    weighed = saliency.double().masked_fill(~valid, 0.0)
    member = (runs.unsqueeze(1) == torch.arange(count, device=runs.device).unsqueeze(1)) & valid.unsqueeze(1)
    sizes = member.sum(2)
    means = (member.double() @ weighed.unsqueeze(2)).squeeze(2) / sizes.clamp_min(1)
    if reference_quirks:
        means = torch.where(sizes == 1, means / _SCALE, means)
    return means / means.sum(1, keepdim=True).clamp_min(torch.finfo(means.dtype).tiny)


_SCALE = 1000 * (1 + 0.09)
"""What HoloV multiplies the score of a run of several tokens by: 1,000, and the mean of its scaled variance term."""


def best_of_runs(
    saliency: Tensor, valid: Tensor, budget: Tensor, count: int, *, reference_quirks: bool = False
) -> Tensor:
    """Spread a budget over runs of tokens, and keep the most salient tokens of each run (HoloV, arXiv 2510.02912).

    A run gets its share (:func:`run_shares`), rounded down. What rounding left goes one each to the runs with the
    largest shares. What a run cannot take goes to the most salient tokens of the other runs.

    Args:
        saliency: ``(groups, tokens)`` float, at least 0.
        valid: ``(groups, tokens)`` bool, with padding at the end.
        budget: ``(groups,)`` long, at least 0; a budget above the number of valid tokens keeps them all.
        count: number of runs, at least 1.
        reference_quirks: what a run cannot take is lost, and a run of one token weighs 1,090 times less.

    Returns:
        ``(groups, tokens)`` bool. Of equal tokens or runs the first one comes first.
    """
    budget = torch.minimum(send(budget, valid.device), valid.sum(1))
    runs = runs_of(valid, count)
    shares = run_shares(saliency, valid, runs, count, reference_quirks=reference_quirks)
    exact = shares * budget.unsqueeze(1)
    counts = exact.floor().long()
    rank = shares.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    counts += rank < (budget - counts.sum(1)).unsqueeze(1)

    # The runs of all groups as parts of one group; padding is a part of its own, which keeps nothing.
    group = torch.arange(len(runs), device=runs.device).unsqueeze(1)
    parts = (group * count + runs).masked_fill(~valid, counts.numel())
    of_parts = torch.cat((counts.flatten(), counts.new_zeros(1)))
    keep = best_per_part(saliency.flatten(), parts.flatten(), of_parts).view_as(valid)
    if reference_quirks:
        return keep
    return keep | top_k_mask(saliency, valid & ~keep, budget - keep.sum(1))
