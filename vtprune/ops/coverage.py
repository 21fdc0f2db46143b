# SPDX-License-Identifier: Apache-2.0
"""Greedy maximum coverage (MMTok, SCOPE): the subset of visual tokens that covers text and image best."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.checks import require, with_short_cut
from vtprune.devices import CPU, send
from vtprune.ops.computed_covers import ComputedCovers

# A table of all pairs has at most so many elements, 256 MiB. Without a table, rows are computed when they are needed.
_TABLE_ELEMENTS = 1 << 26
# Elements of one batch of candidates. Torch splits larger operations over threads, and waking the threads costs more
# than the work itself; on a busy machine, many times more.
_BATCH_ELEMENTS = 16_000
# Without reading values: so many candidates are looked at in each step. It is nearly always enough, as long as all
# bounds are renewed now and then, most often at the beginning, when gains shrink fastest.
_FEW = 256
_RENEWALS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
# Gains closer than this (relative to the best one) are computed again, in the order of summation of a dense greedy
# search. It is far above the rounding error (cascaded float32 sums of positive terms), and far below the usual
# distance of two gains.
_TIE = 1e-6
# Torch sums this many columns side by side. It sums the remaining columns at the end of a row in another order.
_COLUMN_BLOCK = 64


def coverage_matrices(
    features: Tensor, encoder_features: Tensor, text: Tensor, *, tau_text: float = 0.02, tau_visual: float = 0.2
) -> tuple[Tensor, Tensor]:
    """How well each visual token covers each text token, and each other visual token (MMTok, arXiv 2508.18264).

    Args:
        features: ``(n, d)`` visual tokens as the LLM sees them.
        encoder_features: ``(n, d_v)`` the same tokens as the vision encoder saw them.
        text: ``(m, d)`` embeddings of the question's tokens; ``m`` may be 0.
        tau_text: temperature of the softmax over cosines of text and visual tokens, > 0.
        tau_visual: temperature of the softmax over cosines of visual tokens, > 0.

    Returns:
        ``(m, n)`` and ``(n, n)`` float32; every row of the first sums to ``1 / m``, of the second to ``1 / n``.
    """
    directions = normalize(encoder_features.float(), dim=-1, eps=1e-8)
    by_visual = (directions @ directions.T).div_(tau_visual).softmax(dim=-1).div_(max(len(features), 1))
    return _by_text(features, text, tau_text), by_visual


def _by_text(features: Tensor, text: Tensor, tau: float) -> Tensor:
    """The first of `coverage_matrices`."""
    features, text = (normalize(x.float(), dim=-1, eps=1e-8) for x in (features, text))
    return (text @ features.T).div_(tau).softmax(dim=-1).div_(max(len(text), 1))


@torch.no_grad()
def coverage_order(by_text: Tensor, by_visual: Tensor, k: int, *, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """The greedy solution of :func:`max_coverage` in the order in which it was found.

    Args:
        by_text: ``(m, n)`` how well each of the ``n`` candidates covers each text token (:func:`coverage_matrices`).
        by_visual: ``(n_v, n)`` how well each candidate covers each visual token.
        k: candidates to choose, at least 0.
        alpha: weight of covering the visual tokens against covering the text, at least 0.

    Returns:
        ``(min(k, n),)`` long indices and float32 marginal gains, both in order of choice.
    """
    covers = by_visual.new_empty(by_visual.shape[1], len(by_text) + len(by_visual))
    covers[:, : len(by_text)] = by_text.T
    torch.mul(by_visual.T, alpha, out=covers[:, len(by_text) :])
    return greedy_cover(covers, covers.new_ones(len(covers)), k)


@torch.no_grad()
def greedy_cover(covers: Tensor | ComputedCovers, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose candidates greedily: each step takes the one with the largest gain times its weight.

    The gain of a candidate is the sum over rows of what it covers beyond what those chosen before cover. Of equal
    values the lowest index is taken. The result is the same as if every candidate was evaluated at every step.

    Args:
        covers: ``(n, rows)`` float32, how well each candidate covers each row, at least 0.
        weights: ``(n,)`` float32, at least 0.
        k: candidates to choose, at least 0.

    Returns:
        ``(min(k, n),)`` long indices and float32 weighted gains, both in order of choice.

    Raises:
        VTPruneError: a value is NaN or infinite.
    """
    # Values are not negative: their sum is finite if all are.
    finite = covers.sum(dim=1).sum().isfinite() & weights.sum().isfinite()
    require(finite, "features hold NaN or infinite values: coverage is not defined on them")

    def adaptive() -> tuple[Tensor, Tensor]:
        order, gains = _greedy(covers.cpu(), weights.cpu(), k)
        device = covers.device
        return send(torch.tensor(order, dtype=torch.long), device), send(torch.tensor(gains), device)

    # The adaptive search reads values at each step: an accelerator would be waited for, the CPU need not be.
    if covers.device == CPU:
        return adaptive()
    return with_short_cut(lambda: _greedy_of_few(covers, weights, min(k, len(covers))), adaptive)


