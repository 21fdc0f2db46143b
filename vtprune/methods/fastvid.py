# SPDX-License-Identifier: Apache-2.0
"""FastVID: of every frame what is salient, of every scene the rest, merged around density peaks in a few frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.anchor_merging import merge_into_anchors
from vtprune.ops.frame_pooling import frame_means
from vtprune.ops.scene_cuts import scenes
from vtprune.signals import EncoderSaliency
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FastVID(BeforeLLM):
    """Cuts a video into scenes; keeps salient tokens and merges the others into anchors (arXiv 2503.11187).

    Stage: before the LLM. Every frame keeps the tokens that the encoder attends to most. The rest of a scene joins
    anchors, which are density peaks in the scene's last frame and in every few frames before it. Where several frames
    of a scene hold anchors, a token goes into one of each, as in the reference; the report names the most similar.
    Published setting: keep ratio 0.1, on LLaVA-OneVision.
    Deviations: scenes are told by the mean of a frame's projected features, and tokens rated by the attention of the
    CLS token in the layer that the projector reads, or where there is none by the attention received there (the
    reference takes both from the pooling head of SigLIP, which models do not run); nothing is random; of equal scores
    the first wins; budgets are met exactly (the reference rounds down every frame and every scene); one frame between
    anchors (anchor_period=1) works. An image keeps its crops apart, each a scene of its own.

    Fields
        min_scenes: scenes that a video has at least, if it has as many frames, >= 1, default 8.
        threshold: cosine of a frame and the next below which a scene ends, in [-1, 1], default 0.9.
        context_share: share of a frame's tokens kept that are anchors, in [0, 1], default 0.4.
        anchor_period: frames from one with anchors to the next, >= 1, default 4.
        neighbours: nearest tokens that make up density, itself included, >= 1, default 4.
        anchor_weight: least weight of an anchor against the mean of what joined it, in [0, 1], default 0.6; None: the
            mean alone.
        scope: "image" (default: a video has one budget for all frames), or "crop", which leaves every frame its own
            and makes it a scene of its own.
    """

    name: ClassVar[str] = "fastvid"
    signal: ClassVar[str] = "similarity over time, attention in the encoder"
    paper: ClassVar[str] = "arXiv 2503.11187"

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
        for group, length, k in tokens.each():
            if not length:
                continue
            values = tokens.features[group, :length]
            # A crop may have lost all its tokens to another method.
            frames = tokens.crops[group, :length].unique(return_inverse=True)[1]
            merged = merge_into_anchors(
                values,
                saliency[group, :length],
                frames,
                self._scenes(values, frames, tokens.kinds[group]),
                k,
                context_share=self.context_share,
                period=self.anchor_period,
                neighbours=self.neighbours,
                anchor_weight=self.anchor_weight,
            )
            merging.put(group, length, *merged)
        return merging.selection

    def _scenes(self, values: Tensor, frames: Tensor, kind: str) -> Tensor:
        """(frames,) the scene of each."""
        means = frame_means(values, frames)
        if kind == "video":
            return scenes(means, self.min_scenes, self.threshold)
        return torch.arange(len(means))
