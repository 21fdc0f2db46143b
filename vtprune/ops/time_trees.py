# SPDX-License-Identifier: Apache-2.0
"""FlashVID's merge: tokens that stay alike over time form trees, and the roots of a frame are clustered."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require
from vtprune.devices import send
from vtprune.ops.density_peaks import scaled_distances
from vtprune.ops.diversity import order_of_directions
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.selection import first_chosen, top_k_mask

# Number of frames whose tokens are compared at a time. A table of the pairs of a frame is the largest tensor in memory.
_BLOCK_FRAMES = 16


class Trees(NamedTuple):
    """Trees of the tokens of a video; a flat index is ``frame * tokens + token``."""

    child: Tensor
    """``(frames, tokens)`` bool: tokens that went into one of the frame before."""
    parent: Tensor
    """``(frames, tokens)`` long: the token of the frame before that each one is most like."""

    def roots(self) -> Tensor:
        """``(frames, tokens)`` long: flat index of the root of each token's tree."""
        itself = torch.arange(self.child.numel(), device=self.child.device).view(self.child.shape)
        found = [itself[0]]
        for frame in range(1, len(itself)):
            above = found[-1].gather(0, self.parent[frame])
            found.append(torch.where(self.child[frame], above, itself[frame]))
        return torch.stack(found)

    def sums(self, features: Tensor, *, reference_quirks: bool = False) -> tuple[Tensor, Tensor]:
        """Sums of the features of each root's tree, and how many tokens they are of.

        Args:
            features: ``(frames, tokens, dim)``.
            reference_quirks: count the root and its children, but not the children of these.

        Returns:
            ``(frames, tokens, dim)`` float32 and ``(frames, tokens)`` float32; those of roots count.
        """
        totals = features.float().clone()
        sizes = torch.ones_like(self.child, dtype=torch.float32)
        place = torch.arange(self.child.shape[1], device=self.child.device)
        for frame in range(len(totals) - 1, 0, -1):
            # A product and not a scattered sum, whose last bit is random on an accelerator.
            into = ((self.parent[frame] == place.unsqueeze(1)) & self.child[frame]).float()
            totals[frame - 1] += into @ totals[frame]
            sizes[frame - 1] += into.sum(1) if reference_quirks else into @ sizes[frame]
        return totals, sizes


def grow_trees(directions: Tensor, free: Tensor, scene_of: Tensor, least: Tensor, threshold: float) -> Trees:
    """Join tokens to the most similar token of the frame before, within a scene (FlashVID).

    Args:
        directions: ``(frames, tokens, dim)`` unit vectors.
        free: ``(frames, tokens)`` bool; other tokens join none, and none joins them.
        scene_of: ``(frames,)`` long on the CPU, the scene of each frame, numbered from 0 in the order of time.
        least: ``(scenes,)`` long on the CPU: where fewer tokens of a scene would be left, only the most similar ones
            join, so that at least as many are left.
        threshold: a token joins if the cosine is above this.
    """
    frames, tokens, _ = directions.shape
    best = directions.new_full((frames, tokens), -1.0)
    parent = torch.zeros_like(free, dtype=torch.long)
    for first in range(1, frames, _BLOCK_FRAMES):
        now = slice(first, min(first + _BLOCK_FRAMES, frames))
        before = slice(now.start - 1, now.stop - 1)
        cosines = (directions[now] @ directions[before].mT).masked_fill_(~free[before].unsqueeze(1), -torch.inf)
        best[now], parent[now] = cosines.max(2)
    same_scene = torch.zeros_like(scene_of, dtype=torch.bool)
    same_scene[1:] = scene_of[1:] == scene_of[:-1]
    best = best.masked_fill(~(free & send(same_scene, free.device).unsqueeze(1)), -1.0).clamp_min(-1.0)
    limits, lengths = [], scene_of.bincount().tolist()
    for part, count in zip(best.split(lengths), least.tolist(), strict=True):
        joining = max(part.numel() - count, 0)
        if joining == part.numel():
            limits.append(part.new_full((1,), threshold))
            continue
        ranked = part.flatten().sort(descending=True).values
        limit = ranked[joining - 1 : joining].clamp_min(-1 + 1e-6) if joining else ranked.new_full((1,), torch.inf)
        limits.append(torch.where(ranked[joining : joining + 1] > threshold, limit, threshold))
    limit = torch.cat(limits)[send(scene_of, best.device)].unsqueeze(1)
    return Trees(best > limit, parent)


def cluster_frames(
    points: Tensor, valid: Tensor, clusters: Tensor, neighbours: int = 7, *, reference_quirks: bool = False
) -> tuple[Tensor, Tensor]:
    """Cluster the points of each frame around density peaks (:func:`vtprune.ops.density_peaks.density_peaks`).

    Args:
        points: ``(frames, points, dim)``.
        valid: ``(frames, points)`` bool; others are in no cluster.
        clusters: ``(frames,)`` long, number of clusters of each frame, at most that of its valid points.
        neighbours: number of nearest points that density is computed from, the point itself included, at least 1; with
            three clusters or more it is at most the number of clusters.
        reference_quirks: with one and two clusters, too, it is at most the number of clusters.

    Returns:
        centres: ``(frames, points)`` bool.
        joined: ``(frames, points)`` long, the centre of each point's cluster; where there is none, it has no meaning.
    """
    parts = [
        _cluster_block(*block, neighbours, reference_quirks)
        for block in zip(
            points.split(_BLOCK_FRAMES), valid.split(_BLOCK_FRAMES), clusters.split(_BLOCK_FRAMES), strict=True
        )
    ]
    centres, joined = zip(*parts, strict=True)
    return torch.cat(centres), torch.cat(joined)


