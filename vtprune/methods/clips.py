# SPDX-License-Identifier: Apache-2.0
"""Whole frames of a video, for the methods that compare positions from frame to frame."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.errors import UnsupportedStageError
from vtprune.ops.largest_remainder import apportion
from vtprune.tokens import VisualTokens


class Clip(NamedTuple):
    """A video, or one crop of an image, which is a single frame."""

    group: int
    places: Tensor
    """(frames * positions,) long on the CPU: its tokens in the group, frame by frame."""
    frames: int
    budget: int
    """Tokens to keep; -1 without a budget."""


def clips(name: str, tokens: VisualTokens) -> Iterator[Clip]:
    """Yield the clips of all groups that have tokens.

    name: the method, for the error. Raises UnsupportedStageError if tokens of a video are missing.
    """
    for group, length, k in tokens.each():
        layouts = tokens.layouts[group]
        if tokens.kinds[group] == "video":
            if None in layouts or len(set(layouts)) > 1:
                raise UnsupportedStageError(f"{name} needs whole frames of a video; put it before other methods")
            yield Clip(group, torch.arange(length), len(layouts), k)
            continue
        crops = tokens.host.places(group)
        sizes = torch.tensor([len(crop) for crop in crops])
        counts = [-1] * len(crops) if k < 0 else apportion(k, sizes.double(), sizes).tolist()
        yield from (Clip(group, crop, 1, count) for crop, count in zip(crops, counts, strict=True))
