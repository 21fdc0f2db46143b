# SPDX-License-Identifier: Apache-2.0
"""Multi-criteria token fusion (MCTF): similar, uninformative and small tokens merge."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtprune.ops.token_reduction import Reduction

# The reference leaves at least this many tokens, CLS token included.
_FEWEST = 10


def fusion_count(tokens: int, r: float, *, protected: int = 1) -> int:
    """How many tokens a layer merges (MCTF, arXiv 2403.10030).

    Args:
        tokens: number of tokens, protected ones included.
        r: number of tokens to merge, or if below 1 their share among the tokens that are not protected. At least 0.
        protected: number of tokens at the front that do not merge.

    Returns:
        At most half of the tokens that are not protected. A number ``r`` leaves at least 10 tokens; a share may leave
        fewer, except that 10 tokens or fewer stay as they are.
    """
    if tokens - r < _FEWEST:
        r = tokens - _FEWEST
    count = int((tokens - protected) * r) if r < 1 else int(r)
    return max(min(count, (tokens - protected) // 2), 0)


@torch.no_grad()
def fusion(
    features: Tensor,
    importance: Tensor,
    count: int,
    *,
    sizes: Tensor | None = None,
    tau_similarity: float = 1.0,
    tau_information: float = 20.0,
    tau_size: float = 40.0,
    bidirectional: bool = True,
    pooling: Literal["importance", "size", "mean", "max"] = "importance",
    protected: int = 1,
) -> Reduction | None:
    """Merge pairs of an even and an odd token that are similar, uninformative and small (MCTF, arXiv 2403.10030).

    The weight of a pair is the product of three criteria: ``((cosine + 1) / 2) ** (1 / tau_similarity)``, and the
    product of the inverse importances, and of the inverse sizes, of both tokens, to the power of 1 over their tau. The
    inverses are divided by their maximum over all tokens.

    First, the even tokens with the largest weights go into their best odd tokens: half of ``count``, rounded down. Then
    the odd tokens with the largest weights go, with all that they received, into their best even tokens among those
    that are left. The weights are not computed again. One direction only: ``count`` even tokens go into odd tokens.

    Order of the rows: protected tokens, then the even tokens, then the odd tokens by falling weight, or in one
    direction in their order. Without protected tokens, the even tokens are sorted by falling weight, too, as in the
    reference.

    Deviations: the reference protects only a CLS token; here, any number of tokens at the front neither merge nor are
    merged into. The cosine with a zero vector is 0, not NaN. Of equal weights the first token merges.

    Args:
        features: ``(batch, tokens, dim)`` the tokens themselves; the reference does not compare keys.
        importance: ``(batch, tokens)`` at least 0: the mean attention that each token receives, over heads and queries,
            the CLS token's included.
        count: number of tokens to merge, see :func:`fusion_count`. At most half of the tokens that are not protected
            do.
        sizes: ``(batch, tokens)`` how many original tokens each token stands for. None: 1 each, without the criterion.
        tau_similarity, tau_information, tau_size: temperatures of the criteria, at least 0; 0 leaves the criterion out.
        bidirectional: merge in both directions.
        pooling: a row is the mean of its tokens, weighted by importance times size (the paper), by size, or equally; or
            their maximum.
        protected: number of tokens at the front (CLS, registers).

    Returns:
        ``tokens - count`` rows; None if nothing is to be merged.
    """
    batch, tokens, _ = features.shape
    count = min(count, (tokens - protected) // 2)
    if count <= 0:
        return None
    importance = importance.float().clamp_min(torch.finfo(torch.float32).tiny)  # its inverse is finite
    weights = _pair_weights(features, importance, sizes, (tau_similarity, tau_information, tau_size))
    places = torch.arange(tokens, device=features.device)
    even, odd = places[::2], places[1::2]
    weights.masked_fill_((even < protected)[:, None] | (odd < protected), -torch.inf)
    goes = places.repeat(batch, 1)

    first = count // 2 if bidirectional else count
    best = weights.max(dim=2)
    order = best.values.argsort(dim=1, descending=True, stable=True)
    goes.scatter_(1, 2 * order[:, :first], 2 * best.indices.gather(1, order[:, :first]) + 1)
    left = order[:, first:]
    if protected:
        left = left.sort(dim=1).values

    odd_left = odd.expand(batch, -1)
    if bidirectional:
        second = count - first
        among = weights.gather(1, left.unsqueeze(-1).expand(-1, -1, weights.shape[2]))
        best = among.max(dim=1)
        order = best.values.argsort(dim=1, descending=True, stable=True)
        merged = order[:, :second]
        goes.scatter_(1, 2 * merged + 1, 2 * left.gather(1, best.indices.gather(1, merged)))
        goes = goes.gather(1, goes)  # An even token follows its odd token.
        odd_left = 2 * order[:, second:] + 1

    shares = None if pooling in ("mean", "max") else sizes
    if pooling == "importance":
        shares = importance if sizes is None else importance * sizes
    reduction = Reduction.join(torch.cat([2 * left, odd_left], dim=1), goes, shares, protected=protected)
    return replace(reduction, pooling="max") if pooling == "max" else reduction


def _pair_weights(
    features: Tensor, importance: Tensor, sizes: Tensor | None, taus: tuple[float, float, float]
) -> Tensor:
    """(batch, even tokens, odd tokens) float32: how much each pair should merge, in [0, 1]."""
    tau_similarity, tau_information, tau_size = taus
    even, odd = features[:, ::2], features[:, 1::2]
    weights = features.new_ones((len(features), even.shape[1], odd.shape[1]), dtype=torch.float32)
    if tau_similarity:
        even, odd = (normalize(x.float(), dim=-1, eps=1e-8) for x in (even, odd))
        # Rounding can make a cosine smaller than -1.
        weights = ((even @ odd.transpose(1, 2) + 1) / 2).clamp_min(0) ** (1 / tau_similarity)
    for values, tau in ((importance, tau_information), (sizes, tau_size)):
        if tau and values is not None:
            inverse = 1 / values.float()
            inverse = inverse / inverse.amax(dim=1, keepdim=True)
            weights = weights * (inverse[:, ::2, None] * inverse[:, None, 1::2]) ** (1 / tau)
    return weights


def fused_attention(attention: Tensor, reduction: Reduction) -> Tensor:
    """Attention among the rows, from the attention among the tokens (one-step-ahead attention, arXiv 2403.10030).

    The attention to the tokens of a row adds up. The attention of the tokens of a row is reduced like their features.

    Args:
        attention: ``(batch, heads, tokens, tokens)``, queries before keys; its rows sum to one.

    Returns:
        ``(batch, heads, rows, rows)`` float32. Its rows sum to one, unless they are maxima.
    """
    batch, heads, tokens, _ = attention.shape
    rows = reduction.rows
    by_key = attention.permute(0, 3, 1, 2).reshape(batch, tokens, heads * tokens)
    by_query = reduction.sums(by_key).view(batch, rows, heads, tokens).permute(0, 3, 2, 1)
    fused = reduction.features(by_query.reshape(batch, tokens, heads * rows))
    return fused.view(batch, rows, heads, rows).transpose(1, 2)


@dataclass(frozen=True)
class OneStepAhead:
    """The attention of the rows, from that of the tokens that they were reduced from (arXiv 2403.10030)."""

    attention: Tensor
    """(batch, heads, tokens, tokens), queries before keys; its rows sum to one."""
    reduction: Reduction

    def weights(self) -> Tensor:
        """(batch, heads, rows, rows) float32: `fused_attention`."""
        return fused_attention(self.attention, self.reduction)

    def attend(self, values: Tensor) -> Tensor:
        """(batch, heads, rows, dim) -> the same: `weights() @ values`, without the large weights where they are linear.

        Each token gets the value of its row and attends as before. Its results are reduced as its features are.
        """
        if self.reduction.pooling == "max":
            return self.weights().to(values.dtype) @ values
        batch, heads, rows, _ = values.shape
        by_row = values.transpose(1, 2).reshape(batch, rows, -1)
        by_token = self.reduction.members(by_row).view(batch, -1, heads, values.shape[-1]).transpose(1, 2)
        attended = self.attention.to(values.dtype) @ by_token
        reduced = self.reduction.features(attended.transpose(1, 2).flatten(2))
        return reduced.view(batch, rows, heads, -1).transpose(1, 2)
