# SPDX-License-Identifier: Apache-2.0
"""Baseline: fewer frames of a video, evenly spaced, instead of fewer tokens of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.methods.base import BeforeLLM
from vtprune.methods.uniform import even_stride
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class UniformFrames(BeforeLLM):
    """Keeps frames at an even stride, as few as hold the budget: whole ones, but for the last, which gets what is left.

    Stage: before the LLM. What sampling fewer frames would have given, with the frames that were encoded. The last
    frame keeps an even stride of its tokens. An image of several crops is treated like a video, one of a single crop
    as by `uniform`.

    Fields
        scope: "image" (default), or "crop", which leaves every frame its own budget, as `uniform` does.
    """

    name: ClassVar[str] = "uniform_frames"
    signal: ClassVar[str] = "none"

    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        chosen = [_choose(tokens.crops[group, :length], k) for group, length, k in tokens.each()]
        return Selection.of_indices(tokens, chosen)


def _choose(crops: Tensor, k: int) -> Tensor:
    """Indices of k tokens; crops (tokens,) long, the crop of each."""
    numbers, sizes = crops.unique(return_counts=True)
    for count in range(1, len(numbers) + 1):
        frames = even_stride(len(numbers), count).tolist()
        if int(sizes[frames].sum()) >= k:
            break
    chosen, left = [], k
    for frame in frames:
        places = (crops == numbers[frame]).nonzero()[:, 0]
        taken = min(left, len(places))
        chosen.append(places[even_stride(len(places), taken).to(places.device)])
        left -= taken
    return torch.cat(chosen)
