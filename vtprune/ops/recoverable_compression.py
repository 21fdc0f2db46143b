# SPDX-License-Identifier: Apache-2.0
"""Recoverable Compression: keep tokens by visual score, recover tokens by text score, merge the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.checks import require
from vtprune.ops.largest_remainder import apportion
from vtprune.ops.merging import Merged
from vtprune.ops.outliers import outlier_share
from vtprune.ops.similarity import similarity_to

# LOF neighbours for the visual scores, the text scores and the visual scores of the rest.
_NEIGHBOURS = (20, 20, 10)


def text_scores(text: Tensor, features: Tensor) -> Tensor:
    """Cosine of each token with the text, divided by the square root of the dimension.

    Args:
        text: ``(..., dim)``.
        features: ``(..., tokens, dim)``, in the same space as the text.

    Returns:
        ``(..., tokens)`` float32.
    """
    return similarity_to(text, features) * text.shape[-1] ** -0.5


def lowered(text: Tensor, chosen: Tensor) -> Tensor:
    """``(tokens,)`` text scores. Those of tokens already chosen, ``(tokens,)`` bool, are set to the lowest score."""
    return text.masked_fill(chosen, text.amin()) if len(text) else text


def main_tokens(visual: Tensor, text: Tensor, by_vision: int | Tensor, by_text: int | Tensor) -> Tensor:
    """Mark the ``by_vision`` best tokens by visual score, and of the others the ``by_text`` best by text score.

    Args:
        visual, text: ``(tokens,)``; of equal scores the lower index is taken.
        by_vision, by_text: at least 0; numbers, or ``()`` long.

    Returns:
        ``(tokens,)`` bool.
    """
    keep = _ranks(visual) < by_vision
    return keep | (_ranks(text.masked_fill(keep, -torch.inf)) < by_text)


def dynamic_counts(
    visual: Tensor, text: Tensor, dim: int, *, outlier_factor: float = 1.5, reference_quirks: bool = False
) -> Tensor:
    """How many tokens to keep by visual score, to recover by text score, and to use as centres for the rest.

    Each count is the share of scores that are outliers, times the number of tokens that are not yet chosen, rounded
    down.

    Args:
        visual, text: ``(tokens,)`` scores.
        dim: width of the encoder; used only with ``reference_quirks``.
        outlier_factor: local outlier factor above which a score is an outlier.
        reference_quirks: as the reference does, take the third count as a share of ``dim`` and not of the remaining
            tokens, and round the floating-point products down without a correction.

    Returns:
        ``(3,)`` long.

    Raises:
        VTPruneError: a score is NaN or infinite.
    """
    finite = visual.isfinite().all() & text.isfinite().all()
    require(finite, "scores hold NaN or infinite values: they cannot be ranked")
    for_vision, for_text, for_rest = _NEIGHBOURS
    # A share of a number, times that number, can be slightly below a whole number.
    slack = 0.0 if reference_quirks else 1e-9
    tokens = len(visual)
    by_vision = (tokens * outlier_share(visual, for_vision, outlier_factor) + slack).long()
    seen = main_tokens(visual, text, by_vision, 0)
    of_others = outlier_share(lowered(text, seen), for_text, outlier_factor)
    by_text = ((tokens - by_vision) * of_others + slack).long()
    rest = ~main_tokens(visual, text, by_vision, by_text)
    of = dim if reference_quirks else rest.sum()
    centres = (of * outlier_share(visual, for_rest, outlier_factor, rest) + slack).long()
    return torch.stack((by_vision, by_text, centres))


def gather_rest(
    features: Tensor,
    keys: Tensor,
    visual: Tensor,
    text: Tensor,
    keep: Tensor,
    kept: int,
    centres: int,
    *,
    remainder: bool,
    members: int = 32,
    text_weight: float = 50.0,
    reference_quirks: bool = False,
) -> Merged:
    """Merge the tokens that are not kept, the rest, into the best of them, the centres, and one more token.

    Each centre takes in the ``members`` other tokens of the rest with the highest cosine of keys plus
    ``text_weight * text``: their features are weighted with their visual scores and added to its own. Several centres
    may take in the same token. The one more token, the remainder, is the sum of all tokens of the rest that are not
    centres, with the same weights. The weights are the scores themselves, which are not normalised.

    Args:
        features: ``(tokens, dim)``.
        keys: ``(tokens, key_dim)``.
        visual, text: ``(tokens,)`` scores.
        keep: ``(tokens,)`` bool.
        kept: how many tokens are kept.
        centres: number of centres: the best tokens of the rest by visual score. A larger number than the rest means
            all of them.
        remainder: whether to add the remainder; there is none if all tokens of the rest are centres. It takes the place
            of its best token.
        members: number of tokens that a centre takes in, at least 0.
        text_weight: weight of the text score against the cosine of keys.
        reference_quirks: as the reference does, compare the keys of the first tokens of the image instead of the keys
            of the rest.

    Returns:
        One group: kept tokens in order, centres by falling score, the remainder. The source of a token of the rest is
        the best centre that took it in, otherwise the remainder, otherwise -1.
    """
    stays, rest = (~keep).long().argsort(stable=True).tensor_split([kept])
    visual, text = visual.float(), text.float()
    weights = visual[rest]
    values = features[rest].float()
    centre = _best(weights, centres)
    directions = torch.nn.functional.normalize(
        (keys[: len(rest)] if reference_quirks else keys[rest]).float(), dim=-1, eps=1e-8
    )
    affinity = directions[centre] @ directions.T + text_weight * text[rest]
    affinity.scatter_(1, centre.unsqueeze(1), -torch.inf)
    taken = affinity.argsort(dim=1, descending=True, stable=True)[:, : min(members, max(len(rest) - 1, 0))]
    shares = torch.zeros_like(affinity).scatter_(1, taken, weights[taken])
    gathered = values[centre] + shares @ values

    # The number of the best centre that took each token in; the number after the last centre means none.
    ranks = torch.arange(len(centre) + 1, device=keep.device)
    first = torch.full_like(rest, len(centre))
    first.scatter_reduce_(0, taken.flatten(), ranks[:-1].repeat_interleave(taken.shape[1]), "amin")
    first[centre] = ranks[:-1]
    into = torch.cat((centre, centre.new_full((1,), -1)))[first]
    is_centre = torch.zeros_like(keep[rest]).index_fill_(0, centre, True)
    parts, places = [features[stays].float(), gathered], [stays, rest[centre]]
    if remainder and len(centre) < len(rest):
        others = weights.masked_fill(is_centre, 0.0)
        stand_in = weights.masked_fill(is_centre, -torch.inf).argmax(0, keepdim=True)
        into = torch.where(into < 0, stand_in, into).scatter(0, stand_in, stand_in)
        parts.append((others @ values).unsqueeze(0))
        places.append(rest[stand_in])
    sources = torch.arange(len(keep), device=keep.device)
    sources[rest] = torch.where(into >= 0, rest[into], -1)
    return Merged(torch.cat(parts)[None].to(features.dtype), torch.cat(places)[None], sources[None])


def counts_within(
    visual: Tensor,
    text: Tensor,
    dim: int,
    k: int | None,
    *,
    outlier_factor: float = 1.5,
    reference_quirks: bool = False,
) -> Tensor:
    """The counts of :func:`dynamic_counts`, scaled in proportion to a budget, which the reference does not have.

    Args:
        visual, text, dim, outlier_factor, reference_quirks: as in :func:`dynamic_counts`.
        k: exact number of tokens to leave, or all tokens if there are fewer. None: the scores decide, and may leave no
            token.

    Returns:
        ``(4,)`` long: tokens kept by visual score, tokens recovered by text score, centres, and 1 if there is a
        remainder, which there is if there are centres, otherwise 0.
    """
    counts = dynamic_counts(visual, text, dim, outlier_factor=outlier_factor, reference_quirks=reference_quirks)
    remainder = (counts[2:] > 0).long()
    if k is None:
        return torch.cat((counts, remainder))
    if k >= len(visual):
        return torch.cat((counts.new_full((1,), len(visual)), counts.new_zeros(3)))
    none = (counts == 0).all().long()[None]
    weights = counts + torch.cat((none, torch.zeros_like(none), remainder))
    shares = apportion(k, weights, torch.full_like(counts, len(visual)))
    gathered = shares[2:]
    return torch.cat((shares[:2], (gathered - 1).clamp_min(0), gathered.clamp_max(1)))


def recover(
    features: Tensor,
    keys: Tensor,
    visual: Tensor,
    text: Tensor,
    counts: Sequence[int],
    *,
    members: int = 32,
    text_weight: float = 50.0,
    reference_quirks: bool = False,
) -> Merged:
    """Recoverable Compression of one image (arXiv 2409.01179).

    Deviation: if fewer than ``members`` tokens are left, a centre takes in all of them; the reference fails.

    Args:
        features: ``(tokens, dim)``.
        keys: ``(tokens, key_dim)``, keys of the encoder's last layer, heads side by side.
        visual: ``(tokens,)``, attention of CLS to the tokens in that layer.
        text: ``(tokens,)``, the result of :func:`text_scores`.
        counts: the four numbers of :func:`counts_within`.
        members, text_weight: as in :func:`gather_rest`.
        reference_quirks: repeat the defect of :func:`gather_rest`.

    Returns:
        One group, in the order of the reference: tokens kept, centres, remainder.
    """
    by_vision, by_text, centres, remainder = counts
    return gather_rest(
        features,
        keys,
        visual,
        text,
        main_tokens(visual, text, by_vision, by_text),
        by_vision + by_text,
        centres,
        remainder=bool(remainder),
        members=members,
        text_weight=text_weight,
        reference_quirks=reference_quirks,
    )


def _best(scores: Tensor, k: int) -> Tensor:
    """``(min(k, tokens),)`` long, indices of the highest scores, in falling order."""
    return scores.argsort(descending=True, stable=True)[:k]


def _ranks(scores: Tensor) -> Tensor:
    """``(tokens,)`` long, the rank of each score, 0 for the highest; of equal scores the lower index comes first."""
    return scores.argsort(descending=True, stable=True).argsort()
