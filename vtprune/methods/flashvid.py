# SPDX-License-Identifier: Apache-2.0
"""FlashVID: keep salient and diverse tokens of each frame; merge the others in trees over time, and in clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from vtprune.devices import read, send
from vtprune.methods.base import BeforeLLM, Share
from vtprune.methods.clips import clips
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.scene_cuts import scenes
from vtprune.ops.time_trees import merge_scenes
from vtprune.signals import AttentionReceived
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FlashVID(BeforeLLM):
    """Keeps salient, diverse tokens of each frame and merges the others over time and space (arXiv 2602.08024).

    Stage: before the LLM, from the projected features and the attention that tokens receive in the encoder layer whose
    output the projector reads. A video is cut into scenes. In each frame the most salient tokens that are unlike each
    other stay. Each other token joins the most similar one of the frame before, if they are similar enough. The roots
    of these trees are clustered in each frame, and a cluster's mean takes the place of its centre. Memory is linear in
    the frames. Each crop of an image is a scene of one frame. Published setting: keep_ratio=0.1 on LLaVA-OneVision.
    Deviations: the cut on the input of the LLM's layer 20, which keeps 30 % by attention, is a method of its own: put
    `fastv` behind this one; budgets are met exactly (the reference rounds up in each frame); a mean counts every token
    of a tree once (see reference_quirks); a token is never kept twice; nothing is random; tokens that are kept as they
    are enter no cluster (in the reference they do, in scenes of one frame); with one or two clusters, density counts
    all neighbours.

    Fields
        min_scenes: smallest number of scenes of a video that has as many frames, >= 1, default 8.
        scene_threshold: cosine of a frame with the next frame below which a scene ends, in [-1, 1], default 0.9.
        salient_share: share of the kept tokens that stay as they are, rounded up in each frame, in [0, 1], default 0.7.
        threshold: cosine above which a token joins one of the frame before, in [-1, 1], default 0.8.
        by_scene: weigh saliency by the product of a token with the mean of its scene, default True, as in the authors'
            LLaVA variant.
        neighbours: number of nearest tokens that density is computed from, the token itself included, >= 1, default 7.
        reference_quirks: a mean over time divides by the number of direct children only, so that a token which stays
            still for long grows; and neighbours are never more than clusters; default False.
        scope: "image" (default): a video has one budget for all frames. "crop": every frame has its own budget and is a
            separate scene.
    """

    name: ClassVar[str] = "flashvid"
    signal: ClassVar[str] = "similarity over time, attention in the encoder"
    paper: ClassVar[str] = "arXiv 2602.08024"
    merges: ClassVar[bool] = True

    min_scenes: Annotated[int, Ge(1)] = 8
    scene_threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.9
    salient_share: Share = 0.7
    threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.8
    by_scene: bool = True
    neighbours: Annotated[int, Ge(1)] = 7
    reference_quirks: bool = False
    scope: Literal["crop", "image"] = "image"

    def signals(self, shape: ModelShape):
        return (AttentionReceived(shape.feature_layer),)

    def select(self, tokens: VisualTokens) -> Selection:
        saliency = tokens[AttentionReceived(tokens.shape.feature_layer)]
        merging = Merging(tokens)
        for group, where, frames, k in clips(self.name, tokens):
            places = send(where, tokens.valid.device)
            video = tokens.features[group, places].unflatten(0, (frames, -1))
            shares = share_out(torch.full((frames,), video.shape[1]), k)
            salient = (shares.double() * self.salient_share).ceil().long()
            keep, features, sources = merge_scenes(
                video,
                saliency[group, places].view(frames, -1),
                self._scenes(video),
                salient,
                shares - salient,
                threshold=self.threshold,
                neighbours=self.neighbours,
                by_scene=self.by_scene,
                reference_quirks=self.reference_quirks,
            )
            merging.put(group, places, keep.flatten(), features.flatten(0, 1), sources.flatten())
        return merging.selection

    def _scenes(self, video: Tensor) -> Tensor:
        """(frames,) long on the CPU: the scene of each frame of (frames, tokens, dim)."""
        if len(video) == 1:
            return torch.zeros(1, dtype=torch.long)
        return read(scenes(video.float().mean(1), self.min_scenes, self.scene_threshold))[0]
