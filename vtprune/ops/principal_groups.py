# SPDX-License-Identifier: Apache-2.0
"""PruneSID's groups: every token belongs to the principal component that it weighs most in."""

import torch
from torch import Tensor

from vtprune.checks import require
from vtprune.devices import send

# The search for the leading components is a subspace iteration from a fixed start: so many steps, with so many vectors
# more than are asked for. It only needs products with the features.
_STEPS = 8
_MORE = 8
# A component whose square is below this share of the strongest one's is a rounding error.
_LEAST = 1e-5


def loadings(features: Tensor, lengths: Tensor, components: Tensor) -> Tensor:
    """How much each token weighs in each of the leading principal components (PruneSID, arXiv 2603.09480).

    Tokens are the variables and channels the observations: components are right singular vectors of the (dim, tokens)
    matrix of the sigmoid of the features, less each token's mean over channels. The reference draws its start at random
    and stops after two steps, so that its components differ from run to run; here the start is fixed, and the number of
    steps is larger. Groups do not depend on each other. Memory is that of the features.

    Args:
        features: ``(groups, tokens, dim)``, with padding at the end.
        lengths: ``(groups,)`` long on the CPU, number of valid tokens.
        components: ``(groups,)`` long on the CPU, at least 1; beyond ``min(length, dim)`` a group has none,
            and what is no more than a rounding error is none either.

    Returns:
        ``(groups, tokens, most components)`` float32, at least 0, the strongest component first; 0 for padding, and for
        components that a group does not have.

    Raises:
        VTPruneError: a feature of a valid token is NaN or infinite.
    """
    groups, tokens, dim = features.shape
    wanted = torch.minimum(components, lengths.clamp(max=dim)).tolist()
    found = features.new_zeros(groups, tokens, max(1, *wanted), dtype=torch.float32)
    alike: dict[tuple[int, int], list[int]] = {}
    for group, key in enumerate(zip(lengths.tolist(), wanted, strict=True)):
        alike.setdefault(key, []).append(group)
    for (length, count), members in alike.items():
        if count:
            index = send(torch.tensor(members), features.device)
            weights = _loadings(features[index, :length].float(), count)
            found[index, :length, :count] = weights
    return found


def _loadings(values: Tensor, components: int) -> Tensor:
    """`loadings` of ``(groups, tokens, dim)`` without padding."""
    require(values.isfinite().all(), "features hold NaN or infinite values: components are not defined on them")
    values = values.sigmoid()
    values = values - values.mean(2, keepdim=True)
    groups, tokens, dim = values.shape
    side = min(tokens, dim)
    vectors = min(2 * components + _MORE, side)
    start = torch.randn(side, vectors, generator=torch.Generator().manual_seed(0))
    basis = send(start, values.device).expand(groups, -1, -1)
    if tokens <= dim:
        products = values @ values.mT
        for _ in range(_STEPS):
            basis = torch.linalg.qr(products @ basis).Q
        strength, turn = torch.linalg.eigh(basis.mT @ (products @ basis))
        weights = basis @ turn.flip(2)[..., :components]
        return _of_some_strength(weights, strength)
    for _ in range(_STEPS):
        basis = torch.linalg.qr(values.mT @ (values @ basis)).Q
    seen = values @ basis
    strength, turn = torch.linalg.eigh(seen.mT @ seen)
    weights = torch.nn.functional.normalize(seen @ turn.flip(2)[..., :components], dim=1)
    return _of_some_strength(weights, strength)


def _of_some_strength(weights: Tensor, strength: Tensor) -> Tensor:
    """The sizes of (groups, tokens, components) weights, 0 where a component is no more than a rounding error.

    strength: (groups, vectors), ascending, the squares of the singular values.
    """
    strength = strength.flip(1)
    real = strength[:, : weights.shape[2]] > _LEAST * strength[:, :1]
    # Rounded, so that tokens which are alike are equals whatever else is computed along with them.
    return (weights.abs() * real.unsqueeze(1)).round(decimals=5)


def mean_likeness(directions: Tensor, lengths: Tensor) -> Tensor:
    """``(groups,)`` float32: mean cosine of two different tokens of a group; 0 where there is just one token.

    Args:
        directions: ``(groups, tokens, dim)`` unit vectors, zero for padding.
        lengths: ``(groups,)`` long.
    """
    total = directions.double().sum(1).square().sum(1) - directions.double().square().sum((1, 2))
    return (total / (lengths * (lengths - 1)).clamp_min(1)).float()


