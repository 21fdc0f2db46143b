# SPDX-License-Identifier: Apache-2.0
"""Averages over frames."""

from torch import Tensor
from torch.nn.functional import one_hot


def frame_means(features: Tensor, frames: Tensor) -> Tensor:
    """Mean of the tokens of each frame, however many it has.

    Args:
        features: ``(tokens, dim)``.
        frames: ``(tokens,)`` long, the frame of each, numbered from 0 without gaps.

    Returns:
        ``(frames, dim)`` float32.
    """
    # A product instead of a scattered sum, whose order an accelerator leaves to chance.
    members = one_hot(frames).T.float()
    return members @ features.float() / members.sum(1, keepdim=True)
