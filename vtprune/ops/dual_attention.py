# SPDX-License-Identifier: Apache-2.0
"""MustDrop's dual-attention filter: drop tokens that neither the whole text nor one of its tokens attends to."""

import math

import torch
from torch import Tensor

from vtprune.ops.cls_attention import cls_score
from vtprune.ops.selection import top_k_mask


def key_tokens(rows: Tensor, valid: Tensor | None = None, share: float = 0.08) -> Tensor:
    """Mark the tokens that the encoder's CLS token attends to most; the filter keeps them (MustDrop, arXiv 2411.10803).

    Args:
        rows: ``(images, heads, tokens)`` attention of the CLS query over the patches, in the encoder's last layer.
        valid: ``(images, tokens)`` bool, False for padding; by default all tokens are real.
        share: share of each image's tokens to mark, in [0, 1]; the number is rounded up.

    Returns:
        ``(images, tokens)`` bool.
    """
    scores = cls_score(rows.unsqueeze(1))
    if valid is None:
        valid = torch.ones_like(scores, dtype=torch.bool)
    counts = [math.ceil(share * length) for length in valid.sum(1).tolist()]
    return top_k_mask(scores, valid, torch.tensor(counts))


def dual_attention(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of the text over each visual token: of all text tokens together, and the maximum of a single one.

    Args:
        rows: ``(batch, heads, text, tokens)`` post-softmax attention of the text after the image over the visual
            tokens; rows of padding are zero.

    Returns:
        Two ``(batch, tokens)`` float32 tensors: sum and maximum over the text tokens. Heads are averaged first.
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

    ``g`` is the attention of the whole text over a visual token, ``m`` is the largest attention of a single text token.
    A visual token is dropped if ``g < global_threshold * sum of g`` and ``m < individual_threshold``.

    With a budget both thresholds are scaled together until exactly as many tokens pass as the budget says. These are
    the tokens with the largest ``max(g / (global_threshold * sum of g), m / individual_threshold)``, spared tokens
    before others. The paper has no such mode: its thresholds were tuned on each data set to keep a number of tokens on
    average.

    Args:
        total: ``(batch, tokens)``, ``g``.
        peak: ``(batch, tokens)``, ``m``.
        global_threshold: at least 0; above 0 with a budget.
        individual_threshold: at least 0; above 0 with a budget.
        spared: ``(batch, tokens)`` bool, tokens that are always kept (:func:`key_tokens`); by default none.
        valid: ``(batch, tokens)`` bool, False for padding; by default all tokens are real.
        budget: ``(batch,)`` long, number of tokens to keep, spared ones included; by default the thresholds decide.

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
        raise ValueError("with a budget both thresholds must be above 0, because they weigh the two kinds of attention")
    budget = budget.to(total.device)
    # If the text attends to no visual token at all, the sum is zero.
    strength = torch.maximum(total / least.clamp_min(torch.finfo(least.dtype).tiny), peak / individual_threshold)
    first = top_k_mask(strength, spared, budget)
    return first | top_k_mask(strength, valid & ~spared, budget - first.sum(1))
