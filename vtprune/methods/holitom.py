# SPDX-License-Identifier: Apache-2.0
"""HoliTom: merge still positions of a video over time, keep salient moving tokens, then merge once inside the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Interval
from torch import Tensor

from vtprune import budget
from vtprune.devices import send
from vtprune.errors import ConfigError
from vtprune.methods.base import BeforeLLM, Composite, InLLM, Method, Share
from vtprune.methods.clips import clips
from vtprune.ops.inner_llm_merging import absorb_dropped
from vtprune.ops.video_merging import merge_video
from vtprune.signals import AttentionReceived, LastQueryAttention
from vtprune.tokens import Merging, ModelShape, Selection, VisualTokens

PUBLISHED_LAYER, PUBLISHED_DEPTH = 18, 28


@dataclass(frozen=True, kw_only=True)
class HoliTom(Composite):
    """Merges a video over time and space before the LLM, and once more inside it (arXiv 2505.21334).

    Stages: before the LLM, a video is cut into segments of frames in which many positions are still. These positions
    are averaged over the segment and clustered. Of the moving tokens of each frame the most salient are kept; saliency
    is the attention that a token receives in the encoder. Inside the LLM, on the input of one decoder layer, the visual
    tokens that the prompt's last token attends to least are merged into the most similar other tokens.
    Deviations: budgets are met exactly (the reference rounds each part separately); nothing is random; a merged token
    takes the place of its centre, in the order of the frames, as in the reference's grid mode; inside the LLM tokens
    are merged only within a run of visual tokens, and the layer that measures attention stays causal (the reference
    runs it without a causal mask); images lose their least salient tokens, crop by crop (the reference does not change
    images). Positions are renumbered before the LLM, as in the reference, and kept inside it.

    Fields
        keep_ratio, keep_tokens: averaged over the LLM's layers, for both stages together. The merge before the LLM is
            sized to meet them. keep_tokens counts per image or video.
        threshold: cosine above which a position is still from one frame to the next, in [-1, 1], default 0.8.
        max_window: largest number of frames in a segment, >= 1, default 1024.
        context_share: share of a frame's kept moving tokens that are cluster centres of the less salient ones, in
            [0, 1], default 0.
        neighbours: number of nearest neighbours in clustering, >= 1, default 7.
        centre_weight: weight of a cluster's centre against the mean of its members, in [0, 1], default 0.6; None: the
            mean of all members.
        layer: decoder layer on whose input the second merge acts, in 1..depth-1; default None: 18 of 28, rescaled to
            the model's depth.
        inner_share: share of the tokens that the second merge leaves, in [0, 1], default 0.5; 1 turns it off.
        reference_quirks: before the LLM, round as the reference does: up for the moving tokens of each frame, and to
            the nearest number for the still ones of each segment, which misses the budget. And with one or two
            clusters, use at most as many neighbours as clusters. Default False.
    """

    name: ClassVar[str] = "holitom"
    signal: ClassVar[str] = "similarity over time, attention in the encoder and in the LLM"
    paper: ClassVar[str] = "arXiv 2505.21334"
    text_aware: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.8
    max_window: Annotated[int, Ge(1)] = 1024
    context_share: Share = 0.0
    neighbours: Annotated[int, Ge(1)] = 7
    centre_weight: Share | None = 0.6
    layer: Annotated[int, Ge(1)] | None = None
    inner_share: Share = 0.5
    reference_quirks: bool = False

    def inner_layer(self, shape: ModelShape) -> int:
        """Decoder layer on whose input the second merge acts."""
        if self.layer is None:
            return budget.rescale_layers((PUBLISHED_LAYER,), PUBLISHED_DEPTH, shape.decoder_layers)[0]
        if self.layer >= shape.decoder_layers:
            raise ConfigError(f"holitom: layer={self.layer} must be within 1..{shape.decoder_layers - 1}")
        return self.layer

    def shares(self, shape: ModelShape) -> tuple[float, float]:
        """For a `keep_ratio`: the share of tokens that enters the LLM, and the share of these left inside it."""
        cut, depth = self.inner_layer(shape), shape.decoder_layers
        entering = self.keep_ratio / self.average(shape)
        if entering <= 1:
            return entering, self.inner_share
        return 1.0, (self.keep_ratio * depth - cut) / (depth - cut)

    def average(self, shape: ModelShape) -> float:
        """Number of tokens, averaged over the layers, divided by the number of tokens that enter the LLM."""
        cut, depth = self.inner_layer(shape), shape.decoder_layers
        return (cut + (depth - cut) * self.inner_share) / depth

    def check_budget(self, shape: ModelShape) -> None:
        super().check_budget(shape)
        self.inner_layer(shape)

    def parts(self, shape: ModelShape) -> tuple[Method, ...]:
        layer, inner = self.inner_layer(shape), self.inner_share
        if self.keep_ratio is not None:
            ratio, inner = self.shares(shape)
            entering = {"keep_ratio": ratio}
        else:
            entering = {"keep_tokens": round(self.keep_tokens / self.average(shape))}
        names = ("threshold", "max_window", "context_share", "neighbours", "centre_weight", "positions")
        names += ("reference_quirks",)
        outer = _MergeVideo(**entering, **{name: getattr(self, name) for name in names})
        if self.keep_ratio == 1.0 or inner == 1.0:
            return (outer,)
        return outer, _MergeInside(layer=layer, share=inner, positions="original")


@dataclass(frozen=True, kw_only=True)
class _MergeVideo(BeforeLLM):
    """The part before the LLM; the fields are those of `HoliTom`."""

    name: ClassVar[str] = "holitom"
    signal: ClassVar[str] = "similarity over time, attention in the encoder"

    threshold: float = 0.8
    max_window: int = 1024
    context_share: float = 0.0
    neighbours: int = 7
    centre_weight: float | None = 0.6
    reference_quirks: bool = False
    scope: Literal["crop", "image"] = "image"

    def signals(self, shape: ModelShape):
        return (AttentionReceived(shape.feature_layer),)

    def select(self, tokens: VisualTokens) -> Selection:
        merging = Merging(tokens)
        saliency = tokens[AttentionReceived(tokens.shape.feature_layer)]
        # The reference applies the ratio to each part, not to the rounded count.
        ratio = self.keep_ratio if self.reference_quirks else None
        for group, where, frames, count in clips(self.name, tokens):
            places = send(where, tokens.valid.device)
            video = merge_video(
                tokens.features[group, places].unflatten(0, (frames, -1)),
                saliency[group, places].view(frames, -1),
                count / len(places) if ratio is None else ratio,
                threshold=self.threshold,
                max_window=self.max_window,
                context_share=self.context_share,
                neighbours=self.neighbours,
                centre_weight=self.centre_weight,
                reference_quirks=self.reference_quirks,
            )
            merging.put(group, places, video.keep.flatten(), video.features.flatten(0, 1), video.sources.flatten())
        return merging.selection


@dataclass(frozen=True, kw_only=True)
class _MergeInside(InLLM):
    """The part inside the LLM.

    Fields
        layer: decoder layer on whose input it acts.
        share: share of the tokens that is left.
    """

    name: ClassVar[str] = "holitom"
    signal: ClassVar[str] = "attention in the LLM"
    needs_budget: ClassVar[bool] = False

    layer: int
    share: float

    def cuts(self, shape: ModelShape) -> tuple[int, ...]:
        return (self.layer,)

    def budgets(self, shape: ModelShape, entering: Tensor, crops: Tensor) -> Tensor:
        return (entering * self.share).round().long()[None]

    def signals(self, shape: ModelShape):
        return (LastQueryAttention(self.layer - 1),)

    def select(self, tokens: VisualTokens) -> Selection:
        merging = Merging(tokens)
        weights = tokens[LastQueryAttention(self.layer - 1)].mean(1)
        for group, length, k in tokens.each():
            states, runs = tokens.features[group, :length], tokens.runs[group, :length]
            merging.put(group, length, *absorb_dropped(states, weights[group, :length], k, runs=runs))
        return merging.selection
