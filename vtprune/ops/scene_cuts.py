# SPDX-License-Identifier: Apache-2.0
"""Cutting a video into scenes where one frame differs from the next."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError


def scenes(frames: Tensor, least: int = 8, threshold: float = 0.9) -> Tensor:
    """Number the scenes of a video (FastVID, arXiv 2503.11187).

    A scene ends where the cosine of a frame and the next is below ``threshold``, and wherever it is among the
    ``least - 1`` smallest, the earlier one of equals.

    Args:
        frames: ``(frames, dim)``, one feature a frame, at least one frame; a zero vector resembles nothing.
        least: scenes that there are at least, if there are as many frames.
        threshold: of the cosine.

    Returns:
        ``(frames,)`` long, the scene of each frame, numbered from 0 in the order of time.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    directions = normalize(frames.float(), dim=-1)
    likeness = (directions[:-1] * directions[1:]).sum(-1)
    if not likeness.isfinite().all():
        raise VTPruneError("features hold NaN or infinite values: where the scene changes is not defined")
    ends = likeness < threshold
    ends[likeness.argsort(stable=True)[: least - 1]] = True
    return torch.nn.functional.pad(ends.long().cumsum(0), (1, 0))
