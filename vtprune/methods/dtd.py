# SPDX-License-Identifier: Apache-2.0
"""DTD: drop tokens of a video that are like those at the same position of the frame before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Interval

from vtprune.devices import send
from vtprune.methods.base import BeforeLLM
from vtprune.methods.clips import clips
from vtprune.ops.temporal_change import changed, most_changed
from vtprune.tokens import Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class DTD(BeforeLLM):
    """Differential token drop: keeps what changes from frame to frame (TimeChat-Online, arXiv 2504.17343).

    Stage: before the LLM, from the projected features of a video. The first frame stays as a whole. A token of a later
    frame is dropped if its cosine with the token at the same position of the frame before is above a threshold; the
    frame before counts as a whole, with what was dropped of it. So the number of kept tokens depends on the video. With
    a budget, every later frame keeps about equally many of its tokens, those that changed most. An image, whose crops
    are no frames, stays as it is without a budget; with one, tokens stay at an even stride. Published setting:
    threshold=0.5. The authors' model is trained with it.
    Deviations: pixels are not compared, only features; budgets are met exactly (the reference rounds in every frame);
    several videos, images beside them and batches work.

    Fields
        keep_ratio, keep_tokens: optional; without them, the threshold says how many tokens stay.
        threshold: cosine above which a token is dropped, in [-1, 1], default 0.5.
        scope: "image" (default): a video has one budget for all frames. "crop": every frame has a budget of its own,
            and is compared with none.
    """

    name: ClassVar[str] = "dtd"
    signal: ClassVar[str] = "similarity over time"
    paper: ClassVar[str] = "arXiv 2504.17343"
    needs_budget: ClassVar[bool] = False
    adaptive: ClassVar[bool] = True

    threshold: Annotated[float, Interval(ge=-1, le=1)] = 0.5
    scope: Literal["crop", "image"] = "image"

    def select(self, tokens: VisualTokens) -> Selection:
        keep = torch.zeros_like(tokens.valid)
        for group, where, frames, k in clips(self.name, tokens):
            places = send(where, keep.device)
            video = tokens.features[group, places].unflatten(0, (frames, -1))
            keep[group, places] = (changed(video, self.threshold) if k < 0 else most_changed(video, k)).flatten()
        return Selection(keep)
