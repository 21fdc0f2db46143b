# SPDX-License-Identifier: Apache-2.0
"""Compressing a whole video: what stands still is represented once a segment, what moves once a frame."""

from typing import NamedTuple

import torch
from torch import Tensor

from vtprune.errors import VTPruneError
from vtprune.ops.density_peaks import density_peaks, merge_clusters
from vtprune.ops.largest_remainder import share_out
from vtprune.ops.segmentation import segment_frames, still_positions, temporal_similarity
from vtprune.ops.selection import top_k_mask

STATIC, SALIENT, CONTEXT = range(3)

# Frames whose tokens are clustered at a time: the distances of a frame are the largest thing in memory.
_BLOCK_FRAMES = 64


class MergedVideo(NamedTuple):
    """What became of ``frames x positions`` tokens. Flat indices run through a frame's positions first."""

    part: Tensor
    """``(frames, positions)`` long: -1 for tokens that went, otherwise what the kept one is: STATIC, the centre of
    static positions, standing in the first frame of its segment; SALIENT, a dynamic token as it was; CONTEXT, the
    centre of dynamic tokens of its frame."""
    features: Tensor
    """``(frames, positions, dim)``, those of STATIC and CONTEXT tokens being merged ones."""
    sources: Tensor
    """``(frames, positions)`` long: flat index of the kept token that each went into, -1 for dropped ones."""
    segments: Tensor
    """``(segments, 2)`` long, first and last frame of each."""

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

    The video is cut into segments in which many positions are still (:func:`segment_frames`). A segment's still
    positions are averaged over time and clustered; all others are dynamic, and the most salient of each frame are
    kept. Both parts of all segments keep the same share of their tokens.

    Args:
        features: ``(frames, positions, dim)``, at least one frame.
        saliency: ``(frames, positions)``, higher is kept: attention that a token receives in the encoder.
        keep_ratio: tokens to keep over all tokens of the video, in [0, 1]. Static tokens merged over time are gone
            in any case, so fewer are kept if fewer are left.
        threshold: a position is still from one frame to the next if the cosine is above this.
        max_window: frames in a segment, at least 1.
        context_share: share of a frame's kept dynamic tokens that are cluster centres of those less salient, in
            [0, 1]. The reference fails on any but 0.
        neighbours: of :func:`density_peaks`.
        centre_weight: of :func:`merge_clusters`.
        reference_quirks: round each part's share by itself, up for dynamic tokens and to the nearest number for static
            ones, which may miss the ratio widely, and count neighbours as the reference does. By default exactly
            ``round(keep_ratio * tokens)`` are kept if there are as many, and parts differ from their share by
            less than one token.

    Raises:
        VTPruneError: a feature or a saliency is NaN or infinite.
    """
    if not saliency.isfinite().all():
        raise VTPruneError("saliency holds NaN or infinite values: no token can be called the most salient")
    still = temporal_similarity(features) > threshold
    segments, saved = segment_frames(still, max_window)
    static = still_positions(still, segments)
    segment_of = torch.arange(len(segments)).repeat_interleave(segments[:, 1] - segments[:, 0] + 1)
    dynamic = ~static[segment_of.to(static.device)]
    static_sizes, dynamic_sizes = static.sum(1).cpu(), dynamic.sum(1).cpu()
    if reference_quirks:
        share = effective_ratio(keep_ratio, saliency.numel(), saved)
        static_counts = (static_sizes.double() * share).round().long()
        dynamic_counts = (dynamic_sizes.double() * share).ceil().long()
    else:
        k = min(round(keep_ratio * saliency.numel()), saliency.numel() - saved)
        static_counts, dynamic_counts = _exact_counts(static_sizes, dynamic_sizes, segment_of, k)
    salient_counts = (dynamic_counts.double() * (1 - context_share)).round().long()
    salient = top_k_mask(saliency, dynamic, salient_counts)

    part = torch.full(saliency.shape, -1, device=features.device).masked_fill_(salient, SALIENT)
    own = torch.arange(saliency.numel(), device=features.device).view_as(part)
    merged = features.clone(memory_format=torch.contiguous_format)
    video = MergedVideo(part, merged, own.masked_fill(~salient, -1), segments)
    clustering = (neighbours, reference_quirks, centre_weight)
    for (first, last), positions, count in zip(segments.tolist(), static, static_counts.tolist(), strict=True):
        if count:
            means = features[first : last + 1].mean(0, dtype=torch.float)[positions]
            at = positions.nonzero()[:, 0] + first * part.shape[1]
            into = _put_clusters(video, means[None], at[None], count, STATIC, *clustering)[0]
            video.sources[first : last + 1, positions] = into
    left, context_counts = dynamic & ~salient, dynamic_counts - salient_counts
    # Frames of equally many tokens and clusters are clustered together.
    kinds = torch.stack((left.sum(1).cpu(), context_counts), dim=1)[context_counts > 0].unique(dim=0)
    for tokens, count in kinds.tolist():
        alike = (left.sum(1).cpu() == tokens) & (context_counts == count)
        for frames in alike.nonzero()[:, 0].to(features.device).split(_BLOCK_FRAMES):
            at = own[frames][left[frames]].view(len(frames), tokens)
            points = features[at // own.shape[1], at % own.shape[1]]
            video.sources.view(-1)[at] = _put_clusters(video, points, at, count, CONTEXT, *clustering)
    return video


def effective_ratio(keep_ratio: float, tokens: int, saved: int) -> float:
    """Share of the tokens left by merging over time that makes up ``keep_ratio`` of all; at most 1."""
    return min(keep_ratio / ((tokens - saved) / tokens), 1.0)


def _exact_counts(static: Tensor, dynamic: Tensor, segment_of: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``k`` divided among the static tokens of each segment and the dynamic ones of each frame, in order of time."""
    frames, segments = torch.arange(len(dynamic)), torch.arange(len(static))
    frame_slots = frames + segment_of + 1
    # A segment's static tokens come before its first frame.
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
    """Cluster points and put the merged centres into the video; returns for each point where its centre stands.

    points: (groups, n, dim); at, and what is returned: (groups, n) long flat indices.
    """
    centres, assigned = density_peaks(points, count, neighbours, reference_quirks=reference_quirks)
    merged = merge_clusters(points, centres, assigned, centre_weight)
    places = at.gather(1, centres)
    video.part.view(-1)[places] = part
    video.features.flatten(0, 1)[places] = merged.to(video.features.dtype)
    return places.gather(1, assigned)
