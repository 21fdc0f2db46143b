# SPDX-License-Identifier: Apache-2.0
"""Dividing a number of tokens among groups in whole tokens, by the largest remainder or by rounding running totals."""

import torch
from torch import Tensor


def apportion(total: int, weights: Tensor, capacities: Tensor) -> Tensor:
    """Divide ``total`` tokens among groups in proportion to weights, no group above its capacity.

    What full groups cannot take goes to the others, again in proportion. Fractions are rounded by the largest
    remainder, the lower index first. Groups of weight zero get tokens only when all others are full; if all weights are
    zero, all groups weigh the same.

    Args:
        total: at least 0; above the sum of the capacities all groups are full.
        weights: ``(groups,)``, finite, at least 0.
        capacities: ``(groups,)`` long, at least 0, on the device of the weights.

    Returns:
        ``(groups,)`` long on that device, between 0 and the capacities; the sum is ``min(total, capacities.sum())``.
    """
    if not len(weights):
        return capacities.clone()
    if weights.device.type == "mps":  # which has no double precision
        return apportion(total, weights.cpu(), capacities.cpu()).to(weights.device)
    total = capacities.sum().clamp_max(total)
    shares = weights.double()
    # A tiny weight instead of zero, so that such a group gets tokens after all others.
    shares = torch.maximum(shares, shares.max() * 1e-12)
    shares = shares.masked_fill(~shares.any(), 1.0)
    # A level is a number of tokens per unit of weight. Groups fill in this order as the level rises. `given` is the
    # total given out at the level where a group becomes full: earlier groups are full, later ones have level * share.
    order = (capacities / shares).argsort(stable=True)
    room, share = capacities[order].double(), shares[order]
    full_before = room.cumsum(0) - room
    open_share = share.flip(0).cumsum(0).flip(0)
    given = full_before + room / share * open_share
    # Nothing is read: an accelerator would be waited for. Where all groups are full, the level does not count.
    full = given < total
    last_full = full.sum()[None].clamp_max(len(given) - 1)
    level = (total - full_before.gather(0, last_full)) / open_share.gather(0, last_full)
    exact = torch.minimum(level * shares, capacities.double())
    counts = exact.floor().long()
    remainder = (exact - counts).masked_fill(counts >= capacities, -1)
    rank = remainder.argsort(descending=True, stable=True).argsort()
    return torch.where(full.all(), capacities, counts + (rank < total - counts.sum()))


def share_out(sizes: Tensor, k: int) -> Tensor:
    """Divide ``k`` tokens among parts that follow one another in time, in proportion to their sizes.

    Running totals are rounded, so the sum is exact, and what rounding adds and removes is spread evenly over time.

    Args:
        sizes: ``(parts,)`` long.
        k: at most the sum of the sizes.

    Returns:
        ``(parts,)`` long; each differs from its exact proportion by less than one, and is never above its size.
    """
    totals = sizes.cumsum(0)
    whole = max(int(sizes.sum()), 1)
    return ((2 * totals * k + whole) // (2 * whole)).diff(prepend=totals.new_zeros(1))
