# SPDX-License-Identifier: Apache-2.0
"""HoliTom's merge before the LLM: still positions have one token a segment, moving positions one a frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.checks import require
from vtprune.devices import send
from vtprune.ops.density_peaks import density_peaks, merge_clusters
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.segmentation import segment_frames, still_positions, temporal_similarity
from vtprune.ops.selection import top_k_mask

STATIC, SALIENT, CONTEXT = range(3)

# Number of frames whose tokens are clustered at a time. The distances within a frame are the largest tensors in memory.
_BLOCK_FRAMES = 64


class MergedVideo(NamedTuple):
    """The result for ``frames x positions`` tokens. A flat index is ``frame * positions + position``."""

    part: Tensor
    """``(frames, positions)`` long: -1 for tokens that are not kept, otherwise the kind of the kept token. STATIC: the
    centre of static positions, placed in the first frame of its segment. SALIENT: an unchanged dynamic token. CONTEXT:
    the centre of dynamic tokens of its frame."""
    features: Tensor
    """``(frames, positions, dim)``; those of STATIC and CONTEXT tokens are merged."""
    sources: Tensor
    """``(frames, positions)`` long: flat index of the kept token that each token went into, -1 for dropped tokens."""
    segments: Tensor
    """``(segments, 2)`` long on the CPU, first and last frame of each segment."""

    @property
    def keep(self) -> Tensor:
        """``(frames, positions)`` bool."""
        return self.part >= 0


def merge_video(
    features: Tensor,
    saliency: Tensor,
    keep_ratio: float,
    *,
    threshold: float = 0.8,
    max_window: int = 1024,
    context_share: float = 0.0,
    neighbours: int = 7,
    centre_weight: float | None = 0.6,
    reference_quirks: bool = False,
) -> MergedVideo:
    """Merge and select the visual tokens of one video (HoliTom, arXiv 2505.21334, before the LLM).

    The video is cut into segments in which many positions are still (:func:`segment_frames`). The still positions of a
    segment are averaged over time and clustered. All other tokens are dynamic, and the most salient ones of each frame
    are kept. Still and dynamic tokens of all segments keep the same share of their tokens. An accelerator is waited for
    once, for which positions are still; with one frame it is not.

    Args:
        features: ``(frames, positions, dim)``, at least one frame.
        saliency: ``(frames, positions)``, attention that a token receives in the encoder; higher values are kept.
        keep_ratio: number of tokens to keep over the number of all tokens of the video, in [0, 1]. Merging still
            positions over time always removes tokens, so fewer tokens are kept if fewer are left.
        threshold: a position is still from one frame to the next if the cosine is above this.
        max_window: largest number of frames in a segment, at least 1.
        context_share: share of a frame's kept dynamic tokens that are cluster centres of less salient tokens, in
            [0, 1]. The reference fails for any value but 0.
        neighbours: as in :func:`density_peaks`.
        centre_weight: as in :func:`merge_clusters`.
        reference_quirks: round the share of each part separately, up for dynamic tokens and to the nearest number for
            still ones, which may miss the ratio widely; and count neighbours as the reference does. By default exactly
            ``round(keep_ratio * tokens)`` tokens are kept if there are as many, and each part differs from its share by
            less than one token.

    Raises:
        VTPruneError: a feature or a saliency is NaN or infinite.
    """
    require(saliency.isfinite().all(), "saliency holds NaN or infinite values: tokens cannot be ranked by it")
    device = features.device
    likeness = temporal_similarity(features)
    still = (likeness > threshold).cpu() if len(likeness) else torch.empty(likeness.shape, dtype=torch.bool)
    segments, saved = segment_frames(still, max_window)
    static = still_positions(still, segments)
    segment_of = torch.arange(len(segments)).repeat_interleave(segments[:, 1] - segments[:, 0] + 1)
    dynamic = ~static[segment_of]
    static_sizes, dynamic_sizes = static.sum(1), dynamic.sum(1)
    if reference_quirks:
        share = effective_ratio(keep_ratio, saliency.numel(), saved)
        static_counts = (static_sizes.double() * share).round().long()
        dynamic_counts = (dynamic_sizes.double() * share).ceil().long()
    else:
        k = min(round(keep_ratio * saliency.numel()), saliency.numel() - saved)
        static_counts, dynamic_counts = _exact_counts(static_sizes, dynamic_sizes, segment_of, k)
    salient_counts = (dynamic_counts.double() * (1 - context_share)).round().long()
    dynamic = send(dynamic, device)
    salient = top_k_mask(saliency, dynamic, salient_counts)

    part = torch.full(saliency.shape, -1, device=device).masked_fill_(salient, SALIENT)
    numbers = torch.arange(saliency.numel(), device=device).view_as(part)
    merged = features.clone(memory_format=torch.contiguous_format)
    video = MergedVideo(part, merged, numbers.masked_fill(~salient, -1), segments)
    clustering = (neighbours, reference_quirks, centre_weight)
    for (first, last), positions, count in zip(segments.tolist(), static, static_counts.tolist(), strict=True):
        if count:
            positions = send(positions.nonzero()[:, 0], device)
            means = features[first : last + 1].mean(0, dtype=torch.float)[positions]
            at = positions + first * part.shape[1]
            into = _put_clusters(video, means[None], at[None], count, STATIC, *clustering)[0]
            video.sources[first : last + 1, positions] = into
    others, context_counts = dynamic & ~salient, dynamic_counts - salient_counts
    # Frames with the same numbers of tokens and clusters are clustered together.
    kinds, kind = torch.stack((dynamic_sizes - salient_counts, context_counts), dim=1).unique(
        dim=0, return_inverse=True
    )
    for number, (tokens, count) in enumerate(kinds.tolist()):
        for frames in send((kind == number).nonzero()[:, 0], device).split(_BLOCK_FRAMES) if count else ():
            at = numbers[frames].gather(1, (~others[frames]).long().argsort(dim=1, stable=True)[:, :tokens])
            points = features[at // numbers.shape[1], at % numbers.shape[1]]
            video.sources.view(-1)[at] = _put_clusters(video, points, at, count, CONTEXT, *clustering)
    return video


def effective_ratio(keep_ratio: float, tokens: int, saved: int) -> float:
    """Share to keep of the tokens left by merging over time, so that ``keep_ratio`` of all are kept; at most 1."""
    return min(keep_ratio / ((tokens - saved) / tokens), 1.0)


def _exact_counts(static: Tensor, dynamic: Tensor, segment_of: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Divide ``k`` among the static tokens of each segment and the dynamic tokens of each frame, in order of time."""
    frames, segments = torch.arange(len(dynamic)), torch.arange(len(static))
    frame_slots = frames + segment_of + 1
    # The static tokens of a segment come before the dynamic tokens of its first frame.
    static_slots = segments + torch.searchsorted(segment_of, segments)
    sizes = torch.empty(len(frames) + len(segments), dtype=torch.long)
    sizes[frame_slots], sizes[static_slots] = dynamic, static
    counts = share_out(sizes, k)
    return counts[static_slots], counts[frame_slots]


def _put_clusters(
    video: MergedVideo,
    points: Tensor,
    at: Tensor,
    count: int,
    part: int,
    neighbours: int,
    reference_quirks: bool,
    centre_weight: float | None,
) -> Tensor:
    """Cluster points and put the merged centres into the video.

    Args:
        points: ``(groups, n, dim)``.
        at: ``(groups, n)`` long, flat index of each point.
        count: number of clusters of each group.
        part: the kind of the centres, STATIC or CONTEXT.
        neighbours, reference_quirks, centre_weight: as in :func:`merge_video`.

    Returns:
        ``(groups, n)`` long, for each point the flat index of its centre.
    """
    centres, assigned = density_peaks(points, count, neighbours, reference_quirks=reference_quirks)
    merged = merge_clusters(points, centres, assigned, centre_weight)
    places = at.gather(1, centres)
    video.part.view(-1)[places] = part
    video.features.flatten(0, 1)[places] = merged.to(video.features.dtype)
    return places.gather(1, assigned)
