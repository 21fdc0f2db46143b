# SPDX-License-Identifier: Apache-2.0
"""FastVID's scenes: a video is cut where a frame differs from the next one."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require


def scenes(frames: Tensor, least: int = 8, threshold: float = 0.9) -> Tensor:
    """Number the scenes of a video (FastVID, arXiv 2503.11187).

    A scene ends where the cosine of a frame with the next frame is below ``threshold``, and where it is among the
    ``least - 1`` smallest cosines; of equal cosines the earlier one counts.

    Args:
        frames: ``(frames, dim)``, one feature a frame, at least one frame. A zero vector has similarity 0 to all.
        least: smallest number of scenes, if there are as many frames.
        threshold: cosine below which a scene ends, in [-1, 1].

    Returns:
        ``(frames,)`` long, the scene of each frame, numbered from 0 in the order of time.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    directions = normalize(frames.float(), dim=-1)
    likeness = (directions[:-1] * directions[1:]).sum(-1)
    require(likeness.isfinite().all(), "features hold NaN or infinite values: scenes are not defined on them")
    ends = (likeness < threshold).index_fill(0, likeness.argsort(stable=True)[: least - 1], True)
    return torch.nn.functional.pad(ends.long().cumsum(0), (1, 0))
