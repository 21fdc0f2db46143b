# SPDX-License-Identifier: Apache-2.0
"""Means of frames (FastVID, VidCom2)."""

from torch import Tensor
from torch.nn.functional import one_hot


def frame_means(features: Tensor, frames: Tensor) -> Tensor:
    """Mean of the tokens of each frame; frames may have different numbers of tokens.

    Args:
        features: ``(tokens, dim)``.
        frames: ``(tokens,)`` long, the frame of each token, numbered from 0 without gaps.

    Returns:
        ``(frames, dim)`` float32.
    """
    # A product and not a scattered sum: on an accelerator the order of a scattered sum is random.
    members = one_hot(frames).T.float()
    return members @ features.float() / members.sum(1, keepdim=True)
