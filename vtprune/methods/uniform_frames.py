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
        host = tokens.host
        return Selection.of_indices(tokens, [_choose(host.places(group), k) for group, _, k in tokens.each()])


def _choose(frames: list[Tensor], k: int) -> Tensor:
    """Indices of k tokens. frames: the indices of the tokens of each frame."""
    chosen: list[Tensor] = []
    for count in range(1, len(frames) + 1):
        chosen = [frames[frame] for frame in even_stride(len(frames), count).tolist()]
        if sum(map(len, chosen)) >= k:
            break
    taken = [torch.empty(0, dtype=torch.long)]
    for places in chosen:
        count = min(k, len(places))
        taken.append(places[even_stride(len(places), count)])
        k -= count
    return torch.cat(taken)
