# SPDX-License-Identifier: Apache-2.0
"""Dual-attention filter: what neither the question as a whole nor any single word of it looks at can go."""

import math

import torch
from torch import Tensor

from vtprune.ops.cls_attention import cls_score
from vtprune.ops.selection import top_k_mask


def key_tokens(rows: Tensor, valid: Tensor | None = None, share: float = 0.08) -> Tensor:
    """The tokens that the encoder's CLS token looks at most, which the filter spares (MustDrop, arXiv 2411.10803).

    Args:
        rows: ``(images, heads, tokens)`` attention of the CLS query over the patches, in the encoder's last layer.
        valid: ``(images, tokens)`` bool, False for padding; by default all tokens are real.
        share: of each image's tokens to mark, rounded up.

    Returns:
        ``(images, tokens)`` bool.
    """
    scores = cls_score(rows.unsqueeze(1))
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    counts = [math.ceil(share * length) for length in valid.sum(1).tolist()]
    return top_k_mask(scores, valid, torch.tensor(counts))


def dual_attention(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the text looks at: all its tokens together, and the one that looks most.

    Args:
        rows: ``(batch, heads, text, tokens)`` post-softmax attention of the text after the image over the visual
            tokens; rows of padding are zero.

    Returns:
        ``(batch, tokens)`` float32, twice: sum and maximum over the text of the mean over heads.
    """
    attention = rows.float().mean(dim=1)
    total = attention.sum(dim=1)
    return total, attention.amax(dim=1) if rows.shape[2] else total


def dual_attention_filter(
    total: Tensor,
    peak: Tensor,
    *,
    global_threshold: float = 0.001,
    individual_threshold: float = 0.001,
    spared: Tensor | None = None,
    valid: Tensor | None = None,
    budget: Tensor | None = None,
) -> Tensor:
    """Drop the visual tokens that fall short of both thresholds (MustDrop, arXiv 2411.10803).

    With ``g`` the attention of the whole text and ``m`` that of its keenest token, one goes if
    ``g < global_threshold * sum of g`` and ``m < individual_threshold``.

    With a budget both thresholds are scaled together until as many tokens pass as are to be kept: those of the largest
    ``max(g / (global_threshold * sum of g), m / individual_threshold)``, spared ones before others. The paper has no
    such mode: its thresholds were tuned on each data set to meet a number of tokens on average.

    Args:
        total: ``(batch, tokens)``, ``g``.
        peak: ``(batch, tokens)``, ``m``.
        global_threshold: at least 0; above 0 with a budget.
        individual_threshold: at least 0; above 0 with a budget.
        spared: ``(batch, tokens)`` bool, tokens to keep in any case (:func:`key_tokens`); by default none.
        valid: ``(batch, tokens)`` bool, False for padding; by default all tokens are real.
        budget: ``(batch,)`` long, tokens to keep, spared ones included; by default the thresholds decide.

    Returns:
        ``(batch, tokens)`` bool, the tokens kept.
    """
    if valid is None:
        valid = torch.ones_like(total, dtype=torch.bool)
    spared = torch.zeros_like(valid) if spared is None else spared & valid
    least = global_threshold * total.masked_fill(~valid, 0).sum(dim=1, keepdim=True)
    if budget is None:
        return valid & ((total >= least) | (peak >= individual_threshold) | spared)
    if min(global_threshold, individual_threshold) <= 0:
        raise ValueError("with a budget the thresholds weigh the two kinds of attention: both have to be above 0")
    budget = budget.to(total.device)
    # Where the text looks at no visual token at all, nothing can be told apart.
    strength = torch.maximum(total / least.clamp_min(torch.finfo(least.dtype).tiny), peak / individual_threshold)
    first = top_k_mask(strength, spared, budget)
    return first | top_k_mask(strength, valid & ~spared, budget - first.sum(1))
