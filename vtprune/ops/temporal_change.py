# SPDX-License-Identifier: Apache-2.0
"""Tokens that change from frame to frame (DTD), and frames compared in fours (DyCoke)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtprune.devices import send
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.segmentation import temporal_similarity
from vtprune.ops.selection import evenly_among, top_k_mask


def changed(features: Tensor, threshold: float) -> Tensor:
    """Mark the tokens that differ from the token at the same position of the frame before (DTD, arXiv 2504.17343).

    Args:
        features: ``(frames, positions, dim)``, at least one frame.
        threshold: a token has changed if the cosine is at most this.

    Returns:
        ``(frames, positions)`` bool; the first frame is marked as a whole.
    """
    first = torch.ones_like(features[:1, :, 0], dtype=torch.bool)
    return torch.cat((first, temporal_similarity(features) <= threshold))


def most_changed(features: Tensor, k: int) -> Tensor:
    """The tokens that differ most from the frame before, about equally many in each frame but the first.

    Args:
        features: ``(frames, positions, dim)``, at least one frame.
        k: tokens to keep, at most all.

    Returns:
        ``(frames, positions)`` bool. The first frame is kept as a whole, or as many of its tokens as the budget allows,
        at an even stride.
    """
    frames, positions, _ = features.shape
    first = min(k, positions)
    keep = evenly_among(torch.ones_like(features[:1, :, 0], dtype=torch.bool), torch.tensor([first]))
    if frames == 1:
        return keep
    counts = share_out(torch.full((frames - 1,), positions), k - first)
    likeness = temporal_similarity(features)
    return torch.cat((keep, top_k_mask(-likeness, torch.ones_like(likeness, dtype=torch.bool), counts)))


def counts_in_fours(frames: int, positions: int, k: int) -> Tensor:
    """``(frames,)`` long: how many tokens of each frame :func:`compared_in_fours` keeps to meet a budget.

    Every fourth frame comes first, then all others get about equally many.

    Args:
        k: tokens to keep, at most all.
    """
    whole = torch.arange(frames) % 4 == 0
    counts = torch.zeros(frames, dtype=torch.long)
    first = min(k, int(whole.sum()) * positions)
    counts[whole] = share_out(torch.full_like(counts[whole], positions), first)
    counts[~whole] = share_out(torch.full_like(counts[~whole], positions), k - first)
    return counts


def compared_in_fours(features: Tensor, counts: Tensor) -> Tensor:
    """Keep the tokens of each frame that are least like those of another frame (DyCoke, arXiv 2411.15024).

    Of four frames the second is compared with the first, the third with the first, and the fourth with the third, each
    position with the same position. The first is compared with none, and keeps tokens at an even stride.

    Args:
        features: ``(frames, positions, dim)``, at least one frame.
        counts: ``(frames,)`` long on the CPU, tokens to keep of each frame.

    Returns:
        ``(frames, positions)`` bool.
    """
    number = torch.arange(len(features))
    base = send(torch.where(number % 4 == 2, number - 2, number - number % 2), features.device)
    likeness = cosine_similarity(features.float(), features[base].float(), dim=-1)
    everything = torch.ones_like(features[..., 0], dtype=torch.bool)
    evenly = evenly_among(everything, counts)
    scores = torch.where(send(number % 4 == 0, features.device).unsqueeze(1), evenly.float(), -likeness)
    return top_k_mask(scores, everything, counts)
