# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import VidCom2
from vtprune.ops.frame_uniqueness import commonness, frame_shares

from . import Vector, close, handles, kept, one_per_group, same


@handles("vidcom2_*")
def tokens_of_every_frame(v: Vector) -> None:
    """The reference rounds every frame separately. With the resulting sum as budget, the method keeps the same."""
    features, size, counts = v["features"], v["tokens_per_frame"], v["counts"]
    frames = torch.arange(len(counts)).repeat_interleave(size)
    to_video, to_frame = commonness(features, frames, len(counts))
    close(to_video.view(-1, size), v["video_score"])
    close(to_frame.view(-1, size), v["frame_score"])
    shares = frame_shares(to_video, frames, len(counts))
    close((v["ratio"] * shares).clamp(max=1), v["scales"], rtol=1e-4)

    budget = int(counts.sum())
    tokens = one_per_group(features[None], budget, crops=frames[None])
    chosen = kept(VidCom2(keep_tokens=budget), tokens)
    same(frames[chosen].bincount(minlength=len(counts)), counts)
    same(chosen % size, v["local_indices"])
    if "img_feat" not in v:
        same(features[chosen], v["out"])
        return
    # A newline ends each row of the grid; the reference puts those of a frame after its tokens.
    grid = v["img_feat"].view(len(counts), 13, 14, -1)
    patches, newlines = grid[:, :, :13].flatten(1, 2), grid[:, :, 13]
    parts = [(patches[frame, chosen[frames[chosen] == frame] % size], newlines[frame]) for frame in range(len(counts))]
    same(torch.cat([part for pair in parts for part in pair]), v["out"])
