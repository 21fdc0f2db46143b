# SPDX-License-Identifier: Apache-2.0
from vtprune.ops.bipartite_merging import bipartite_merging
from vtprune.ops.frame_merging import frame_similarity, merge_similar_frames

from . import Vector, close, handles


@handles("bvllm_*")
def merges(v: Vector) -> None:
    frames, selector, threshold = v["frames"], v["selector"], v["threshold"]
    close(frame_similarity(selector), v["frame_sim"], rtol=1e-5, atol=1e-6)
    merged = merge_similar_frames(frames, selector, threshold, reference_quirks=True)
    close(merged.features[0], v["merged_frames"], rtol=1e-5, atol=1e-6)
    # The reference loses children of merged frames; the default loses none.
    assert (merged.sources < 0).any()
    sane = merge_similar_frames(frames, selector, threshold)
    assert (sane.sources >= 0).all()
    assert sane.sizes.sum() == len(frames)

    queries = v["q"]
    for count in (4, 9, 11, 16, 20, 31, 32):
        close(bipartite_merging(queries, count, reference_quirks=True).features, v[f"mlm_{count}"], atol=1e-6)
