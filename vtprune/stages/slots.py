# SPDX-License-Identifier: Apache-2.0
"""Which token stands in each slot of a KV cache whose order is no longer that of the sequence, and what may join it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Self = TypeVar("Self", bound="PerSample")


@dataclass(frozen=True, eq=False, kw_only=True)
class PerSample:
    """Tensors whose first axis is the batch, which beams reorder and repeat; whatever else it holds stays."""

    _derived: dict = field(default_factory=dict, repr=False)

    def derive(self: Self, key: str, argument, make: Callable[[Tensor], Tensor]) -> Self:
        """The same with `make` applied along the batch; what layers share before, they share after it, too."""
        last = self._derived.get(key)
        if last is None or last[0] is not argument:
            mapped = {f.name: self._map(getattr(self, f.name), key, argument, make) for f in fields(self)}
            last = self._derived[key] = (argument, replace(self, **mapped | {"_derived": {}}))
        return last[1]

    @staticmethod
    def _map(value, key, argument, make):
        if torch.is_tensor(value):
            return make(value)
        if isinstance(value, PerSample):
            return value.derive(key, argument, make)
        if isinstance(value, dict):
            return {name: make(item) if torch.is_tensor(item) else item for name, item in value.items()}
        return value


@dataclass
class CacheContents:
    """Which visual tokens the KV cache of one prefill holds, as that changes while tokens are generated.

    Columns only: keys and values must be free to go with their cache.
    """

    columns: list[Tensor] | None = None
    """By layer: columns (batch, n) that it holds, -1 for none; None if that is what the prefill kept."""
    stored: list[tuple[Tensor, int]] = field(default_factory=list)
    """Columns (batch, m) of what may come back, and the bytes of one of them."""

    def of(self, visual: Sequence[Tensor]) -> tuple[tuple[tuple[Tensor, ...], ...] | None, int]:
        """For the report: the columns of visual tokens in the cache, by layer and sample, and the stored bytes.

        visual: a sample each, the columns of its visual tokens.
        """
        if self.columns is None:
            return None, 0

        def rows(columns: Tensor) -> Tensor:
            return columns[:: len(columns) // len(visual)].cpu()

        in_cache = tuple(
            tuple(row[torch.isin(row, tokens)].sort().values for row, tokens in zip(rows(columns), visual, strict=True))
            for columns in self.columns
        )
        return in_cache, sum(int((rows(columns) >= 0).sum()) * size for columns, size in self.stored)


@dataclass(frozen=True, eq=False)
class PromptTable(PerSample):
    """What is known of every column of a prompt whose visual tokens may come back."""

    first: int
    """Number of the prompt's first column in the sequence."""
    prunable: Tensor
    """(batch, columns) bool: the visual tokens that come and go."""
    positions: Tensor
    """(batch, columns) or (batch, axes, columns) long: position ids."""
    blocks: Tensor | None
    """(batch, columns) long: see `Adapter.blocks`."""
    deepstack: dict[int, Tensor]
    """Decoder layer -> (batch, columns, dim), which the model adds on that layer's input (DeepStack)."""
    counts: Tensor
    """(batch, cuts) long: visual tokens let through by each cut."""
    contents: CacheContents
    """What the cache holds, for the report."""

    def places(self, columns: Tensor) -> Tensor:
        """columns (batch, n) of the sequence -> (batch, n), the nearest columns of the prompt."""
        return (columns - self.first).clamp(min=0, max=self.prunable.shape[1] - 1)

    def look_up(self, values: Tensor, columns: Tensor, other) -> Tensor:
        """values (batch, columns of the prompt), columns (batch, n) of the sequence -> (batch, n); `other` beyond the
        prompt."""
        place = self.places(columns)
        return values.gather(1, place).masked_fill(place + self.first != columns, other)

    def positions_of(self, columns: Tensor) -> Tensor:
        """columns (batch, n) of the sequence -> (..., batch, n) position ids; any value where a column is -1."""
        place = self.places(columns)
        if self.positions.ndim == 3:
            place = place[:, None].expand(-1, self.positions.shape[1], -1)
        return self.positions.gather(-1, place).movedim(0, -2)


@dataclass(frozen=True, eq=False)
class Slots(PerSample):
    """The tokens of one cache layer, in the order in which they came."""

    columns: Tensor
    """(batch, physical) long: column of the sequence, -1 for padding."""
    table: PromptTable


@dataclass(frozen=True, eq=False)
class Stored(PerSample):
    """Tokens that a cut dropped and whose keys the layer after it lacks."""

    hidden: Tensor
    """(batch, m, dim): hidden states on the input of that layer."""
    columns: Tensor
    """(batch, m) long: column of the sequence, -1 for padding."""
