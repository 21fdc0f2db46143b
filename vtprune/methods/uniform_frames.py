# SPDX-License-Identifier: Apache-2.0
"""Baseline: keep fewer frames of a video, evenly spaced, instead of fewer tokens of each frame."""

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
    """Keeps as few frames as the budget needs, at an even stride. All are whole frames, except the last one.

    Stage: before the LLM. The result is like sampling fewer frames, but from the frames that were encoded. The last
    frame gets the rest of the budget, and keeps its tokens at an even stride. An image with several crops is treated
    like a video. An image with a single crop is treated as by `uniform`.

    Fields
        scope: "image" (default), or "crop": every frame has its own budget, as with `uniform`.
    """

    name: ClassVar[str] = "uniform_frames"
    signal: ClassVar[str] = "none"

    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        chosen = [_choose(tokens.crops[group, :length], k) for group, length, k in tokens.each()]
        return Selection.of_indices(tokens, chosen)


def _choose(crops: Tensor, k: int) -> Tensor:
    """Indices of k tokens. crops: (tokens,) long, the crop of each token."""
    numbers, sizes = crops.unique(return_counts=True)
    for count in range(1, len(numbers) + 1):
        frames = even_stride(len(numbers), count).tolist()
        if int(sizes[frames].sum()) >= k:
            break
    chosen, remaining = [], k
    for frame in frames:
        places = (crops == numbers[frame]).nonzero()[:, 0]
        taken = min(remaining, len(places))
        chosen.append(places[even_stride(len(places), taken).to(places.device)])
        remaining -= taken
    return torch.cat(chosen)
