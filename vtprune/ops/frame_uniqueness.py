# SPDX-License-Identifier: Apache-2.0
"""VidCom2's uniqueness: how different a token is from its whole video, and from its frame."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require
from vtprune.ops.frame_pooling import frame_means

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
"""Widths of the Gaussians whose sum measures how near two directions are."""

TEMPERATURE = 0.01
"""Divisor of the frame means in the softmax of `frame_shares`."""


def steady_channels(features: Tensor) -> Tensor:
    """The half of the channels that varies least over all tokens, at least one channel.

    ``(tokens, dim)`` -> ``(max(dim // 2, 1),)`` long, ascending. Of equal variances the lower index is taken.
    """
    variance = features.float().var(0, correction=0)
    return variance.argsort(stable=True)[: max(len(variance) // 2, 1)].sort().values


def nearness(features: Tensor, centres: Tensor) -> Tensor:
    """Sum of Gaussians of the distance, two ``(..., dim)`` -> ``(...)``; ``len(WIDTHS)`` for equal vectors."""
    squares = (features - centres).square().sum(-1)
    return torch.stack([(-squares / (2 * width)).exp() for width in WIDTHS]).sum(0)


def commonness(features: Tensor, frames: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How near each token is to the mean of the video, and to the mean of its frame (VidCom2, arXiv 2505.14454).

    Features are normalised first, over the channels that vary least.

    Args:
        features: ``(tokens, dim)``, at least one token.
        frames: ``(tokens,)`` long, the frame of each token, numbered from 0 without gaps.
        count: number of frames.

    Returns:
        Two ``(tokens,)`` float32 tensors.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    require(features.isfinite().all(), "features hold NaN or infinite values: nearness is not defined on them")
    directions = normalize(features.float()[:, steady_channels(features)], dim=-1)
    of_frames = frame_means(directions, frames, count)
    return nearness(directions, directions.mean(0)), nearness(directions, of_frames[frames])


def frame_shares(common: Tensor, frames: Tensor, count: int) -> Tensor:
    """Share of its tokens that each frame keeps: more if the frame differs more from the video (VidCom2).

    Args:
        common: ``(tokens,)``, nearness to the mean of the video.
        frames, count: as in :func:`commonness`.

    Returns:
        ``(frames,)``, as multiples of the share that is kept of the whole video. Their average is one: each is one plus
        the difference between the frame's weight in a sharp softmax and the average weight.
    """
    weights = (-frame_means(common[:, None], frames, count)[:, 0] / TEMPERATURE).softmax(0)
    return 1 + weights - weights.mean()
