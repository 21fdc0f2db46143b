# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import DyCoke

from . import Vector, handles, kept, same
from .dtd import video


@handles("dycoke_ttm*", "dycoke_odd*", "dycoke_k1")
def before_the_llm(v: Vector) -> None:
    frames, positions = v["frames"], v["tokens_per_frame"]
    found = kept(DyCoke(drop=v["ratio"]), video(v["features"].unflatten(0, (frames, positions)), -1))
    assert int((1 - v["ratio"]) * positions) == v["kept_per_pruned_frame"]
    # The reference loses the last of an odd number of frames, and does not cut the third of the last four.
    frame = found // positions
    third = frame.remainder(4).eq(2) & (frame - 2 >= frames - 4)
    lost = frame.eq(frames - 1) if frames % 2 else torch.zeros_like(third)
    expected, of_expected = v["keep_idx"], v["keep_idx"] // positions
    apart = of_expected.remainder(4).eq(2) & (of_expected - 2 >= frames - 4)
    same(found[~third & ~lost], expected[~apart])
    assert set(found[third & ~lost].tolist()) <= set(expected[apart].tolist())
