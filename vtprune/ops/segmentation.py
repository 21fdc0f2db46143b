# SPDX-License-Identifier: Apache-2.0
"""HoliTom's segmentation: a video is cut into segments in which as many positions as possible are still."""

import torch
from torch import Tensor

from vtprune.checks import require

# Elements of the frames that are compared at a time, so that temporary tensors stay small for any video.
_BLOCK_ELEMENTS = 1 << 20


def temporal_similarity(features: Tensor) -> Tensor:
    """Cosine of the features of each position in one frame and in the next frame.

    Args:
        features: ``(frames, positions, dim)``, at least one frame.

    Returns:
        ``(frames - 1, positions)`` float32; 0 with a zero vector.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    frames, positions, dim = features.shape
    step = max(_BLOCK_ELEMENTS // max(positions * dim, 1), 1)
    lengths, products = [], []
    for first in range(0, frames, step):
        # One frame more than the block, because the last frame is compared with the one after it.
        block = features[first : first + step + 1].float()
        lengths.append(torch.linalg.vector_norm(block[:step], dim=-1))
        products.append(torch.linalg.vecdot(block[:-1], block[1:]))
    length = torch.cat(lengths).clamp_min_(1e-12)
    require(
        length.isfinite().all(), "features hold NaN or infinite values: similarity over time is not defined on them"
    )
    return torch.cat(products).div_(length[:-1]).div_(length[1:])


def segment_frames(still: Tensor, max_window: int = 1024) -> tuple[Tensor, int]:
    """Cut a video so that one token per still position and segment saves most tokens (HoliTom, arXiv 2505.21334).

    A position is still in a segment if it is still from each frame of the segment to the next. A segment of ``w``
    frames with ``c`` still positions saves ``(w - 1) * c`` tokens. Dynamic programming over the ends of segments finds
    the largest sum. Of equal solutions, a frame alone is preferred to a longer segment, and then the shortest segment.

    All segments that end at a frame follow from one count: how many positions have been still for how many frames. So a
    frame costs ``O(positions + max_window)`` time, and there is no table of first and last frames. The search has a
    small step for each frame, each of which an accelerator would be waited for. So it runs on the CPU.

    Args:
        still: ``(frames - 1, positions)`` bool on the CPU, whether a position is still from a frame to the next.
        max_window: largest number of frames in a segment, at least 1.

    Returns:
        segments: ``(segments, 2)`` long, first and last frame of each, in the order of time.
        saved: number of tokens saved.
    """
    if max_window < 1:
        raise ValueError(f"a segment has at least one frame, not {max_window}")
    still = still.long()
    frames = len(still) + 1
    # best[i]: the most that the first i frames can save. back[i]: how many steps the segment that ends at frame i
    # goes back in that solution.
    best = torch.zeros(frames + 1, dtype=torch.long)
    back = [0] * frames
    steps = torch.arange(frames)
    run = still.new_zeros(still.shape[1])
    for frame in range(1, frames):
        run = run.add_(1).mul_(still[frame - 1]).clamp_(max=max_window - 1)
        # still_for[d]: positions that have been still for the last d steps.
        still_for = run.bincount(minlength=1).flip(0).cumsum(0).flip(0)
        longest = len(still_for) - 1
        best[frame + 1] = best[frame]
        if longest:
            # A segment that goes back further has no still position, so it is not better than the frame alone.
            saved = best[frame - longest : frame].flip(0) + still_for[1:] * steps[1 : longest + 1]
            most, index = saved.max(0)
            if most > best[frame]:
                best[frame + 1] = most
                back[frame] = int(index) + 1
    segments = []
    last = frames - 1
    while last >= 0:
        segments.append([last - back[last], last])
        last -= back[last] + 1
    return torch.tensor(segments[::-1]), int(best[-1])


def still_positions(still: Tensor, segments: Tensor) -> Tensor:
    """Mark the positions that are still throughout each segment.

    Args:
        still: ``(frames - 1, positions)`` bool.
        segments: ``(segments, 2)`` long, first and last frame of each.

    Returns:
        ``(segments, positions)`` bool; all False for a segment of one frame, which cannot save tokens.
    """
    first, last = segments[:, 0], segments[:, 1]
    # Number of changes up to each frame. If it is equal at both ends of a segment, nothing changes inside.
    changes = torch.nn.functional.pad((~still).cumsum(0, dtype=torch.int32), (0, 0, 1, 0))
    return (changes[first] == changes[last]) & (first < last)[:, None]
