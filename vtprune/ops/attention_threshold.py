# SPDX-License-Identifier: Apache-2.0
"""LTP's pruning: a token stays if the attention that it receives reaches a threshold."""

import torch
from torch import Tensor

_SMALLEST_THRESHOLD = 1e-5


def rising_threshold(final: float, layer: int, layers: int) -> float:
    """Threshold of a layer. It rises in even steps from 0 at the first layer to ``final`` behind the last layer.

    Args:
        final: the value that a layer behind the last one would have.
        layer: 0-based.
        layers: number of layers.
    """
    return final * layer / layers


def above_threshold(scores: Tensor, alive: Tensor, threshold: float, *, reference_quirks: bool = False) -> Tensor:
    """Mark the tokens whose score reaches a threshold, which is a multiple of the average score.

    The average is one over the number of tokens alive, so a threshold means the same at any length. A threshold below 1
    always leaves a token, since the best score is at least the average.

    Args:
        scores: ``(batch, tokens)``, the attention that each token receives, averaged over heads and queries (Learned
            Token Pruning, arXiv 2107.00910).
        alive: ``(batch, tokens)`` bool.
        threshold: at least 0; 0 prunes only tokens that receive almost no attention.
        reference_quirks: use the threshold as an absolute value. The published 0.01 is for short texts and would prune
            nearly all of several hundred visual tokens.

    Returns:
        ``(batch, tokens)`` bool, the tokens that are alive and kept.
    """
    unit = 1 if reference_quirks else 1 / alive.sum(1, keepdim=True).clamp_min(1)
    limit = torch.as_tensor(threshold * unit, dtype=torch.float32, device=scores.device)
    return alive & (scores >= limit.clamp_min(_SMALLEST_THRESHOLD))
