# SPDX-License-Identifier: Apache-2.0
"""Merging frames of a video that show much the same."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.ops.merging import Merged


def frame_similarity(metric: Tensor) -> Tensor:
    """Cosine similarity of every frame to each earlier one, moved to [0, 1].

    Args:
        metric: ``(frames, dim)``.

    Returns:
        ``(frames, frames)`` float32, ``(cos + 1) / 2`` below the diagonal, 0 on and above it.
    """
    directions = normalize(metric.float(), dim=-1, eps=1e-8)
    return ((directions @ directions.T + 1) / 2).tril(-1)


def merge_similar_frames(
    features: Tensor, metric: Tensor, threshold: float = 0.75, *, reference_quirks: bool = False
) -> Merged:
    """Merge each frame into the earlier one it resembles most, if that is enough (B-VLLM, arXiv 2412.09919).

    The first frame always stays. A frame left is the plain mean of itself and those that went into it, token by token,
    in its own place in time. ``threshold`` compares ``(cos + 1) / 2``: 0.75 stands for a cosine of 0.5, published for
    distributions over frames that a trained selector gives; for frame features it is to be tuned.

    Its merge within a frame is :func:`~vtprune.ops.bipartite_merging.bipartite_merging`; the two differ only where an
    odd number of tokens is to become half of it, rounded down, which the reference does in one round.

    Deviation: a frame may only go into one that stays. In the reference it goes into the most similar earlier frame
    whether or not that stays, and is lost where that one is merged itself. Where nothing is lost, the two agree.

    Args:
        features: ``(frames, tokens, dim)``, at least one frame.
        metric: ``(frames, metric_dim)`` to compare frames by, for example the mean of their features.
        threshold: frames merge above it.
        reference_quirks: merge as the reference does, children of merged frames being lost.

    Returns:
        One group whose tokens are frames: features ``(1, left, tokens, dim)`` in their dtype, ``places`` and
        ``sources`` are frame numbers; source -1 for a lost frame.
    """
    frames = torch.arange(len(metric), device=metric.device)
    similarity = frame_similarity(metric).masked_fill_(frames >= frames.unsqueeze(1), -torch.inf)
    if not reference_quirks:
        # One pass over time: who stays decides who may take later frames in.
        for frame in range(1, len(frames)):
            similarity[:, frame].masked_fill_(similarity[frame].amax() > threshold, -torch.inf)
    best = similarity.max(dim=1)
    merges = best.values > threshold
    sources = torch.where(merges, best.indices, frames)
    # A frame that went into one which is gone.
    sources = sources.masked_fill(merges[sources], -1)
    places = (~merges).nonzero()[:, 0]
    counted = sources >= 0
    sums = torch.zeros_like(features, dtype=torch.float32).index_add_(0, sources[counted], features[counted].float())
    sizes = sources[counted].bincount(minlength=len(frames))[places]
    left = (sums[places] / sizes.view(-1, 1, 1)).to(features.dtype)
    return Merged(left[None], places[None], sources[None])