def _cluster_block(
    points: Tensor, valid: Tensor, clusters: Tensor, neighbours: int, reference_quirks: bool
) -> tuple[Tensor, Tensor]:
    """`cluster_frames` of some frames at once."""
    count = points.shape[1]
    distances = scaled_distances(points.masked_fill(~valid.unsqueeze(2), 0.0))
    distances = distances.masked_fill(~(valid.unsqueeze(1) & valid.unsqueeze(2)), torch.inf)
    limited = clusters > (0 if reference_quirks else 2)
    near = torch.where(limited, clusters.clamp_max(neighbours), neighbours)
    near = torch.minimum(near, valid.sum(1)).clamp_min(1)[:, None, None]
    squares = distances.topk(min(neighbours, count), largest=False).values.square()
    counted = torch.arange(squares.shape[2], device=points.device) < near
    spread = torch.where(counted, squares, 0.0).sum(2) / near.squeeze(2)
    spread = spread.masked_fill(~valid, torch.inf)
    rank = spread.argsort(dim=1, stable=True).argsort(dim=1)
    denser = rank.unsqueeze(1) < rank.unsqueeze(2)
    separation = distances.masked_fill(~denser, torch.inf).amin(2)
    widest = distances.masked_fill(distances.isinf(), 0.0).amax((1, 2)).unsqueeze(1)
    score = torch.where(rank == 0, widest, separation).log() - spread
    centres = top_k_mask(score.masked_fill(~valid, -torch.inf), valid, clusters)
    joined = distances.masked_fill(~centres.unsqueeze(1), torch.inf).argmin(2)
    itself = torch.arange(count, device=points.device).expand_as(joined)
    # A centre that coincides with another centre stays a separate centre.
    return centres, torch.where(centres, itself, joined)


def merge_scenes(
    features: Tensor,
    saliency: Tensor,
    scene_of: Tensor,
    salient: Tensor,
    merged: Tensor,
    *,
    threshold: float = 0.8,
    neighbours: int = 7,
    by_scene: bool = True,
    reference_quirks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep salient and diverse tokens of each frame, and merge the others over time and space (FlashVID).

    Args:
        features: ``(frames, tokens, dim)`` of one video, or of one image.
        saliency: ``(frames, tokens)``, at least 0.
        scene_of: ``(frames,)`` long on the CPU, the scene of each frame, numbered from 0 in the order of time.
        salient: ``(frames,)`` long on the CPU, tokens of each frame that are kept as they are.
        merged: ``(frames,)`` long on the CPU, tokens that the others of each frame become. Their sum over a scene
            counts; the frames of a scene get them in proportion to their roots, and the roots of a frame that gets none
            are dropped.
        threshold: cosine above which a token joins one of the frame before.
        neighbours: as in :func:`cluster_frames`.
        by_scene: weigh tokens by the product with the mean of their scene, too.
        reference_quirks: means over time count direct children only; each frame's number of merged tokens is rounded
            up.

    Returns:
        keep ``(frames, tokens)`` bool; features, merged ones replaced; sources ``(frames, tokens)`` long, the
        flat index of the token that each one went into, -1 for dropped ones.

    Raises:
        VTPruneError: a feature or a saliency is NaN or infinite.
    """
    require(
        features.isfinite().all() & saliency.isfinite().all(),
        "features or saliency hold NaN or infinite values: tokens cannot be merged by them",
    )
    device, (frames, tokens, _) = features.device, features.shape
    directions = normalize(features.float(), dim=2)
    lengths = scene_of.bincount()
    weights = saliency.float()
    if by_scene:
        means = torch.stack([part.float().mean((0, 1)) for part in features.split(lengths.tolist())])
        means = means[send(scene_of, device)]
        weights = weights * (features.float() @ means.unsqueeze(2)).squeeze(2)
    everything = torch.ones_like(weights, dtype=torch.bool)
    order = order_of_directions(directions, everything, int(salient.max()), weights)
    kept = first_chosen(order, everything, salient)
    free = ~kept
    per_scene = torch.zeros_like(lengths).index_add_(0, scene_of, merged)
    least = per_scene + torch.zeros_like(lengths).index_add_(0, scene_of, salient)
    trees = grow_trees(directions, free, scene_of, least, threshold)
    del directions
    totals, sizes = trees.sums(features, reference_quirks=reference_quirks)
    roots = free & ~trees.child

    available, counts = roots.sum(1), []
    for part, count in zip(available.split(lengths.tolist()), per_scene.tolist(), strict=True):
        if reference_quirks:
            share = torch.ceil(part.double() * (count / part.sum().clamp_min(1).double()))
            counts.append(torch.minimum(share.long(), part))
        else:
            counts.append(apportion(count, part.double(), part))
    totals /= sizes.unsqueeze(2)
    centres, joined = cluster_frames(totals, roots, torch.cat(counts), neighbours, reference_quirks=reference_quirks)

    first = torch.arange(frames, device=device).unsqueeze(1) * tokens
    has_centre = roots & centres.any(1, keepdim=True)
    into = torch.where(has_centre, joined + first, -1)
    keep, result = kept | centres, features.clone()
    place = torch.arange(tokens, device=device)
    for frame in range(frames):
        members = ((joined[frame] == place.unsqueeze(1)) & has_centre[frame]).float()
        if not reference_quirks:
            members = members * sizes[frame]
        means = members @ totals[frame] / members.sum(1, keepdim=True).clamp_min(1)
        result[frame] = torch.where(centres[frame].unsqueeze(1), means.to(features.dtype), features[frame])
    itself = torch.arange(frames * tokens, device=device).view(frames, tokens)
    of_roots = torch.where(kept, itself, into).flatten()
    return keep, result, of_roots[trees.roots()]