@torch.no_grad()
def max_coverage(
    features: Tensor,
    encoder_features: Tensor,
    text: Tensor,
    k: int,
    *,
    alpha: float = 0.5,
    tau_text: float = 0.02,
    tau_visual: float = 0.2,
) -> Tensor:
    """Choose ``k`` visual tokens by greedy maximum coverage (MMTok, arXiv 2508.18264).

    With ``C`` the coverage of the text tokens and ``alpha`` times that of the visual tokens
    (:func:`coverage_matrices`) stacked to ``(m + n, n)``, the set ``S`` greedily maximises
    ``sum over rows of max over j in S of C[row, j]``. Each step takes the candidate with the largest gain, of equal
    gains the lowest index. The result is the same as if every candidate was evaluated at every step. Most evaluations
    are left out, because a candidate's gain never grows (submodularity; Minoux 1978).

    Args:
        features: ``(n, d)`` visual tokens as the LLM sees them (projector output).
        encoder_features: ``(n, d_v)`` the same tokens as the vision encoder saw them.
        text: ``(m, d)`` embeddings of the question's tokens; with ``m = 0`` only the visual tokens are covered.
        k: tokens to choose, at least 0.
        alpha: weight of covering the visual tokens against covering the text, at least 0.
        tau_text: temperature of the text-visual softmax, > 0.
        tau_visual: temperature of the visual-visual softmax, > 0.

    Returns:
        ``(min(k, n),)`` long, ascending indices without repetition.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    count = len(features)
    if count**2 <= _TABLE_ELEMENTS:
        matrices = coverage_matrices(features, encoder_features, text, tau_text=tau_text, tau_visual=tau_visual)
        order, _ = coverage_order(*matrices, k, alpha=alpha)
    else:
        directions = normalize(encoder_features.float(), dim=-1, eps=1e-8)
        by_text = _by_text(features, text, tau_text).T.contiguous()
        covers = ComputedCovers(by_text, directions, tau_visual, alpha / count)
        order, _ = greedy_cover(covers, directions.new_ones(count), k)
    return order.sort().values


def _greedy_of_few(covers: Tensor | ComputedCovers, weights: Tensor, k: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Greedy maximum coverage that computes the gains of the `_FEW` highest bounds at each step, and reads nothing.

    Args:
        covers, weights: as of `greedy_cover`.
        k: at most ``n``.

    Returns:
        ``(k,)`` candidates in order of choice and their gains; and a bool, whether no other candidate can have had the
        largest gain at any step. If not, the choice may be wrong.
    """
    count, device = len(covers), covers.device
    bounds, covered = covers.sum(dim=1).mul_(weights), weights.new_zeros(covers.shape[1])
    every = torch.arange(count, device=device)
    right = torch.ones(1, dtype=torch.bool, device=device)
    order, gains = [torch.empty(0, dtype=torch.long, device=device)], [weights.new_empty(0)]
    for step in range(k):
        if step in _RENEWALS:
            bounds = _gains(covers, weights, covered, every).masked_fill_(bounds.isneginf(), -torch.inf)
        near, beyond = every, weights.new_full((1,), -torch.inf)
        if count > _FEW:
            highest = bounds.topk(_FEW + 1)
            near, beyond = highest.indices[:_FEW].sort().values, highest.values[_FEW:]
        # Of a candidate that was chosen, the bound is -inf.
        gain = torch.where(bounds[near].isneginf(), -torch.inf, _gains_by_column(covers, weights, covered, near))
        best, place = gain.max(dim=0, keepdim=True)
        # If no candidate can gain anything, all are equal, and the lowest index is taken.
        first = bounds.isneginf().byte().argmin(dim=0, keepdim=True)
        chosen = torch.where(best > 0, near.gather(0, place), first)
        right &= (beyond < best * (1 - _TIE)) | ((best == 0) & (beyond <= 0))
        bounds = bounds.index_copy(0, near, gain).index_fill_(0, chosen, -torch.inf)
        covered = torch.maximum(covered, covers.index_select(0, chosen)[0])
        order.append(chosen)
        gains.append(best)
    return (torch.cat(order), torch.cat(gains)), right


