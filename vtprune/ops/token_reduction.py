# SPDX-License-Identifier: Apache-2.0
"""The result of a reduction between encoder layers: the row that each token goes into, and its weight there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


@dataclass(frozen=True)
class Reduction:
    """Fewer rows than tokens: a row is the weighted sum, or the maximum, of the tokens that go into it.

    All samples of a batch have the same number of rows. Nothing here waits for the device. Sums run in the order of the
    tokens on every device.
    """

    into: Tensor
    """(batch, tokens) long: the row that each token goes into; -1 for a token that is dropped."""
    rows: int
    """Number of rows. At least one token goes into each."""
    weights: Tensor
    """(batch, tokens) float32: the factor of each token in its row. The weights of a mean sum to one (:meth:`mean`); a
    token that stays as it is has weight 1 and a row of its own."""
    pooling: Literal["sum", "max"] = "sum"
    """``"sum"``: a row is the weighted sum of its tokens. ``"max"``: it is their maximum, without weights."""

    @classmethod
    def mean(cls, into: Tensor, rows: int, weights: Tensor | None = None) -> Reduction:
        """Make every row the weighted mean of its tokens.

        Args:
            into, rows: as in the fields.
            weights: ``(batch, tokens)``, > 0, on any scale. Default: all equal.
        """
        weights = torch.ones_like(into, dtype=torch.float32) if weights is None else weights.float()
        totals = _row_sums(weights.unsqueeze(-1), into, rows)
        # The only token of a row gets exactly 1: its weight is divided by itself.
        return cls(into, rows, weights / _per_token(totals, into, filling=1).squeeze(-1))

    @classmethod
    def join(cls, left: Tensor, goes: Tensor, weights: Tensor | None = None, *, protected: int = 0) -> Reduction:
        """Make a row of every token that is left: the weighted mean of the tokens that go to it.

        Args:
            left: ``(batch, rows)`` long: the tokens that are left, in the order of the rows.
            goes: ``(batch, tokens)`` long: for each token the token that it goes to, which is left and goes to itself;
                -1 for a token that is dropped.
            weights: as in :meth:`mean`.
            protected: the tokens below this number, which are left, come before the others, in their order.
        """
        batch, rows = left.shape
        if protected:
            left = left.gather(1, left.clamp_max(protected).argsort(dim=1, stable=True))
        row = torch.zeros_like(goes).scatter(1, left, torch.arange(rows, device=left.device).expand(batch, -1))
        return cls.mean(row.gather(1, goes.clamp_min(0)).masked_fill(goes < 0, -1), rows, weights)

    @classmethod
    def gather(cls, places: Tensor, tokens: int) -> Reduction:
        """Keep some tokens as they are, and drop the others.

        Args:
            places: ``(batch, rows)`` long: the token of each row, each token at most once.
            tokens: number of tokens before.
        """
        batch, rows = places.shape
        into = places.new_full((batch, tokens), -1)
        into.scatter_(1, places, torch.arange(rows, device=places.device).expand(batch, -1))
        return cls(into, rows, torch.ones_like(into, dtype=torch.float32))

    def features(self, values: Tensor) -> Tensor:
        """Apply the reduction: ``(batch, tokens, dim)`` -> ``(batch, rows, dim)``, in float32, then in its dtype again.

        A token with weight 1 and a row of its own keeps its bits.
        """
        if self.pooling == "max":
            groups = _with_spare_row(self.into, self.rows).unsqueeze(-1).expand(values.shape)
            least = values.new_full((len(values), self.rows + 1, values.shape[2]), -torch.inf)
            return least.scatter_reduce(1, groups, values, "amax")[:, : self.rows]
        return _row_sums(values, self.into, self.rows, self.weights).to(values.dtype)

    def sizes(self, sizes: Tensor | None = None) -> Tensor:
        """Add up the tokens of every row: ``(batch, tokens)`` -> ``(batch, rows)`` float32.

        Args:
            sizes: how many original tokens each token stands for. Default: 1 each.
        """
        sizes = torch.ones_like(self.weights) if sizes is None else sizes
        return self.sums(sizes.unsqueeze(-1)).squeeze(-1)

    def sums(self, values: Tensor) -> Tensor:
        """Add up the tokens of every row, without weights: ``(batch, tokens, dim)`` -> ``(batch, rows, dim)`` float32.

        Tokens that are dropped are left out.
        """
        return _row_sums(values, self.into, self.rows)

    def trace(self, sources: Tensor | None = None) -> Tensor:
        """Follow the original tokens into the rows: ``(batch, original tokens)`` long, -1 for dropped tokens.

        Args:
            sources: ``(batch, original tokens)`` long, the token that each original token is in before the reduction,
                -1 for dropped tokens. Default: the tokens are the original tokens.
        """
        if sources is None:
            return self.into
        return self.into.gather(1, sources.clamp_min(0)).masked_fill(sources < 0, -1)

    def members(self, rows: Tensor) -> Tensor:
        """Give every token the values of its row: ``(batch, rows, dim)`` -> ``(batch, tokens, dim)``; 0 if dropped."""
        return _per_token(rows, self.into, filling=0)

    def spread(self, rows: Tensor) -> Tensor:
        """Give the tokens values of which :meth:`features` makes the rows again.

        All tokens of a row get the same value: the row over the sum of the row's weights, which is the row itself for
        means and maxima. So a residual that is computed for the rows can be added to the tokens, before the sum of both
        is reduced.

        Args:
            rows: ``(batch, rows, dim)``.

        Returns:
            ``(batch, tokens, dim)`` in the dtype of ``rows``; zero for tokens that are dropped, and for the tokens of a
            row whose weights sum to 0.
        """
        values = rows
        if self.pooling == "sum":
            totals = self.sums(self.weights.unsqueeze(-1))
            values = (rows.float() / totals).masked_fill(totals == 0, 0).to(rows.dtype)
        return self.members(values)


def _with_spare_row(into: Tensor, rows: int) -> Tensor:
    """Dropped tokens go into a row behind the others."""
    return into.masked_fill(into < 0, rows)


def _row_sums(values: Tensor, into: Tensor, rows: int, weights: Tensor | None = None) -> Tensor:
    """(batch, tokens, dim) -> (batch, rows, dim) float32. A scattered sum does not promise an order; this one does."""
    batch, tokens, dim = values.shape
    bags = batch * (rows + 1)
    first_row = (rows + 1) * torch.arange(batch, device=into.device).unsqueeze(1)
    bag = (_with_spare_row(into, rows) + first_row).flatten()
    sorted_bags, members = bag.sort(stable=True)
    offsets = torch.searchsorted(sorted_bags, torch.arange(bags, device=into.device))
    factors = None if weights is None else weights.flatten()[members]
    flat = values.float().reshape(-1, dim)
    sums = embedding_bag(members, flat, offsets, mode="sum", per_sample_weights=factors)
    return sums.view(batch, rows + 1, dim)[:, :rows]


def _per_token(values: Tensor, into: Tensor, filling: float) -> Tensor:
    """(batch, rows, dim) -> (batch, tokens, dim): the value of each token's row; `filling` for dropped tokens."""
    index = into.clamp_min(0).unsqueeze(-1).expand(-1, -1, values.shape[2])
    return values.gather(1, index).masked_fill((into < 0).unsqueeze(-1), filling)
