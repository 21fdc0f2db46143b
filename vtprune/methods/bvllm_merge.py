# SPDX-License-Identifier: Apache-2.0
"""B-VLLM: merge similar frames, then similar tokens within each frame."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.methods.base import BeforeLLM, Share
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.frame_merging import frame_similarity, merge_frames, similar_frames
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.merging import Merged
from vtprune.tokens import Merging, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class BVLLMMerge(BeforeLLM):
    """The two merges of B-VLLM that need no training (arXiv 2412.09919): of similar frames, then within each frame.

    Stage: before the LLM. A frame goes into the most similar earlier frame, if it is similar enough. A frame that stays
    becomes the plain mean of the frames that went into it and itself. Then iterative bipartite merging reduces every
    frame to its part of the budget. Images have only the second merge, crop by crop.
    Deviations: the trained frame selector and query tokens are left out, so frames are compared by the mean of their
    features, and the visual tokens themselves are merged; no frame is lost (the reference loses frames that go into a
    frame which is merged itself); the threshold rises if too few frames would be left for the budget; tokens keep their
    order.

    Fields
        threshold: frames merge when `(cosine + 1) / 2` is above it, in [0, 1], default 0.75. This value was published
            for the selector's distributions over frames; for means of features it should be tuned. 1 merges no frames.
        scope: "image" (default); "crop" gives every frame its own budget and merges only within frames.
        reference_quirks: as in the reference, lose a frame that goes into a frame which is merged itself; and between
            rounds of merging within a frame, put tokens without a merge first, by falling similarity. Default False.
    """

    name: ClassVar[str] = "bvllm_merge"
    signal: ClassVar[str] = "similarity of frames and of tokens"
    paper: ClassVar[str] = "arXiv 2412.09919"
    merges: ClassVar[bool] = True

    threshold: Share = 0.75
    scope: Literal["crop", "image"] = "image"
    reference_quirks: bool = False

    def select(self, tokens: VisualTokens) -> Selection:
        merging = Merging(tokens)
        for group, length, k in tokens.each():
            crops = tokens.host.places(group)
            if self.scope == "image" and tokens.kinds[group] == "video" and len(crops) > 1:
                layouts = set(tokens.layouts[group])
                if len(layouts) > 1 or None in layouts:
                    raise UnsupportedStageError("bvllm_merge needs whole frames; put it before other methods")
                merged = self._merge_frames(tokens.features[group, :length].unflatten(0, (len(crops), -1)), k)
                parts = merged.in_place(tokens.features[group, None, :length])
                merging.put(group, length, *(part[0] for part in parts))
                continue
            sizes = torch.tensor([len(places) for places in crops], dtype=torch.long)
            for places, count in zip(crops, apportion(k, sizes, sizes).tolist(), strict=True):
                places = send(places, tokens.valid.device)
                values = tokens.features[group, None, places]
                merged = bipartite_merging(values, count, reference_quirks=self.reference_quirks)
                merging.put(group, places, *(part[0] for part in merged.in_place(values)))
        return merging.selection

    def _merge_frames(self, frames: Tensor, k: int) -> Merged:
        """frames (frames, tokens, dim) -> one group with the tokens of all frames, of which `k` are left."""
        size = frames.shape[1]
        # An accelerator is waited for here, and nowhere else: which frames merge is found one by one, on the CPU.
        similarity = frame_similarity(frames.float().mean(1)).cpu()
        over_time = merge_frames(frames, _merges(similarity, self.threshold, -(-k // size), self.reference_quirks))
        stays = over_time.places[0]
        counts = apportion(k, torch.ones(len(stays)), torch.full((len(stays),), size))
        within = bipartite_merging(over_time.features[0], counts, reference_quirks=self.reference_quirks)
        # A token goes into the frame that its own frame went into, and there into the token that its place went into.
        frame = over_time.sources[0]
        row = torch.searchsorted(stays, frame)
        frame, row, stays = (send(numbers, frames.device) for numbers in (frame, row, stays))
        into = within.sources[row].masked_fill(frame[:, None] < 0, -1)
        sources = torch.where(into >= 0, frame[:, None] * size + into, -1).flatten()
        places = torch.where(within.valid, stays[:, None] * size + within.places, -1).flatten()
        return Merged(within.features.flatten(0, 1)[None], places[None], sources[None])


def _merges(similarity: Tensor, threshold: float, least: int, reference_quirks: bool) -> Tensor:
    """`similar_frames` with the lowest threshold, `threshold` or above, with which at least `least` frames stay."""
    candidates = [threshold, *similarity[similarity > threshold].unique().tolist()]

    def merged(value: float) -> Tensor:
        return similar_frames(similarity, value, reference_quirks=reference_quirks)

    def frames_left(value: float) -> int:
        return int((merged(value) == torch.arange(len(similarity))).sum())

    return merged(candidates[bisect_left(candidates, least, key=frames_left)])
