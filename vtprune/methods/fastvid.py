# SPDX-License-Identifier: Apache-2.0
"""FastVID: keep the salient tokens of each frame; merge the rest of each scene into a few anchors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune.devices import read, send
from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.anchor_merging import merge_into_anchors
from vtprune.ops.frame_pooling import frame_means
from vtprune.ops.scene_cuts import scenes
from vtprune.signals import EncoderSaliency
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastVID(BeforeLLM):
    """Cuts a video into scenes; keeps salient tokens and merges the others into anchors (arXiv 2503.11187).

    Stage: before the LLM. Every frame keeps the tokens that the encoder attends to most. The other tokens of a scene
    join anchors. Anchors are density peaks in the scene's last frame and in every few frames before it. Where several
    frames of a scene have anchors, a token joins one anchor in each of them, as in the reference; the report names the
    most similar anchor. Published setting: keep_ratio=0.1, on LLaVA-OneVision.
    Deviations: scenes are found by the mean of a frame's projected features, and tokens are scored by the attention of
    the CLS token in the layer that the projector reads, or, without a CLS token, by the attention that they receive in
    that layer (the reference takes both from the pooling head of SigLIP, which models do not run); nothing is random;
    of equal scores the first is taken; budgets are met exactly (the reference rounds down in every frame and every
    scene); anchors in every frame (anchor_period=1) work. Each crop of an image is a separate scene.

    Fields
        min_scenes: smallest number of scenes of a video that has as many frames, >= 1, default 8.
        threshold: cosine of a frame with the next frame below which a scene ends, in [-1, 1], default 0.9.
        context_share: share of anchors among the kept tokens of a frame, in [0, 1], default 0.4.
        anchor_period: distance in frames between two frames with anchors, >= 1, default 4.
        neighbours: number of nearest tokens that density is computed from, the token itself included, >= 1, default 4.
        anchor_weight: smallest weight of an anchor against the mean of the tokens that joined it, in [0, 1], default
            0.6; None: the mean alone.
        scope: "image" (default): a video has one budget for all frames. "crop": every frame has its own budget and is a
            separate scene.
    """

    name: ClassVar[str] = "fastvid"
    signal: ClassVar[str] = "similarity over time, attention in the encoder"
    paper: ClassVar[str] = "arXiv 2503.11187"
    merges: ClassVar[bool] = True

    min_scenes: Annotated[int, Ge(1)] = 8
    threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.9
    context_share: Share = 0.4
    anchor_period: Annotated[int, Ge(1)] = 4
    neighbours: Annotated[int, Ge(1)] = 4
    anchor_weight: Share | None = 0.6
    scope: Literal["crop", "image"] = "image"

    def signals(self, shape: ModelShape):
        return (EncoderSaliency(shape.feature_layer),)

    def select(self, tokens: VisualTokens) -> Selection:
        saliency = tokens[EncoderSaliency(tokens.shape.feature_layer)]
        merging = Merging(tokens)
        crops = tokens.host.crops
        groups = [(group, length, k) for group, length, k in tokens.each() if length]
        # Another method may have dropped all tokens of a crop.
        frames = [crops[group, :length].unique(return_inverse=True)[1] for group, length, _ in groups]
        # The scenes of all videos are read together: an accelerator is waited for once.
        scene_of = read(
            *(
                self._scenes(tokens.features[group, :length], numbers, tokens.kinds[group])
                for (group, length, _), numbers in zip(groups, frames, strict=True)
            )
        )
        for (group, length, k), *parts in zip(groups, frames, scene_of, strict=True):
            merged = merge_into_anchors(
                tokens.features[group, :length],
                saliency[group, :length],
                *parts,
                k,
                context_share=self.context_share,
                period=self.anchor_period,
                neighbours=self.neighbours,
                anchor_weight=self.anchor_weight,
            )
            merging.put(group, length, *merged)
        return merging.selection

    def _scenes(self, values: Tensor, frames: Tensor, kind: str) -> Tensor:
        """(frames,) long: the scene of each frame; values (tokens, dim), frames (tokens,) long on the CPU."""
        count = int(frames.max()) + 1
        if kind == "video":
            return scenes(frame_means(values, send(frames, values.device), count), self.min_scenes, self.threshold)
        return torch.arange(count)
