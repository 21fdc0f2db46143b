# SPDX-License-Identifier: Apache-2.0
"""Compressing the scenes of a video: salient tokens of every frame, and the rest merged into anchors in a few."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError
from vtprune.ops.density_peaks import merge_clusters, scaled_distances, spread_and_separation
from vtprune.ops.largest_remainder import apportion, share_out
from vtprune.ops.selection import best_per_part


def salient_and_anchors(
    sizes: Tensor, scene_of: Tensor, k: int, *, context_share: float = 0.4, period: int = 4
) -> tuple[Tensor, Tensor]:
    """How many tokens of each frame are salient, and how many are anchors (FastVID, arXiv 2503.11187).

    Anchors are in the last frame of a scene and in every ``period``-th before it. A scene has them in proportion to its
    tokens, each of those frames as many; what they cannot hold goes to the other frames with anchors, and then to all.

    Args:
        sizes: ``(frames,)`` long, tokens of each, on the CPU.
        scene_of: ``(frames,)`` long, the scene of each frame, in the order of time, on the CPU.
        k: both together, at most the sum of the sizes.
        context_share: share of the anchors, rounded down in each frame's own part of ``k``, in [0, 1].
        period: at least 1.

    Returns:
        ``(frames,)`` long each.
    """
    shares = share_out(sizes, k)
    salient = shares - (shares.double() * context_share).floor().long()
    scenes, lengths = scene_of.unique_consecutive(return_counts=True)
    last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
    holds = (last - torch.arange(len(sizes))) % period == 0
    number = torch.arange(len(scenes)).repeat_interleave(lengths)
    tokens, holders = (
        torch.zeros(len(scenes), dtype=torch.long).index_add_(0, number, counts) for counts in (sizes, holds.long())
    )
    weights = torch.where(holds, tokens.double()[number] / holders[number], 0.0)
    return salient, apportion(k - int(salient.sum()), weights, sizes - salient)


def merge_into_anchors(
    features: Tensor,
    saliency: Tensor,
    frames: Tensor,
    scene_of: Tensor,
    k: int,
    *,
    context_share: float = 0.4,
    period: int = 4,
    neighbours: int = 4,
    anchor_weight: float | None = 0.6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the salient tokens of every frame, and merge those of a scene that are not into anchors (FastVID).

    Anchors are density peaks of their frame: the tokens with the largest product of density and distance to a denser
    one, salient tokens aside, as in :mod:`vtprune.ops.density_peaks`. Each frame's anchors sum up the whole scene:
    every token of it that is not salient joins the one of them that is most like it in cosine, the first of equals, and
    an anchor itself. Where several frames of a scene hold anchors, a token so goes into one of each.

    Args:
        features: ``(tokens, dim)`` of one video.
        saliency: ``(tokens,)``, higher is kept.
        frames: ``(tokens,)`` long, the frame of each, numbered from 0 without gaps.
        scene_of: ``(frames,)`` long, the scene of each frame, in the order of time.
        k: tokens to keep, at most all.
        context_share: of :func:`salient_and_anchors`.
        period: of :func:`salient_and_anchors`.
        neighbours: nearest tokens that make up density, at least 1, itself included.
        anchor_weight: an anchor becomes ``w * anchor + (1 - w) * mean`` of all ``n`` that joined it, itself one of
            them, where ``w`` is the larger of this and ``1 / (n + 1)``. None: the mean alone.

    Returns:
        keep: ``(tokens,)`` bool, ``k`` of them.
        features: ``(tokens, dim)`` with those of anchors replaced.
        sources: ``(tokens,)`` long, the kept token that each went into, of several the one it is most like; -1 in a
            scene without anchors.

    Raises:
        VTPruneError: a feature or a saliency is NaN or infinite.
    """
    if not saliency.isfinite().all():
        raise VTPruneError("saliency holds NaN or infinite values: no token can be called the most salient")
    device = features.device
    sizes, scene_of = frames.bincount().cpu(), scene_of.cpu()
    counts = salient_and_anchors(sizes, scene_of, k, context_share=context_share, period=period)
    salient = best_per_part(saliency, frames, counts[0].to(device))
    rest = (~salient).nonzero()[:, 0]
    rest = rest[frames[rest].argsort(stable=True)]  # tiles of an image take turns
    anchors = torch.zeros_like(salient)
    for places, count in zip(rest.split((sizes - counts[0]).tolist()), counts[1].tolist(), strict=True):
        if count:
            spread, separation = spread_and_separation(scaled_distances(features[places]), min(neighbours, len(places)))
            # The logarithm of density times separation: far apart points would all have density zero.
            order = (separation.log() - spread).argsort(descending=True, stable=True)
            anchors[places[order[:count]]] = True

    keep, merged = salient | anchors, features.clone()
    own = torch.arange(len(keep), device=device)
    sources = own.masked_fill(~keep, -1)
    scene_of_token = scene_of.to(device)[frames]
    for scene in scene_of.unique().tolist():
        members = rest[scene_of_token[rest] == scene]
        centres = anchors[members].nonzero()[:, 0]
        if not len(centres):
            continue
        points = features[members]
        directions = normalize(points.float(), dim=-1)
        likeness = directions @ directions[centres].T
        sources[members] = members[centres][_nearest(likeness, centres)]
        held = [count for count in counts[1][scene_of == scene].tolist() if count]
        for some, alike in zip(centres.split(held), likeness.split(held, dim=1), strict=True):
            merged[members[some]] = _merge(points, some, _nearest(alike, some), anchor_weight)
    return keep, merged, sources


def _nearest(likeness: Tensor, centres: Tensor) -> Tensor:
    """(points, centres) -> (points,) which centre each point is most like; a centre belongs to itself."""
    nearest = likeness.argmax(-1)
    # One that coincides with another centre still is a centre of its own.
    nearest[centres] = torch.arange(len(centres), device=nearest.device)
    return nearest


def _merge(points: Tensor, centres: Tensor, joined: Tensor, anchor_weight: float | None) -> Tensor:
    """(centres, dim), as in `merge_into_anchors`."""
    means = merge_clusters(points, centres, joined, None)
    if anchor_weight is None:
        return means
    weight = (1 / (joined.bincount(minlength=len(centres)) + 1)).clamp_min(anchor_weight)[:, None]
    return (weight * points[centres] + (1 - weight) * means).to(points.dtype)
