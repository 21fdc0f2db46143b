# SPDX-License-Identifier: Apache-2.0
import torch
from torch.nn.functional import normalize

from vtprune.ops.density_peaks import density_peaks, merge_clusters
from vtprune.ops.diversity import order_of_directions
from vtprune.ops.scene_cuts import scenes
from vtprune.ops.time_trees import merge_scenes

from . import Vector, close, handles, same


def scene_of(v: Vector) -> torch.Tensor:
    found = torch.zeros(len(v["features"]), dtype=torch.long)
    if v["do_segment"] and len(found) > 1:
        found = scenes(v["features"].mean(1), v["min_segments"], v["segment_threshold"])
    if v["segment_threshold"] == -1:
        # With fewer places to cut than scenes wanted the reference cuts everywhere, too.
        same(found, torch.arange(len(found)))
    same(found.bincount(), v["segment_lengths"])
    return found


def rows(places: torch.Tensor, features: torch.Tensor, first: int) -> list[tuple[float, ...]]:
    """(index in the video, its features) of kept tokens, for comparing without their order."""
    return [(place + first, *row) for place, row in zip(places.tolist(), features.tolist(), strict=True)]


@handles("flashvid_*")
def videos(v: Vector) -> None:
    """Scene by scene. The reference clusters a lone frame's tokens that it keeps as they are, too, so that an index may
    come twice."""
    found, first, tokens = [], 0, v["features"].shape[1]
    for length in scene_of(v).bincount().tolist():
        clip = slice(first, first + length)
        features, attention, zeros = v["features"][clip], v["attention"][clip], torch.zeros(length, dtype=torch.long)
        by_scene = v["selection"] == "attn_div_v2"
        salient, merged = zeros + v["adts_per_frame"], zeros + v["merged_per_frame"]
        if length == 1 and v["merged_per_frame"]:
            weights = attention * (features @ features.mean(1)[..., None])[..., 0] if by_scene else attention
            everything = torch.ones_like(weights, dtype=torch.bool)
            order = order_of_directions(normalize(features, dim=2), everything, v["adts_per_frame"], weights)
            places = order[0].sort().values
            same(places, v["adts_idx"][first])
            centres, joined = density_peaks(features[0], v["merged_per_frame"], reference_quirks=True)
            found += rows(places, features[0, places], first * tokens)
            found += rows(centres, merge_clusters(features[0], centres, joined, None), first * tokens)
        else:
            keep, changed, sources = merge_scenes(
                features,
                attention,
                zeros,
                salient,
                merged,
                threshold=v["temporal_threshold"],
                by_scene=by_scene,
                reference_quirks=True,
            )
            places, went = keep.flatten().nonzero()[:, 0], sources.flatten()
            found += rows(places, changed.flatten(0, 1)[places], first * tokens)
            same(went[places], places)
            assert set(went.tolist()) - {-1} == set(places.tolist())
        first += length
    close(torch.tensor(sorted(found)), torch.tensor(sorted(rows(v["keep_idx"], v["out"], 0))), rtol=1e-4, atol=1e-5)
