# SPDX-License-Identifier: Apache-2.0
"""In which order the kept tokens of a video reach the LLM, and where newlines stand among them."""

import torch
from torch import Tensor

NEWLINE = -1


def reading_order(part: Tensor, *, by_part: bool = False) -> Tensor:
    """Flat indices of a video's kept tokens in the order of reading.

    Args:
        part: ``(frames, positions)`` long, below 0 for tokens that are not kept.
        by_part: within a frame sort by ``part`` before position. HoliTom (arXiv 2505.21334) does so where frames have
            no newlines, and a segment's merged tokens lead its first frame; the default is the order of the grid.

    Returns:
        ``(kept,)`` long.
    """
    frames = part.shape[0]
    kept = (part.flatten() >= 0).nonzero()[:, 0]
    if not by_part or not len(kept):
        return kept
    frame = torch.arange(frames, device=part.device)[:, None].expand_as(part).flatten()[kept]
    parts = part.flatten()[kept]
    return kept[(frame * (parts.max() + 1) + parts).argsort(stable=True)]


def with_newlines(order: Tensor, columns: int | None = None) -> Tensor:
    """Insert newlines into flat indices.

    Args:
        order: ``(kept,)`` long; ascending if ``columns`` is given.
        columns: of each frame's grid: a newline follows every row of which a token is left, and no other. None:
            there is one newline, at the end of the video.

    Returns:
        ``(kept + newlines,)`` long, ``NEWLINE`` (-1) where a newline stands: append the newline to the features, and
        this indexes them.
    """
    if columns is None:
        return torch.nn.functional.pad(order, (0, 1), value=NEWLINE)
    rows = order // columns
    # How many rows have begun up to each token: its own newline comes later.
    begun = (rows.diff(prepend=rows[:1]) != 0).cumsum(0)
    newlines = int(begun[-1]) + 1 if len(order) else 0
    filled = order.new_full((len(order) + newlines,), NEWLINE)
    filled[torch.arange(len(order), device=order.device) + begun] = order
    return filled
