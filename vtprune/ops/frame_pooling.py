# SPDX-License-Identifier: Apache-2.0
"""Means of frames (FastVID, VidCom2)."""

import torch
from torch import Tensor


def frame_means(features: Tensor, frames: Tensor, count: int) -> Tensor:
    """Mean of the tokens of each frame; frames may have different numbers of tokens.

    Args:
        features: ``(tokens, dim)``.
        frames: ``(tokens,)`` long, the frame of each token, numbered from 0 without gaps.
        count: number of frames.

    Returns:
        ``(frames, dim)`` float32.
    """
    # A product and not a scattered sum: on an accelerator the order of a scattered sum is random.
    members = (frames == torch.arange(count, device=frames.device)[:, None]).float()
    return members @ features.float() / members.sum(1, keepdim=True)
