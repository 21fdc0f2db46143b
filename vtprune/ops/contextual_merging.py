# SPDX-License-Identifier: Apache-2.0
"""VisionZip's merge: the tokens that are not salient go into contextual tokens at an even stride."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.devices import send
from vtprune.ops.density_peaks import merge_clusters


def merge_contextual(
    features: Tensor,
    keys: Tensor,
    salient: Tensor,
    valid: Tensor,
    counts: Tensor,
    *,
    reference_quirks: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the tokens that are not salient into a few of them, the centres (VisionZip, arXiv 2412.04467).

    Of the ``n`` tokens that are not salient, every ``n // count``-th is a centre, starting with the first, until there
    are ``count`` centres. Each other token joins the centre with the most similar key (cosine), the first of equals. A
    centre becomes the mean of itself and the tokens that joined it. A zero key has similarity 0 to all keys and joins
    the first centre.

    Args:
        features: ``(groups, tokens, dim)``.
        keys: ``(groups, tokens, key_dim)``.
        salient: ``(groups, tokens)`` bool, tokens that stay as they are.
        valid: ``(groups, tokens)`` bool.
        counts: ``(groups,)`` long, on the CPU, number of centres of each group, at least 0. A group never has more
            centres than tokens that are not salient. In a group without centres these tokens are dropped.
        reference_quirks: a centre becomes itself plus the mean of the tokens that joined it, which is about twice as
            long.

    Returns:
        keep: ``(groups, tokens)`` bool, salient tokens and centres.
        features: ``(groups, tokens, dim)``; the features of centres are replaced.
        sources: ``(groups, tokens)`` long, the kept token that each token went into; -1 for dropped tokens and padding.
    """
    rest = valid & ~salient
    others = rest.sum(1)
    most = min(int(counts.max()), rest.shape[1]) if len(counts) else 0
    counts = torch.minimum(send(counts, others.device), others)
    step = (others // counts.clamp_min(1)).clamp_min(1)[:, None]
    rank = rest.cumsum(1) - 1
    centre = rest & (rank % step == 0) & (rank // step < counts[:, None])
    keep = (valid & salient) | centre
    sources = torch.arange(keep.shape[1], device=keep.device).expand_as(keep).masked_fill(~keep, -1)
    if most == 0:
        return keep, features, sources

    places = centre.logical_not().byte().argsort(dim=1, stable=True)[:, :most]
    present = torch.arange(most, device=keep.device) < counts[:, None]
    directions = normalize(keys.float(), dim=-1)
    of_centres = directions.gather(1, places[..., None].expand(-1, -1, directions.shape[-1]))
    likeness = (directions @ of_centres.mT).masked_fill(~present[:, None], -torch.inf)
    # A centre that coincides with another centre stays a separate centre.
    joined = torch.where(centre, centre.cumsum(1) - 1, likeness.argmax(-1))
    joined = joined.masked_fill(~rest | (counts == 0)[:, None], -1)
    merged = merge_clusters(features, places, joined, 0.5 if reference_quirks else None)
    if reference_quirks:
        sizes = torch.zeros_like(places).scatter_add_(1, joined.clamp_min(0), (joined >= 0).long())
        merged = torch.where(sizes[..., None] > 1, 2 * merged, merged)
    at = places[..., None].expand_as(merged)
    features = features.scatter(1, at, torch.where(present[..., None], merged, features.gather(1, at)))
    return keep, features, torch.where(joined >= 0, places.gather(1, joined.clamp_min(0)), sources)
