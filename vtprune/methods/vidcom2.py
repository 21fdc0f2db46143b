# SPDX-License-Identifier: Apache-2.0
"""VidCom2: keep more tokens of unique frames, and in each frame the tokens that differ from frame and video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtprune.devices import send
from vtprune.methods.base import BeforeLLM
from vtprune.ops.frame_uniqueness import commonness, frame_shares
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.selection import best_per_part
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VidCom2(BeforeLLM):
    """Keeps the tokens least similar to the mean of their frame and of the video (arXiv 2505.14454).

    Stage: before the LLM, from the projected features only, over the half of their channels that varies least. A frame
    whose tokens are less similar to the video's mean keeps more of them. Published setting: keep_ratio=0.25.
    Deviations: budgets are met exactly, and what a full frame cannot take goes to the others (the reference rounds each
    frame separately, keeps at least one token of every frame, and at most all of its tokens); newline tokens keep their
    places, and stay as long as their row has a token. An image is treated like a video whose frames are its crops.

    Fields
        scope: "image" (default): a video has one budget for all frames. "crop": every frame has its own budget, and the
            mean of the video is that of the frame.
    """

    name: ClassVar[str] = "vidcom2"
    signal: ClassVar[str] = "similarity to the mean of frame and video"
    paper: ClassVar[str] = "arXiv 2505.14454"

    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        keep = torch.zeros_like(tokens.valid)
        crops = tokens.host.crops
        for group, length, k in tokens.each():
            if not length:
                continue
            # Another method may have dropped all tokens of a crop.
            _, numbers, counted = crops[group, :length].unique(return_inverse=True, return_counts=True)
            frames, sizes = (send(values, keep.device) for values in (numbers, counted))
            to_video, to_frame = commonness(tokens.features[group, :length], frames, len(sizes))
            counts = apportion(k, frame_shares(to_video, frames, len(sizes)) * sizes, sizes)
            keep[group, :length] = best_per_part(-(to_video + to_frame), frames, counts)
        return Selection(keep)