def _greedy(covers: Tensor | ComputedCovers, weights: Tensor, k: int) -> tuple[list[int], list[float]]:
    """Lazy greedy maximum coverage: ``min(k, n)`` candidates in order of choice, and their gains.

    Args: those of `greedy_cover`.
    """
    # The last gain computed for each candidate. It is an upper bound of the present gain.
    bounds = covers.sum(dim=1).mul_(weights)
    covered = weights.new_zeros(covers.shape[1])
    order, gains = [], []
    while len(order) < min(k, len(covers)):
        near, gain = _best_candidates(covers, weights, covered, bounds)
        if gain == 0:
            # No candidate can gain anything, now or later. All are equal, and the lowest indices are taken.
            rest = sorted(set(range(len(covers))) - set(order))[: k - len(order)]
            return order + rest, gains + [0.0] * len(rest)
        if len(near) > 1:
            near.sort()
            close = _gains_by_column(covers, weights, covered, torch.tensor(near))
            near, gain = [near[close.argmax()]], close.max().item()
        order.append(near[0])
        gains.append(gain)
        torch.maximum(covered, covers.index_select(0, torch.tensor(near))[0], out=covered)
    return order, gains


def _best_candidates(
    covers: Tensor | ComputedCovers, weights: Tensor, covered: Tensor, bounds: Tensor
) -> tuple[list[int], float]:
    """Find the candidates whose gain is the largest or near it (``_TIE``), and the largest gain.

    Gains are computed from the highest bound downwards, until no remaining bound is near the best gain. Each computed
    gain replaces its entry in ``bounds``. A candidate that was chosen already has a gain of zero.
    """
    batch = _batch_rows(covers)
    while True:
        # One bound more than is computed: the highest of the remaining bounds.
        highest, index = bounds.topk(min(batch + 1, len(bounds)))
        index = index[:batch]
        gains = _gains(covers, weights, covered, index)
        bounds.index_copy_(0, index, gains)
        gains = gains.tolist()
        best = max(gains)
        if len(highest) <= batch or highest[-1].item() < best * (1 - _TIE):
            return [i for i, gain in zip(index.tolist(), gains, strict=True) if gain >= best * (1 - _TIE)], best
        batch *= 2


def _gains(covers: Tensor | ComputedCovers, weights: Tensor, covered: Tensor, index: Tensor) -> Tensor:
    """``(candidates,)`` how much each candidate in ``index`` would add to ``covered``, times its weight."""
    parts = [
        covers.index_select(0, part).sub_(covered).clamp_min_(0).sum(dim=1) for part in index.split(_batch_rows(covers))
    ]
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).mul_(weights.index_select(0, index))


def _gains_by_column(covers: Tensor | ComputedCovers, weights: Tensor, covered: Tensor, near: Tensor) -> Tensor:
    """The same as `_gains`, summed in the order in which torch sums the columns of a wide matrix.

    Candidates that differ by less than float32 rounding then rank as in a dense greedy search on the ``(rows, n)``
    matrix.
    """
    filled = torch.cat((near, near[:1].expand(-len(near) % _COLUMN_BLOCK)))
    columns = covers.index_select(0, filled).T.contiguous()
    gains = columns.sub_(covered[:, None]).clamp_min_(0).sum(dim=0)[: len(near)]
    return gains.mul_(weights.index_select(0, near))


def _batch_rows(covers: Tensor | ComputedCovers) -> int:
    return max(_BATCH_ELEMENTS // covers.shape[1], 8)
