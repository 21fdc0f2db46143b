# SPDX-License-Identifier: Apache-2.0
"""One vocabulary for "how many tokens": counts before the LLM, schedules inside it, and the floor of a schedule.

`keep_ratio` is the share of visual tokens kept, averaged over the LLM's layers; `keep_tokens` is the same as a count
per crop (an image, a tile or a frame). A method before the LLM keeps that share of each group. A progressive method
holds everything up to its first cut, so it scales its schedule until the *average* over the layers meets the budget.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtprune.errors import BudgetError


def group_counts(lengths: Tensor, images: Tensor, keep_ratio: float | None, keep_tokens: int | None) -> Tensor:
    """How many tokens of each group to keep before the LLM.

    lengths, images: (groups,) long, the tokens of each group and the image it is of. Returns (groups,) long. A ratio
    keeps at least one token of every group; a count keeps exactly that many, or all of a smaller crop of an image that
    has a larger one (tiles at the border may hold just a strip). Raises BudgetError if a count exceeds every crop of
    an image.
    """
    if keep_ratio is not None:
        return torch.tensor([max(1, round(keep_ratio * n)) if n else 0 for n in lengths.tolist()], dtype=torch.long)
    lengths, images = lengths.cpu(), images.cpu()
    if len(lengths):
        largest = lengths.new_zeros(int(images.max()) + 1).scatter_reduce(0, images, lengths, "amax")[images]
        smallest = int(largest.min())
        if keep_tokens > smallest:
            raise BudgetError(f"keep_tokens={keep_tokens} is larger than the image: it has {smallest} visual tokens")
    return lengths.clamp(max=keep_tokens)


def rescale_layers(layers: Sequence[int], published_depth: int, depth: int) -> tuple[int, ...]:
    """Layer indices published for a model of `published_depth` layers, moved to one of `depth` layers.

    Each goes to the nearest layer at the same relative depth; where two meet, the earlier one moves down, so that they
    stay distinct and inside 1..depth-1 (a cut needs a layer before it).
    """
    if depth - 1 < len(layers):
        raise BudgetError(f"{len(layers)} pruning layers do not fit into a model of {depth} layers")
    moved = [round(layer * depth / published_depth) for layer in layers]
    limit = depth
    for i in reversed(range(len(moved))):
        limit = moved[i] = max(min(moved[i], limit - 1), i + 1)
    return tuple(moved)


def schedule_ratio(cuts: Sequence[int], shares: Sequence[float], depth: int) -> float:
    """Layer-averaged keep ratio of a schedule: everything before `cuts[0]`, then `shares[j]` from `cuts[j]` on."""
    ends = [*cuts[1:], depth]
    spent = cuts[0] + sum((end - cut) * share for cut, end, share in zip(cuts, ends, shares, strict=True))
    return spent / depth


def check_floor(name: str, cuts: Sequence[int], depth: int, keep_ratio: float) -> None:
    """Raise BudgetError if no schedule with these cuts can go as low as `keep_ratio`."""
    floor = cuts[0] / depth
    if keep_ratio < floor - 1e-9:
        raise BudgetError(
            f"{name} keeps all visual tokens up to layer {cuts[0]} of {depth}, so its keep ratio cannot go under "
            f"{floor:.1%}; {keep_ratio:.1%} was asked for. Choose earlier layers, or compose it with a method before "
            f"the LLM: [{{'name': 'mmtok', 'keep_ratio': 0.25}}, '{name}']",
            floor=floor,
        )


def schedule_budget(keep_ratio: float | None, keep_tokens: int | None, entering: int, crops: int) -> float:
    """The keep ratio that a budget asks of one sample with visual tokens, `keep_tokens` counting per crop.

    Raises BudgetError if a count is larger than the sample's crops.
    """
    if keep_ratio is not None:
        return keep_ratio
    if keep_tokens * crops > entering:
        raise BudgetError(f"keep_tokens={keep_tokens} is larger than the image: {entering} tokens in {crops} crop(s)")
    return keep_tokens * crops / entering


def schedule_counts(
    name: str, cuts: Sequence[int], shares: Sequence[float], depth: int, entering: int, keep_ratio: float
) -> list[int]:
    """Token counts after each cut, for one sample, whose average over the layers is `keep_ratio * entering`.

    The schedule's shares are scaled down together, or moved towards 1 together, until they meet the ratio; the last
    count absorbs the rounding. Raises BudgetError under the floor.
    """
    check_floor(name, cuts, depth, keep_ratio)
    published = schedule_ratio(cuts, shares, depth)
    floor = cuts[0] / depth
    if keep_ratio <= published:
        scale = (keep_ratio - floor) / (published - floor) if published > floor else 0.0
        scaled = [scale * share for share in shares]
    else:
        scale = (1 - keep_ratio) / (1 - published)
        scaled = [1 - scale * (1 - share) for share in shares]
    counts = [round(entering * share) for share in scaled[:-1]]
    ranges = zip([0, *cuts[:-1]], cuts, [entering, *counts], strict=True)
    remaining = keep_ratio * entering * depth - sum((end - start) * count for start, end, count in ranges)
    alive = counts[-1] if counts else entering
    return [*counts, min(max(round(remaining / (depth - cuts[-1])), 0), alive)]
