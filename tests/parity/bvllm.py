# SPDX-License-Identifier: Apache-2.0
import torch

from vtprune import BVLLMMerge
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.frame_merging import frame_similarity, merge_frames, similar_frames

from . import Vector, close, handles, one_per_group, same


@handles("bvllm_*")
def merges(v: Vector) -> None:
    frames, selector, threshold = v["frames"], v["selector"], v["threshold"]
    similarity = frame_similarity(selector)
    close(similarity, v["frame_sim"], rtol=1e-5, atol=1e-6)
    merged = merge_frames(frames, similar_frames(similarity, threshold, reference_quirks=True))
    close(merged.features[0], v["merged_frames"], rtol=1e-5, atol=1e-6)
    # The reference loses frames that went into merged frames; the default loses none.
    assert (merged.sources < 0).any()
    sane = merge_frames(frames, similar_frames(similarity, threshold))
    assert (sane.sources >= 0).all()
    assert sane.sizes.sum() == len(frames)

    queries = v["q"]
    for count in (4, 9, 11, 16, 20, 31, 32):
        merged = bipartite_merging(queries, count, reference_quirks=True)
        close(merged.features, v[f"mlm_{count}"], atol=1e-6)
        # The method leaves the same tokens in their places.
        method = BVLLMMerge(scope="crop", reference_quirks=True)
        crops = torch.zeros(queries.shape[:2], dtype=torch.long)
        selection = method.select(one_per_group(queries, count, crops=crops, kinds=("video",) * len(queries)))
        for group, places in enumerate(merged.places):
            same(selection.keep[group].nonzero()[:, 0], places.sort().values)
            close(selection.features[group, places], v[f"mlm_{count}"][group], atol=1e-6)
