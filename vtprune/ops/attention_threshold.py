# SPDX-License-Identifier: Apache-2.0
"""Pruning by how much attention a token receives, against a threshold."""

import torch
from torch import Tensor

_SMALLEST_THRESHOLD = 1e-5


def rising_threshold(final: float, layer: int, layers: int) -> float:
    """Threshold of a layer: from 0 at the first in even steps towards ``final`` after the last one.

    Args:
        final: the value that a layer after the last would have.
        layer: 0-based.
    """
    return final * layer / layers


def above_threshold(scores: Tensor, alive: Tensor, threshold: float, *, reference_quirks: bool = False) -> Tensor:
    """Tokens whose score reaches a fixed threshold, counted in multiples of the average score.

    The average is one over the number of tokens alive, so a threshold means the same at any length. Below 1 a token is
    always left, for the best is at least average.

    Args:
        scores: ``(batch, tokens)``, the mean attention that each token receives over heads and queries (Learned Token
            Pruning, arXiv 2107.00910).
        alive: ``(batch, tokens)`` bool.
        threshold: 0 prunes only what receives next to nothing.
        reference_quirks: take the threshold as it is. Published ones (0.01) are for short texts and would prune nearly
            all of several hundred visual tokens.

    Returns:
        ``(batch, tokens)`` bool, the tokens kept of those alive.
    """
    unit = 1 if reference_quirks else 1 / alive.sum(1, keepdim=True).clamp_min(1)
    limit = torch.as_tensor(threshold * unit, dtype=torch.float32, device=scores.device)
    return alive & (scores >= limit.clamp_min(_SMALLEST_THRESHOLD))
