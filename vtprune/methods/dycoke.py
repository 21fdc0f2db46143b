# SPDX-License-Identifier: Apache-2.0
"""DyCoke: keep every fourth frame, and of the others the tokens that differ from another frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.methods.base import BeforeLLM, Share
from vtprune.methods.clips import Clip, clips
from vtprune.ops.temporal_change import compared_in_fours, counts_in_fours
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DyCoke(BeforeLLM):
    """Keeps every fourth frame of a video, and drops what the others share with another frame (arXiv 2411.15024).

    Stage: before the LLM, from the projected features. Of four frames the second is compared with the first, the third
    with the first, and the fourth with the third, position by position; each keeps the tokens that are least alike. An
    image, whose crops are no frames, stays as it is without a budget; with one, tokens stay at an even stride.
    Published setting: drop=0.7, i.e. 47.5 % of the tokens stay.
    Deviations: the cut in the KV cache at every generated token is left out; an odd number of frames loses none, short
    videos work, and the last four frames are treated like all others; kept tokens stay in raster order (in the
    reference, the least alike comes first).

    Fields
        keep_ratio, keep_tokens: optional, in place of `drop`; where the budget is below every fourth frame, these keep
            tokens at an even stride and the other frames none.
        drop: share of the tokens of three frames of four that go, in [0, 1], default 0.7.
        scope: "image" (default): a video has one budget for all frames. "crop": every frame has a budget of its own,
            and is compared with none.
    """

    name: ClassVar[str] = "dycoke"
    signal: ClassVar[str] = "similarity over time"
    paper: ClassVar[str] = "arXiv 2411.15024"
    needs_budget: ClassVar[bool] = False

    drop: Share = 0.7
    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        keep = torch.zeros_like(tokens.valid)
        for clip in clips(self.name, tokens):
            places = send(clip.places, keep.device)
            video = tokens.features[clip.group, places].unflatten(0, (clip.frames, -1))
            keep[clip.group, places] = compared_in_fours(video, self._counts(clip)).flatten()
        return Selection(keep)

    def _counts(self, clip: Clip) -> Tensor:
        """(frames,) long on the CPU: tokens to keep of each frame."""
        positions = len(clip.places) // clip.frames
        if clip.budget >= 0:
            return counts_in_fours(clip.frames, positions, clip.budget)
        whole = torch.arange(clip.frames) % 4 == 0
        return torch.where(whole, positions, int((1 - self.drop) * positions))
