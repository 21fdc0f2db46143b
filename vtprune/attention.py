# SPDX-License-Identifier: Apache-2.0
"""Attention of one decoder layer, recomputed from what its projections give: just the rows that are asked for.

The layer's own code applies norms and rotations, so none of them is known here. Attention is never taken from an eager
layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtprune.ops.attention import attention_rows
from vtprune.stages.layout import take_columns
from vtprune.transformers_private import Scored, output_width, projections, scored

ROWS_AT_A_TIME = 256
"""Rows whose attention is in memory at a time."""


@dataclass(frozen=True)
class Places:
    """The positions of the columns of a decoder layer."""

    ids: Tensor
    """(batch, n) long: position ids of the text; with M-RoPE those of one axis."""
    rope: Any
    """What the language model makes of all axes for the layer: usually cos and sin, (batch | 1, n, rotary dim)."""

    def take(self, index: Tensor) -> Places:
        """Those of the columns `index` (batch, m)."""
        return Places(take_columns(self.ids.expand(len(index), -1), index), _take_rope(self.rope, index))

    def to(self, device: torch.device) -> Places:
        return Places(self.ids.to(device), _map_rope(lambda t: t.to(device), self.rope))


def _map_rope(function: Callable[[Tensor], Tensor], rope: Any) -> Any:
    if rope is None:
        return None
    return function(rope) if torch.is_tensor(rope) else tuple(function(part) for part in rope)


def _take_rope(rope: Any, index: Tensor) -> Any:
    return _map_rope(lambda t: take_columns(t.expand(len(index), -1, -1), index), rope)


@dataclass(frozen=True)
class RowContext:
    """Everything that attention rows of one decoder layer need beside its projections."""

    attention: nn.Module
    places: Places
    """Of the current columns, n of them."""
    real: Tensor
    """(batch, n) bool."""
    past_keys: Tensor | None
    """(batch, kv heads, past, head dim), rotated; None if nothing was cached before."""
    past_real: Tensor | None
    """(batch, past) bool; None if all are real."""
    blocks: Tensor | None = None
    """(batch, n) long: columns of one block, numbered from 0, see one another both ways; None: causal throughout."""
    window: int | None = None
    """How many columns, itself included, a row of a sliding layer looks back on; None for all."""
    window_cuts_blocks: bool = False
    """Whether that holds within a block, too."""
    present: Tensor | None = None
    """(batch, n) bool: `real`, and columns that no row sees although they have rows of their own; None: `real`."""
    counting: Tensor | None = None
    """(batch, n) bool: the columns whose rows count where all are asked for, i.e. those of the prompt; None: all."""

    def counted(self, columns: Tensor) -> Tensor:
        """Those of some columns (batch, n) bool that count."""
        return columns if self.counting is None else columns & self.counting.to(columns.device)

    def scored(self, queries: Tensor | None, keys: Tensor | None, rows: Tensor | None = None) -> Scored:
        """Projected queries and keys of all columns, or of the columns `rows` (batch, r), as the layer scores them."""
        places = self.places if rows is None else self.places.take(rows)
        places = places.to((keys if queries is None else queries).device)
        return scored(self.attention, queries, keys, places.rope, places.ids)

    def position_logits(self, rows: Tensor) -> Tensor:
        """(batch, r, n) float32: logits of queries and keys that are all ones but for their positions.

        rows: (batch, r) long, the queries' columns.
        """
        attention, places = self.attention, self.places
        shape, device = (len(rows), places.ids.shape[1]), places.ids.device
        queries, keys = (
            torch.ones(*shape, output_width(attention, projection), device=device)
            for projection in projections(attention) or ()
        )
        rope = _map_rope(lambda t: t if t.is_complex() else t.float(), places.rope)
        turned = scored(attention, queries, keys, rope, places.ids, norms=False)
        index = rows.to(device)[..., None].expand(-1, -1, turned.queries.shape[-1])
        return turned.queries[:, 0].gather(1, index) @ turned.keys[:, 0].mT * turned.queries.shape[-1] ** -0.5

    def all_keys(self, keys: Tensor) -> Tensor:
        """(batch, kv heads, n, head dim) -> (batch, kv heads, past + n, head dim)."""
        return keys if self.past_keys is None else torch.cat([self.past_keys.to(keys.device), keys], 2)

    def visible(self, rows: Tensor, reach: int | None = None) -> Tensor:
        """(batch, r) columns -> (batch, r, past + n) bool: which keys they attend to.

        reach: of the first so many columns alone, (batch, r, past + reach).
        """
        real = self.real.to(rows.device)[:, :reach]
        batch, n = real.shape
        columns = torch.arange(n, device=rows.device)
        seen = columns <= rows[..., None]
        near = columns > rows[..., None] - (n if self.window is None else self.window)
        if self.blocks is not None:
            blocks = self.blocks.to(rows.device)
            block = blocks.gather(1, rows)[..., None]
            together = (blocks[:, None] == block) & (block >= 0)
            seen = (seen | together) & near if self.window_cuts_blocks else (seen & near) | together
        else:
            seen &= near
        allowed = real[:, None, :] & seen
        if self.past_keys is None:
            return allowed
        past = self.past_keys.shape[2]
        past_real = real.new_ones(batch, past) if self.past_real is None else self.past_real.to(rows.device)
        return torch.cat([past_real[:, None].expand(-1, rows.shape[1], -1), allowed], 2)


def decoder_attention_rows(queries: Tensor, keys: Tensor, rows: Tensor, context: RowContext) -> Tensor:
    """Attention of chosen query rows over the current columns of one decoder layer.

    queries: (batch, r, heads * head_dim), projected ones of the rows; keys: (batch, n, kv heads * head_dim), projected
    ones of all columns, or compressed ones of latent attention; rows: (batch, r) long, the rows' columns. Returns
    (batch, heads, r, n) float32; mass on cached keys and on sinks counts in the softmax and is then left out.
    """
    q, k = context.scored(queries, None, rows), context.scored(None, keys)
    mask = context.visible(rows.to(keys.device))
    weights = attention_rows(q.queries, context.all_keys(k.keys), mask=mask[:, None], **bounds(q))
    return weights[..., -keys.shape[1] :]


def cached_attention_row(
    queries: Tensor, keys: Tensor, visible: Tensor, attention: nn.Module, places: Places
) -> Tensor:
    """Attention of one query a sample over the keys in a cache, (batch, heads, n) float32.

    queries: (batch, 1, heads * head dim), projected; keys: (batch, kv heads, n, head dim), positions applied; visible:
    (batch, n) bool; places: of the queries.
    """
    places = places.to(queries.device)
    q = scored(attention, queries, None, places.rope, places.ids)
    return attention_rows(q.queries, keys, mask=visible[:, None, None], **bounds(q))[:, :, 0]


class LayerAttention:
    """The attention of one decoder layer over the current columns of a prompt: what a signal reads it from."""

    def __init__(self, context: RowContext, queries: Callable[[Tensor | None], Tensor], keys: Callable[[], Tensor]):
        """queries: columns (batch, r), None for all -> projected queries, (batch, r, heads * head dim).
        keys: gives the projected keys of all columns, (batch, n, kv heads * head dim), compressed ones of latent
        attention."""
        self.context = context
        self._queries, self._make_keys = queries, keys

    @functools.cached_property
    def _keys(self) -> Tensor:
        return self._make_keys()

    def rows(self, rows: Tensor) -> Tensor:
        """Attention of chosen columns `rows` (batch, r) over all current ones, (batch, heads, r, n) float32.

        Mass on cached keys and on sinks counts in the softmax and is then left out.
        """
        return decoder_attention_rows(self._queries(rows), self._keys, rows, self.context)

    def blocks_of_rows(self, rows: Tensor, valid: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The same for many rows, a few at a time: columns (batch, r), their `valid` flags, and their attention.

        All rows of a long text at once would be large.
        """
        for part, real in zip(rows.split(ROWS_AT_A_TIME, 1), valid.split(ROWS_AT_A_TIME, 1), strict=True):
            weights = self.rows(part)
            yield part, real.to(weights.device), weights

    def keys(self) -> Tensor:
        """(batch, kv heads, n, head dim): keys of all columns, positions applied."""
        return self.context.scored(None, self._keys).keys

    def everything(self) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Queries (batch, heads, n, head dim) of all columns, keys (batch, kv heads, past + n, head dim), positions
        applied, and the scale, cap and sinks of the scores, for the operations of `vtprune.ops` that work in blocks.

        Whoever builds n x n weights of it holds what no eager layer is asked for here: do not.
        """
        both = self.context.scored(self._queries(None), self._keys)
        return both.queries, self.context.all_keys(both.keys), bounds(both)

    def mask(self, first: int, last: int) -> Tensor:
        """(batch, 1, last - first, past + n) bool: which keys the columns from `first` to before `last` attend to."""
        return self._seen(first, last, None)

    def reached(self, first: int, last: int) -> Tensor:
        """The same without the last keys, where none of these columns attends to them."""
        return self._seen(first, last, last if self.context.blocks is None else None)

    def _seen(self, first: int, last: int, reach: int | None) -> Tensor:
        columns = torch.arange(first, last, device=self._keys.device).expand(len(self._keys), -1)
        return self.context.visible(columns, reach)[:, None]

    def counted(self, columns: Tensor) -> Tensor:
        """Of some columns (batch, n) bool those whose rows count where all are asked for: those of the prompt."""
        return self.context.counted(columns.to(self._keys.device))


def bounds(scores: Scored) -> dict[str, Any]:
    """How a layer scales and bounds its scores, as `vtprune.ops.attention` takes it."""
    return {"scale": scores.scale, "softcap": scores.softcap, "sinks": scores.sinks}
