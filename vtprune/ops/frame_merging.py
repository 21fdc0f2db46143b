# SPDX-License-Identifier: Apache-2.0
"""B-VLLM's merge of similar frames of a video."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.devices import send
from vtprune.ops.merging import Merged


def frame_similarity(metric: Tensor) -> Tensor:
    """Cosine similarity of every frame to each earlier frame, scaled to [0, 1].

    Args:
        metric: ``(frames, dim)``.

    Returns:
        ``(frames, frames)`` float32, ``(cos + 1) / 2`` below the diagonal, 0 on and above it.
    """
    directions = normalize(metric.float(), dim=-1, eps=1e-8)
    return ((directions @ directions.T + 1) / 2).tril(-1)


def similar_frames(similarity: Tensor, threshold: float = 0.75, *, reference_quirks: bool = False) -> Tensor:
    """Find the most similar earlier frame of each frame, if it is similar enough (B-VLLM, arXiv 2412.09919).

    The first frame always stays. ``threshold`` is compared with ``(cos + 1) / 2``, so 0.75 means a cosine of 0.5. It
    was published for distributions over frames, which a trained selector gives. For frame features it has to be tuned.

    Deviation: a frame may only go into a frame that stays. In the reference it goes into the most similar earlier frame
    in any case, and is lost if that frame is merged itself. Where no frame is lost, both give the same result.

    Args:
        similarity: ``(frames, frames)`` as :func:`frame_similarity` gives it, at least one frame; on the CPU, as one
            frame is handled after another.
        threshold: frames with a similarity above it merge, in [0, 1].
        reference_quirks: merge as the reference does. It loses frames that go into merged frames.

    Returns:
        ``(frames,)`` long: the frame that each goes into, its own number if it stays, -1 if it is lost.
    """
    frames = torch.arange(len(similarity))
    similarity = similarity.masked_fill(frames >= frames.unsqueeze(1), -torch.inf)
    if not reference_quirks:
        # One pass over time: only a frame that stays may receive later frames.
        for frame in range(1, len(frames)):
            similarity[:, frame].masked_fill_(similarity[frame].amax() > threshold, -torch.inf)
    best = similarity.max(dim=1)
    merges = best.values > threshold
    sources = torch.where(merges, best.indices, frames)
    # Frames that went into a frame which is merged itself are lost.
    return sources.masked_fill(merges[sources], -1)


def merge_frames(features: Tensor, sources: Tensor) -> Merged:
    """Merge frames that go into other frames (B-VLLM).

    A frame that stays keeps its place in time and becomes the plain mean of itself and the frames that went into it,
    token by token.

    B-VLLM's merge within a frame is :func:`~vtprune.ops.bipartite_merging.bipartite_merging`. The two differ in one
    case: the reference merges an odd number of tokens to half of it, rounded down, in one round.

    Args:
        features: ``(frames, tokens, dim)``.
        sources: ``(frames,)`` long, as :func:`similar_frames` gives it, on the CPU.

    Returns:
        One group whose tokens are frames. Its features are ``(1, frames left, tokens, dim)`` in their dtype. ``places``
        and ``sources`` are frame numbers on the CPU; the source of a lost frame is -1.
    """
    places = (sources == torch.arange(len(sources))).nonzero()[:, 0]
    members = sources == places.unsqueeze(1)
    shares = send(members / members.sum(1, keepdim=True), features.device)
    # A product and not a scattered sum: on an accelerator the order of a scattered sum, and so its last bit, is random.
    means = (shares @ features.float().flatten(1)).unflatten(1, features.shape[1:]).to(features.dtype)
    return Merged(means[None], places[None], sources[None])
