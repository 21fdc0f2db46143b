# SPDX-License-Identifier: Apache-2.0
"""Dividing a number of tokens among groups, in whole tokens."""

import torch
from torch import Tensor


def apportion(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """Give out ``total`` tokens in proportion to weights, none more than it can hold.

    What full groups cannot take goes to the others in proportion; fractions are settled by largest remainder, the lower
    index first. Groups of weight zero are served when all others are full; if all weigh nothing, all weigh the same.

    Args:
        total: at least 0; more than fits fills everything.
        weights: ``(groups,)``, finite, at least 0.
        capacities: ``(groups,)`` long, at least 0.

    Returns:
        ``(groups,)`` long, between 0 and the capacities; the sum is ``min(total, capacities.sum())``.
    """
    total = min(total, int(capacities.sum()))
    shares = weights.double()
    # Next to nothing instead of nothing, so that such a group has its turn after all others.
    shares = shares.clamp_min(float(shares.max()) * 1e-12 if len(shares) else 0.0)
    if not shares.any():
        shares = torch.ones_like(shares)
    # At the level at which a group is just full, those that fill earlier are full and all others hold level * share.
    order = (capacities / shares).argsort(stable=True)
    room, share = capacities[order].double(), shares[order]
    full_before = room.cumsum(0) - room
    open_share = share.flip(0).cumsum(0).flip(0)
    held = full_before + room / share * open_share
    last_full = int((held < total).sum())
    if last_full == len(held):
        return capacities.clone()
    level = (total - full_before[last_full]) / open_share[last_full]
    exact = torch.minimum(level * shares, capacities.double())
    counts = exact.floor().long()
    remainder = (exact - counts).masked_fill(counts >= capacities, -1)
    counts[remainder.argsort(descending=True, stable=True)[: total - int(counts.sum())]] += 1
    return counts


def share_out(sizes: Tensor, k: int) -> Tensor:
    """Divide ``k`` among parts that follow one another in time, in proportion to their sizes.

    Running totals are rounded, so the sum is exact and what fractions leave over is spread over the whole time.

    Args:
        sizes: ``(parts,)`` long.
        k: at most the sum of the sizes.

    Returns:
        ``(parts,)`` long, each less than one away from its proportion, and never above its size.
    """
    totals = sizes.cumsum(0)
    whole = max(int(sizes.sum()), 1)
    return ((2 * totals * k + whole) // (2 * whole)).diff(prepend=totals.new_zeros(1))
