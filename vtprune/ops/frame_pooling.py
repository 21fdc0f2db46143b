# SPDX-License-Identifier: Apache-2.0
"""Averages over frames: of their grid in cells, as LLaVA's video models take them, and of all that a frame has."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d, one_hot


def pool_frames(
    values: Tensor, grid: tuple[int, int], mode: Literal["bilinear", "average", "max"] = "bilinear"
) -> Tensor:
    """Pool every frame's grid by two in both directions.

    What is known of the patches of a frame has to go through the same pooling as their features to say something of
    the pooled tokens.

    Args:
        values: ``(frames, rows * columns, channels)`` in raster order: features, or a score with one channel.
        grid: ``(rows, columns)``.
        mode: "bilinear" interpolates to half the rows and columns, rounded up; "average" and "max" pool cells of
            2 x 2 and leave out an odd last row or column.

    Returns:
        ``(frames, pooled rows * pooled columns, channels)``.
    """
    rows, columns = grid
    image = values.mT.unflatten(-1, (rows, columns))
    if mode == "bilinear":
        pooled = interpolate(image, size=(-(-rows // 2), -(-columns // 2)), mode="bilinear")
    else:
        pooled = avg_pool2d(image, 2) if mode == "average" else max_pool2d(image, 2)
    return pooled.flatten(2).mT.to(values.dtype)


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
