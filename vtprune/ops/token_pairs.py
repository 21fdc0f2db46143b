# SPDX-License-Identifier: Apache-2.0
"""Cosines of all pairs of tokens of a group, in blocks or as rows (DivPrune, CDPruner, VisPruner)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize

# A table of all pairs has at most so many elements, 256 MiB. Without a table, a row is a product with all tokens. So
# memory beyond the table is linear in the tokens. On a CPU, which reads all tokens for each row, that takes longer.
_TABLE_ELEMENTS = 1 << 26
# Tokens of a block of the table. Above the diagonal a block is computed, below it is copied.
_BLOCK = 512
# Cosines in memory at a time where there is no table.
_BLOCK_ELEMENTS = 1 << 22


def directions_of(features: Tensor, valid: Tensor) -> Tensor:
    """``(groups, tokens, dim)`` unit vectors in float32; zero vectors stay zero, and so does what is not valid.

    A feature of a valid token that is NaN or infinite makes an element NaN.
    """
    return normalize(features.float().masked_fill(~valid.unsqueeze(2), 0.0), dim=2, eps=1e-8)


def blocks(directions: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the first token of each block, and the cosines ``(groups, block, tokens from there on)``."""
    for first in range(0, directions.shape[1], _BLOCK):
        yield first, directions[:, first : first + _BLOCK] @ directions[:, first:].mT


class Pairs:
    """Rows of the table of cosines of all pairs of tokens."""

    def __init__(self, directions: Tensor):
        """directions: ``(groups, tokens, dim)``."""
        self._directions = directions
        self._table: Tensor | None = None
        groups, tokens, _ = directions.shape
        self._first = torch.arange(groups, device=directions.device) * tokens
        if groups * tokens * tokens <= _TABLE_ELEMENTS:
            self._table = table = directions.new_empty(groups, tokens, tokens)
            for first, cosines in blocks(directions):
                last = first + cosines.shape[1]
                table[:, first:last, first:] = cosines
                table[:, last:, first:last] = cosines[:, :, last - first :].mT

    def row(self, index: Tensor) -> Tensor:
        """``(groups,)`` long -> ``(groups, tokens)``: the cosines of that token of each group with all of its group."""
        if self._table is not None:
            return self._table.flatten(0, 1).index_select(0, self._first + index)
        own = self._directions.flatten(0, 1).index_select(0, self._first + index)
        return (self._directions @ own.unsqueeze(2)).squeeze(2)

    def squares(self) -> Tensor:
        """``(groups, tokens)``: the cosine of each token with itself, with the table's rounding if there is one."""
        if self._table is not None:
            return self._table.diagonal(dim1=1, dim2=2)
        return self._directions.square().sum(2)

    def largest(self, valid: Tensor) -> Tensor:
        """``(groups, tokens)``: the largest cosine of each token with another valid one; -inf if there is none."""
        largest, hidden = self._directions.new_full(valid.shape, -torch.inf), ~valid
        for first, cosines in self._upper():
            last = first + cosines.shape[1]
            cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            cosines.masked_fill_(hidden[:, first:last, None], -torch.inf).masked_fill_(
                hidden[:, None, first:], -torch.inf
            )
            largest[:, first:last] = torch.maximum(largest[:, first:last], cosines.amax(2))
            largest[:, first:] = torch.maximum(largest[:, first:], cosines.amax(1))
        return largest

    def _upper(self) -> Iterator[tuple[int, Tensor]]:
        """What `blocks` gives, copied from the table if there is one."""
        if self._table is None:
            yield from blocks(self._directions)
            return
        for first in range(0, self._table.shape[1], _BLOCK):
            yield first, self._table[:, first : first + _BLOCK, first:].clone()


def nearest_neighbours(directions: Tensor, valid: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The other valid tokens with the largest cosines; memory is linear in the tokens.

    Args:
        directions: ``(groups, tokens, dim)``.
        valid: ``(groups, tokens)`` bool.
        count: number of neighbours, at most the number of tokens.

    Returns:
        ``(groups, tokens, count)`` long, and their cosines; -inf where there are fewer others.
    """
    groups, tokens, _ = directions.shape
    rows = max(_BLOCK_ELEMENTS // max(groups * tokens, 1), 1)
    indices, values = [], []
    for first in range(0, tokens, rows):
        cosines = directions[:, first : first + rows] @ directions.mT
        cosines.masked_fill_(~valid[:, None], -torch.inf).diagonal(first, 1, 2).fill_(-torch.inf)
        best = cosines.topk(count, dim=2)
        indices.append(best.indices)
        values.append(best.values)
    return torch.cat(indices, dim=1), torch.cat(values, dim=1)
