# SPDX-License-Identifier: Apache-2.0
"""Eviction after prefill: what the last cut dropped leaves the cache of the layers before it, too."""

import torch
from torch import Tensor


def eviction_index(held: Tensor, final: Tensor) -> Tensor:
    """Where the columns that survive a prefill stand in the cache of a layer (MustDrop, arXiv 2411.10803).

    Args:
        held: ``(batch, n)`` long, the original column of each entry of a layer's cache, no column twice.
        final: ``(batch, m)`` long, the original columns alive at the end; -1 for padding.

    Returns:
        ``(batch, m)`` long, the index in ``held`` of each of ``final``; -1 for padding and for what the layer lacks.
    """
    columns = max(int(held.amax()), int(final.amax())) + 1
    index = torch.arange(held.shape[1], device=held.device).expand_as(held)
    where = torch.full((len(held), columns), -1, device=held.device).scatter(1, held, index)
    return where.gather(1, final.clamp_min(0)).masked_fill(final < 0, -1)
