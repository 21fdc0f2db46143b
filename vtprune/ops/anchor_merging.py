# SPDX-License-Identifier: Apache-2.0
"""FastVID's compression of a scene: keep the salient tokens of each frame, merge the rest into a few anchors."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require
from vtprune.devices import send
from vtprune.ops.density_peaks import merge_clusters, scaled_distances, spread_and_separation
from vtprune.ops.largest_remainder import apportion, share_out
from vtprune.ops.selection import best_per_part


def salient_and_anchors(
    sizes: Tensor, scene_of: Tensor, k: int, *, context_share: float = 0.4, period: int = 4
) -> tuple[Tensor, Tensor]:
    """How many salient tokens and how many anchors each frame keeps (FastVID, arXiv 2503.11187).

    The last frame of a scene has anchors, and so has every ``period``-th frame before it. Scenes get anchors in
    proportion to their tokens, and the frames with anchors of one scene get equally many. Anchors that do not fit into
    these frames go to other frames with anchors first, and then to all frames.

    Args:
        sizes: ``(frames,)`` long, number of tokens of each frame, on the CPU.
        scene_of: ``(frames,)`` long, the scene of each frame, in the order of time, on the CPU.
        k: number of salient tokens and anchors together, at most the sum of the sizes.
        context_share: share of the anchors in ``k``, in [0, 1]; rounded down in each frame's part of ``k``.
        period: distance in frames between two frames with anchors, at least 1.

    Returns:
        Two ``(frames,)`` long tensors: salient tokens and anchors of each frame.
    """
    shares = share_out(sizes, k)
    salient = shares - (shares.double() * context_share).floor().long()
    scenes, lengths = scene_of.unique_consecutive(return_counts=True)
    last = (lengths.cumsum(0) - 1).repeat_interleave(lengths)
    has_anchors = (last - torch.arange(len(sizes))) % period == 0
    number = torch.arange(len(scenes)).repeat_interleave(lengths)
    tokens, anchor_frames = (
        torch.zeros(len(scenes), dtype=torch.long).index_add_(0, number, counts)
        for counts in (sizes, has_anchors.long())
    )
    weights = torch.where(has_anchors, tokens.double()[number] / anchor_frames[number], 0.0)
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
    """Keep the salient tokens of each frame, and merge the other tokens of a scene into anchors (FastVID).

    Anchors are density peaks of their frame (:mod:`vtprune.ops.density_peaks`): among the tokens that are not salient,
    those with the largest product of density and distance to a denser token. The anchors of one frame sum up the whole
    scene: every token of the scene that is not salient joins the anchor with the largest cosine, the first of equals;
    an anchor joins itself. Where several frames of a scene have anchors, a token joins one anchor in each of them.

    Args:
        features: ``(tokens, dim)`` of one video.
        saliency: ``(tokens,)``; tokens with higher values are kept.
        frames: ``(tokens,)`` long, the frame of each token, numbered from 0 without gaps, on the CPU.
        scene_of: ``(frames,)`` long, the scene of each frame, in the order of time, on the CPU.
        k: number of tokens to keep, at most all.
        context_share: as in :func:`salient_and_anchors`.
        period: as in :func:`salient_and_anchors`.
        neighbours: number of nearest tokens that density is computed from, the token itself included, at least 1.
        anchor_weight: an anchor becomes ``w * anchor + (1 - w) * mean``. The mean is over the ``n`` tokens that joined
            it, itself included, and ``w`` is the larger of ``anchor_weight`` and ``1 / (n + 1)``. None: the mean.

    Returns:
        keep: ``(tokens,)`` bool, True for ``k`` tokens.
        features: ``(tokens, dim)``; the features of anchors are replaced.
        sources: ``(tokens,)`` long, the kept token that each token went into; of several anchors, the most similar
            one. -1 for tokens that are not salient in a scene without anchors.

    Raises:
        VTPruneError: a feature or a saliency is NaN or infinite.
    """
    require(saliency.isfinite().all(), "saliency holds NaN or infinite values: tokens cannot be ranked by it")
    device = features.device
    sizes = frames.bincount()
    salient_counts, anchor_counts = salient_and_anchors(sizes, scene_of, k, context_share=context_share, period=period)
    # All counts are known here, so an accelerator is never waited for: sorting takes the place of flags as indices.
    frame_of = send(frames, device)
    salient = best_per_part(saliency, frame_of, salient_counts)
    left = sizes - salient_counts
    # In the order of frames: tokens of the tiles of an image alternate.
    rest = frame_of.masked_fill(salient, len(sizes)).argsort(stable=True)[: int(left.sum())]
    anchors = torch.zeros_like(salient)
    for places, count in zip(rest.split(left.tolist()), anchor_counts.tolist(), strict=True):
        if count:
            spread, separation = spread_and_separation(scaled_distances(features[places]), min(neighbours, len(places)))
            # The logarithm of density times separation. Density itself would be zero for points far apart.
            order = (separation.log() - spread).argsort(descending=True, stable=True)
            anchors.index_fill_(0, places[order[:count]], True)

    keep, merged = salient | anchors, features.clone()
    sources = torch.arange(len(keep), device=device).masked_fill(~keep, -1)
    lengths = scene_of.unique_consecutive(return_counts=True)[1].tolist()
    members_of = rest.split([int(part.sum()) for part in left.split(lengths)])
    for members, counts in zip(members_of, anchor_counts.split(lengths), strict=True):
        per_frame = counts[counts > 0].tolist()
        if not per_frame:
            continue
        centres = (~anchors[members]).long().argsort(stable=True)[: sum(per_frame)]
        points = features[members]
        directions = normalize(points.float(), dim=-1)
        likeness = directions @ directions[centres].T
        sources[members] = members[centres][_nearest(likeness, centres)]
        for of_frame, similarity in zip(centres.split(per_frame), likeness.split(per_frame, dim=1), strict=True):
            merged[members[of_frame]] = _merge(points, of_frame, _nearest(similarity, of_frame), anchor_weight)
    return keep, merged, sources


def _nearest(likeness: Tensor, centres: Tensor) -> Tensor:
    """(points, centres) -> (points,) the most similar centre of each point; a centre belongs to itself."""
    nearest = likeness.argmax(-1)
    # A centre that coincides with another centre stays a separate centre.
    nearest[centres] = torch.arange(len(centres), device=nearest.device)
    return nearest


def _merge(points: Tensor, centres: Tensor, joined: Tensor, anchor_weight: float | None) -> Tensor:
    """(centres, dim) merged anchors, with the `anchor_weight` of `merge_into_anchors`."""
    means = merge_clusters(points, centres, joined, None)
    if anchor_weight is None:
        return means
    sizes = (joined[:, None] == torch.arange(len(centres), device=joined.device)).sum(0)
    weight = (1 / (sizes + 1)).clamp_min(anchor_weight)[:, None]
    return (weight * points[centres] + (1 - weight) * means).to(points.dtype)
