# SPDX-License-Identifier: Apache-2.0
"""B-VLLM: frames that show much the same become one, then similar tokens within a frame do."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.frame_merging import frame_similarity, merge_similar_frames
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.merging import Merged
from vtprune.tokens import Merging, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class BVLLMMerge(BeforeLLM):
    """The two merges of B-VLLM that need no training (arXiv 2412.09919): of similar frames, then within each of them.

    Stage: before the LLM. A frame goes into the earlier one it resembles most, if it does enough; a frame left is the
    plain mean of those it stands for. Every frame left is then brought down to its part of the budget by iterative
    bipartite merging. Images have the second merge alone, crop by crop.
    Deviations: the trained frame selector and query tokens are left out, so frames are compared by the mean of their
    features, and the visual tokens themselves are merged; no frame is lost (in the reference those are that go into one
    that is itself merged); the threshold rises where the frames left could not hold the budget; tokens keep their
    order.

    Fields
        threshold: frames merge when `(cosine + 1) / 2` is above it, in [0, 1], default 0.75, which was published for
            the selector's distributions over frames; for means of features it wants tuning. 1 merges no frames.
        scope: "image" (default); "crop" gives every frame its own budget and merges within frames alone.
        reference_quirks: as in the reference, a frame is lost that goes into one which is itself merged, and between
            rounds of merging within a frame those that found no partner come first, by falling similarity; default
            False.
    """

    name: ClassVar[str] = "bvllm_merge"
    signal: ClassVar[str] = "similarity of frames and of tokens"
    paper: ClassVar[str] = "arXiv 2412.09919"

    threshold: Share = 0.75
    scope: Literal["crop", "image"] = "image"
    reference_quirks: bool = False

    def select(self, tokens: VisualTokens) -> Selection:
        merging = Merging(tokens)
        for group, length, k in tokens.each():
            own = tokens.crops[group, :length]
            crops = [(own == crop).nonzero()[:, 0] for crop in own.unique().tolist()]
            if self.scope == "image" and tokens.kinds[group] == "video" and len(crops) > 1:
                layouts = set(tokens.layouts[group])
                if len(layouts) > 1 or None in layouts:
                    raise UnsupportedStageError("bvllm_merge needs whole frames; put it before other methods")
                merged = self._merge_frames(tokens.features[group, :length].unflatten(0, (len(crops), -1)), k)
                own = merged.in_place(tokens.features[group, None, :length])
                merging.put(group, length, *(part[0] for part in own))
                continue
            sizes = torch.tensor([len(places) for places in crops], dtype=torch.long)
            for places, count in zip(crops, apportion(k, sizes, sizes).tolist(), strict=True):
                values = tokens.features[group, None, places]
                merged = bipartite_merging(values, count, reference_quirks=self.reference_quirks)
                merging.put(group, places, *(part[0] for part in merged.in_place(values)))
        return merging.selection

    def _merge_frames(self, frames: Tensor, k: int) -> Merged:
        """frames (frames, tokens, dim) -> one group whose tokens are those of all frames, `k` of them left."""
        size = frames.shape[1]
        metric = frames.float().mean(1)
        threshold = _threshold(metric, self.threshold, -(-k // size), self.reference_quirks)
        over_time = merge_similar_frames(frames, metric, threshold, reference_quirks=self.reference_quirks)
        left = over_time.places[0]
        capacities = torch.full((len(left),), size)
        counts = apportion(k, torch.ones(len(left)), capacities)
        counts = counts.to(frames.device)
        within = bipartite_merging(over_time.features[0], counts, reference_quirks=self.reference_quirks)
        # Where each token of each frame goes: to the frame that this one went into, then to a place in there.
        frame = over_time.sources[0]
        row = torch.searchsorted(left, frame)
        into = within.sources[row].masked_fill(frame[:, None] < 0, -1)
        sources = torch.where(into >= 0, frame[:, None] * size + into, -1).flatten()
        places = torch.where(within.valid, left[:, None] * size + within.places, -1).flatten()
        return Merged(within.features.flatten(0, 1)[None], places[None], sources[None])


def _threshold(metric: Tensor, threshold: float, least: int, reference_quirks: bool) -> float:
    """The lowest similarity from `threshold` up that, merged above, leaves `least` frames of (frames, dim) or more."""
    similarity = frame_similarity(metric)
    candidates = [threshold, *similarity[similarity > threshold].unique().tolist()]

    def left(value: float) -> int:
        merged = merge_similar_frames(metric[:, None], metric, value, reference_quirks=reference_quirks)
        return merged.places.shape[1]

    return candidates[bisect_left(candidates, least, key=left)]
