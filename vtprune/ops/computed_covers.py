# SPDX-License-Identifier: Apache-2.0
"""How well visual tokens cover each other, computed a few rows at a time (MMTok with many tokens)."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from vtprune.devices import CPU

# Elements of the rows that are kept, and of those that are computed at a time.
_KEPT_ELEMENTS = 1 << 26
_BLOCK_ELEMENTS = 1 << 22


class ComputedCovers:
    """A table ``(n, m + n)`` as :func:`vtprune.ops.coverage.greedy_cover` reads it, with memory linear in ``n``.

    Its methods are those of a tensor that the search needs. Values equal those of the table up to rounding.
    """

    def __init__(self, by_text: Tensor, directions: Tensor, tau: float, scale: float):
        """
        Args:
            by_text: ``(n, m)``, the first columns.
            directions: ``(n, d)`` unit vectors. A column is the softmax over their cosines with one of them.
            tau: temperature of the softmax.
            scale: what it is multiplied with.
        """
        self._by_text, self._directions, self._tau, self._scale = by_text, directions, tau, scale
        self.shape = torch.Size((len(by_text), by_text.shape[1] + len(directions)))
        self.device = directions.device
        blocks = directions.split(self._block)
        # On a CPU, rows that were computed are kept while there is room: most are needed many times.
        kept = min(_KEPT_ELEMENTS // max(self.shape[1], 1), len(by_text)) if self.device == CPU else 0
        self._kept, self._used = by_text.new_empty(kept, self.shape[1]), 0
        self._slots = torch.full((len(by_text),), -1)
        self._log_sums = torch.cat([((block @ directions.T).div_(tau)).logsumexp(1) for block in blocks])

    @property
    def _block(self) -> int:
        return max(_BLOCK_ELEMENTS // max(self.shape[1], 1), 1)

    def __len__(self) -> int:
        return self.shape[0]

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """``(rows, m + n)``; dim must be 0."""
        if self.device != CPU:  # where looking up what is there would be waited for
            return self._rows(index)
        new = index[self._slots[index] < 0].unique()
        if self._used + len(new) <= len(self._kept):
            self._slots[new] = torch.arange(self._used, self._used + len(new))
            self._kept[self._used : self._used + len(new)] = self._rows(new)
            self._used += len(new)
        slots = self._slots[index]
        return self._kept[slots] if bool((slots >= 0).all()) else self._rows(index)

    def _rows(self, index: Tensor) -> Tensor:
        cosines = self._directions.index_select(0, index) @ self._directions.T
        covers = cosines.div_(self._tau).sub_(self._log_sums).exp_().mul_(self._scale)
        return torch.cat((self._by_text.index_select(0, index), covers), dim=1)

    def sum(self, dim: int) -> Tensor:
        """``(n,)``; dim must be 1."""
        return self._sums.clone()

    @cached_property
    def _sums(self) -> Tensor:
        numbers = torch.arange(len(self), device=self.device)
        return torch.cat([self._rows(part).sum(1) for part in numbers.split(self._block)])

    def cpu(self) -> ComputedCovers:
        return ComputedCovers(self._by_text.cpu(), self._directions.cpu(), self._tau, self._scale)
