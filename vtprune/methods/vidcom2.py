# SPDX-License-Identifier: Apache-2.0
"""VidCom2: more of the frames that differ, and in each frame what differs from frame and video."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vtprune.methods.base import BeforeLLM
from vtprune.ops.frame_uniqueness import commonness, frame_shares
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.selection import best_per_part
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class VidCom2(BeforeLLM):
    """Keeps the tokens least like the mean of their frame and of the video (arXiv 2505.14454).

    Stage: before the LLM, from the projected features alone, over the half of their channels that varies least. A frame
    whose tokens are less like the video's mean keeps more of them. Published setting: keep ratio 0.25.
    Deviations: budgets are met exactly, what a full frame cannot take going to the others (the reference rounds each
    frame by itself, keeps a token of every frame, and caps a frame at all of its tokens); newline tokens stand where
    they stood, each kept as long as its row has a token. An image is treated like a video whose frames are its crops.

    Fields
        scope: "image" (default: a video has one budget for all frames), or "crop", which leaves every frame its own,
            the video's mean then being the frame's.
    """

    name: ClassVar[str] = "vidcom2"
    signal: ClassVar[str] = "similarity to the mean of frame and video"
    paper: ClassVar[str] = "arXiv 2505.14454"

    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        keep = torch.zeros_like(tokens.valid)
        for group, length, k in tokens.each():
            if not length:
                continue
            # A crop may have lost all its tokens to another method.
            frames = tokens.crops[group, :length].unique(return_inverse=True)[1]
            to_video, to_frame = commonness(tokens.features[group, :length], frames)
            sizes = frames.bincount().cpu()
            counts = apportion(k, frame_shares(to_video, frames).cpu() * sizes, sizes)
            keep[group, :length] = best_per_part(-(to_video + to_frame), frames, counts)
        return Selection(keep)
