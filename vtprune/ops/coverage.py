# SPDX-License-Identifier: Apache-2.0
"""Maximum coverage: the subset of visual tokens that speaks best for the question and for all other tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.errors import VTPruneError

# Elements of one batch of candidates: below the size from which torch splits an operation over threads, whose waking
# would cost more than the work.
_BATCH_ELEMENTS = 32_000
# Float32 gains closer than this (relative to the best one) are compared again in float64: far above the rounding
# error of a sum of a few thousand positive terms, far below the usual distance of two candidates.
_TIE = 1e-5


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
    features, encoder_features, text = (
        normalize(x.float(), dim=-1, eps=1e-8) for x in (features, encoder_features, text)
    )
    by_text = (text @ features.T).div_(tau_text).softmax(dim=-1).div_(max(len(text), 1))
    by_visual = (encoder_features @ encoder_features.T).div_(tau_visual).softmax(dim=-1).div_(max(len(features), 1))
    return by_text, by_visual


def coverage_order(
    features: Tensor,
    encoder_features: Tensor,
    text: Tensor,
    k: int,
    *,
    alpha: float = 0.5,
    tau_text: float = 0.02,
    tau_visual: float = 0.2,
    exclude: Sequence[int] | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The greedy solution of :func:`max_coverage` in the order in which it was found.

    Arguments as there.

    Returns:
        ``(chosen,)`` long indices and ``(chosen,)`` float32 marginal gains, both in order of choice.
    """
    by_text, by_visual = coverage_matrices(features, encoder_features, text, tau_text=tau_text, tau_visual=tau_visual)
    candidates = torch.ones(len(features), dtype=torch.bool, device=features.device)
    if exclude is not None:
        candidates[torch.as_tensor(exclude, dtype=torch.long, device=features.device)] = False
    covers = torch.cat((by_text, by_visual.mul_(alpha))).T.contiguous()
    return _greedy(covers, k, candidates)


def max_coverage(
    features: Tensor,
    encoder_features: Tensor,
    text: Tensor,
    k: int,
    *,
    alpha: float = 0.5,
    tau_text: float = 0.02,
    tau_visual: float = 0.2,
    exclude: Sequence[int] | Tensor | None = None,
    reference_quirks: bool = False,
) -> Tensor:
    """Choose ``k`` visual tokens by greedy maximum coverage (MMTok, arXiv 2508.18264).

    With ``C`` the coverage of the text tokens and ``alpha`` times that of the visual tokens
    (:func:`coverage_matrices`) stacked to ``(m + n, n)``, the set ``S`` greedily maximises
    ``sum over rows of max over j in S of C[row, j]``. Each step takes the candidate of the largest gain, the lowest
    index of equal ones. The result is that of evaluating every candidate at every step; that most evaluations
    can be left out follows from submodularity (a candidate's gain never grows; Minoux 1978).

    Args:
        features: ``(n, d)`` visual tokens as the LLM sees them (projector output).
        encoder_features: ``(n, d_v)`` the same tokens as the vision encoder saw them.
        text: ``(m, d)`` embeddings of the question's tokens; with ``m = 0`` the visual tokens alone are covered.
        k: tokens to choose, at least 0.
        alpha: weight of covering the visual tokens against covering the text, at least 0.
        tau_text: temperature of the text-visual softmax, > 0.
        tau_visual: temperature of the visual-visual softmax, > 0.
        exclude: ``(e,)`` indices that may not be chosen (padding). They still have to be covered.
        reference_quirks: with more asked for than candidates there are, fill up with index 0, repeated, as the
            reference implementation does.

    Returns:
        ``(min(k, n - e),)`` ascending long indices without repetition; ``(min(k, n),)`` with ``reference_quirks``.

    Raises:
        VTPruneError: a feature is NaN or infinite.
    """
    order, _ = coverage_order(
        features, encoder_features, text, k, alpha=alpha, tau_text=tau_text, tau_visual=tau_visual, exclude=exclude
    )
    if reference_quirks:
        order = torch.cat((order, order.new_zeros(min(k, len(features)) - len(order))))
    return order.sort().values


def _greedy(covers: Tensor, k: int, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Lazy greedy maximum coverage.

    Args:
        covers: ``(n, rows)`` float32, what each candidate gives to each row, at least 0.
        k: candidates to choose.
        candidates: ``(n,)`` bool.
    """
    # ``bounds`` holds the last gain computed for each candidate, which bounds its present one from above.
    bounds = covers.sum(dim=1)
    if not bounds.isfinite().all():
        raise VTPruneError("features hold NaN or infinite values: coverage is not defined on them")
    bounds.masked_fill_(~candidates, -torch.inf)
    steps = min(k, int(candidates.sum()))
    order = torch.empty(steps, dtype=torch.long, device=covers.device)
    gains = covers.new_empty(steps)
    covered = covers.new_zeros(covers.shape[1])
    for step in range(steps):
        near = _evaluate(covers, covered, bounds)
        if bounds[near[0]] == 0:
            # Nothing is left to gain, now or later: all candidates tie, and the lowest indices win.
            order[step:] = (~bounds.isneginf()).nonzero().flatten()[: steps - step]
            gains[step:] = 0
            break
        if len(near) > 1:
            near = near.sort().values
            exact = (covers[near].double() - covered.double()).clamp_min_(0).sum(dim=1)
            chosen = near[exact.argmax()]
        else:
            chosen = near[0]
        order[step] = chosen
        gains[step] = bounds[chosen]
        bounds[chosen] = -torch.inf
        covered = torch.maximum(covered, covers[chosen])
    return order, gains


def _evaluate(covers: Tensor, covered: Tensor, bounds: Tensor) -> Tensor:
    """Refresh ``bounds`` from the highest downwards until none left over comes near the best gain found.

    Returns:
        The candidates whose present gain is within ``_TIE`` of the best, ``(near,)`` long, in no order.
    """
    batch = min(max(_BATCH_ELEMENTS // covers.shape[1], 8), len(bounds))
    indices, gains = [], []
    waiting, best = bounds, -torch.inf
    while True:
        # One more than is evaluated: the highest bound that stays behind.
        highest, index = waiting.topk(min(batch + 1, len(bounds)))
        index = index[:batch]
        indices.append(index)
        gains.append(covers.index_select(0, index).sub_(covered).clamp_min_(0).sum(dim=1))
        # A candidate out of the running (excluded or chosen) must stay there.
        gains[-1].masked_fill_(highest[:batch].isneginf(), -torch.inf)
        best = max(best, gains[-1].max().item())
        left = highest[batch].item() if len(highest) > batch else -torch.inf
        if left < best * (1 - _TIE) or left == -torch.inf:
            break
        if waiting is bounds:
            waiting = bounds.clone()
        waiting[index] = -torch.inf
    index, gain = torch.cat(indices), torch.cat(gains)
    bounds[index] = gain
    return index[gain >= best * (1 - _TIE)]
