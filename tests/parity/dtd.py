# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import DTD
from vtprune.tokens import Grid, VisualTokens

from . import Vector, handles, kept, same


def video(features: torch.Tensor, budget: int) -> VisualTokens:
    """A video of (frames, positions, dim) features, as a method gets it."""
    frames, positions, _ = features.shape
    return VisualTokens(
        features=features.flatten(0, 1)[None],
        valid=torch.ones(1, frames * positions, dtype=torch.bool),
        budget=torch.tensor([budget]),
        crops=torch.arange(frames).repeat_interleave(positions)[None],
        layouts=((Grid(1, positions),) * frames,),
        kinds=("video",),
    )


@handles("dtd_feature*")
def features(v: Vector) -> None:
    if v["absolute"]:
        same(kept(DTD(threshold=v["threshold"]), video(v["features"], -1)), v["keep_idx"])
        return
    # The reference drops the same number in each frame but the first; this is the budget that says the same.
    frames, positions, _ = v["features"].shape
    k = positions + (frames - 1) * (positions - int(positions * v["threshold"]))
    same(kept(DTD(keep_tokens=1), video(v["features"], k)), v["keep_idx"])