def without_likes(
    directions: Tensor, scores: Tensor, belong: Tensor, valid: Tensor, threshold: Tensor, components: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress, in each component's tokens, those that are like a better one that is left.

    Args:
        directions: ``(groups, tokens, dim)`` unit vectors.
        scores: ``(groups, tokens)`` float, higher is better; of equal scores the lower index is better.
        belong: ``(groups, tokens)`` long, the component of each token.
        valid: ``(groups, tokens)`` bool.
        threshold: ``(groups,)`` cosine above which tokens are alike.
        components: number of components.

    Returns:
        rank: ``(groups, tokens)`` long: place of each token among those of its component, those that are left first,
            then by score.
        sizes: ``(groups, components)`` long, tokens of each component.
        left: ``(groups, components)`` long, how many are left.
    """
    groups, tokens, _ = directions.shape
    # Padding is a component of its own, behind the others.
    belong = belong.masked_fill(~valid, components)
    sizes = torch.zeros(groups, components + 1, dtype=torch.long, device=belong.device)
    sizes.scatter_add_(1, belong, torch.ones_like(belong))
    first = sizes.cumsum(1) - sizes
    place = torch.arange(tokens, device=belong.device).expand(groups, -1)
    by_score = scores.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, belong.gather(1, by_score).argsort(dim=1, stable=True))
    component = belong.gather(1, order)
    within = place - first.gather(1, component)
    sorted_directions = directions.gather(1, order.unsqueeze(2).expand_as(directions))
    suppressed = torch.zeros_like(valid)
    # Of all components at once: the next best token, if it is not suppressed, suppresses those behind it.
    for step in range(int(sizes[:, :components].max()) if sizes.numel() and components else 0):
        leader = (first + step).clamp(max=tokens - 1)
        stays = (step < sizes) & ~suppressed.gather(1, leader)
        leaders = sorted_directions.gather(1, leader.unsqueeze(2).expand(-1, -1, directions.shape[2]))
        own = leaders.gather(1, component.unsqueeze(2).expand_as(sorted_directions))
        alike = (sorted_directions * own).sum(2) > threshold.unsqueeze(1)
        suppressed |= alike & (within > step) & stays.gather(1, component)
    # Stable: by component, then those that are left, each by score.
    behind = suppressed.argsort(dim=1, stable=True)
    final = behind.gather(1, component.gather(1, behind).argsort(dim=1, stable=True))
    rank = torch.zeros_like(order).scatter(1, order.gather(1, final), within)
    left = torch.zeros_like(sizes).scatter_add_(1, component, (~suppressed).long())
    return rank, sizes[:, :components], left[:, :components]


def component_counts(sizes: list[int], left: list[int], k: int, total: int) -> list[int]:
    """Divide ``k`` tokens among components, in proportion to how many of their tokens are left (PruneSID).

    Every component that has tokens gets one; the rest goes by rounded running totals, up to a limit; what is missing
    then goes to the components of which most are left.

    Args:
        sizes: tokens of each component.
        left: how many of them are unlike each other, at most their size.
        k: tokens to keep, at most the sum of the sizes.
        total: the number that limits go by: ``k``, plus 1 where the paper counts a CLS token.

    Returns:
        One count a component, at most its size; the sum is ``k``.
    """
    low = [min(1, size) for size in sizes]
    limit = [min(5 * -(-total // 64), size, some) for size, some in zip(sizes, left, strict=True)]
    while sum(limit) < min(total, sum(sizes)):
        limit = [min(most + 1, size) for most, size in zip(limit, sizes, strict=True)]
    extra, counts, running, given = max(0, k - sum(low)), [], 0, 0
    for least, some, most in zip(low, left, limit, strict=True):
        running += some
        upto = round(extra * running / max(sum(left), 1))
        counts.append(min(upto - given + least, most))
        given = upto
    order = sorted(range(len(sizes)), key=lambda component: -left[component])
    for component in order:
        counts[component] += min(limit[component] - counts[component], max(k - sum(counts), 0))
    for component in reversed(order):  # more components than tokens to keep
        counts[component] -= min(counts[component], max(sum(counts) - k, 0))
    return counts
