# SPDX-License-Identifier: Apache-2.0
"""A call of text alone on a pruned cache, as each generated token is: nothing is cut, and each decoder layer goes on
where its cache stands.

As little as possible is done for it. What the model computes for all its layers is made to fit the first one; only
layers that need other positions or another mask are given them. Without padding a single token needs no mask at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.devices import send
from vtprune.stages.cache import CacheLayout, PrunedLayer
from vtprune.stages.hooks import hidden_of
from vtprune.stages.incoming import Columns, check_of_columns, positions_of
from vtprune.stages.layout import counted_from, last_axis
from vtprune.transformers_private import (
    Cache,
    ask_for_all_rows,
    by_name,
    layer_kinds,
    layer_mask,
    layer_type,
    rotates_by_position_alone,
    step_mask,
    unmasked_steps,
)


@dataclass
class Continuation:
    """What decoder layers are given that cannot use what the model computes for all of them."""

    adapter: Adapter
    config: Any
    """Of the language model."""
    cache: Cache
    layers: Sequence[PrunedLayer]
    """By decoder layer: the cache layer whose keys it reads."""
    length: int
    """Tokens that came in."""
    positions: Tensor
    """(..., batch | 1, length): their position ids as they came."""
    shifts: Sequence[Tensor | None]
    """By decoder layer: (batch, 1), what is subtracted from these."""
    masks: Sequence[Hashable]
    """By decoder layer: what its mask depends on; None if it is that of the first layer."""
    ropes: Sequence[Hashable]
    """By decoder layer: what its rotary embeddings depend on; None if they are those of the first layer."""
    memo: dict[Hashable, Any] = field(default_factory=dict)
    """Masks and rotary embeddings already made."""

    def arguments(
        self, i: int, module: Any, args: tuple, kwargs: dict[str, Any], reads_positions: bool
    ) -> tuple[tuple, dict[str, Any]] | None:
        """The arguments that a decoder layer is to be called with; None for those it is called with."""
        if self.masks[i] is None and self.ropes[i] is None:
            return None
        args, kwargs = by_name(module, args, kwargs)
        key = "given", self.masks[i], self.ropes[i], reads_positions
        if key not in self.memo:
            hidden = self.adapter.token_states(hidden_of(args, kwargs))
            self.memo[key] = self._given(i, hidden, reads_positions)
        kwargs.update(self.memo[key])
        return args, kwargs

    def _given(self, i: int, hidden: Tensor, reads_positions: bool) -> dict[str, Any]:
        """The arguments by which a call of a decoder layer is to differ; hidden: states that enter it."""
        mask, rope, given = self.masks[i], self.ropes[i], {}
        if mask is not None:
            if mask not in self.memo:
                self.memo[mask] = self._mask(i, hidden)
            given["attention_mask"] = self.memo[mask]
        if rope is not None:
            if rope not in self.memo:
                self._make_ropes(i, hidden)
            given["position_embeddings"] = self.memo[rope]
            # Attention back ends read position ids to detect packed sequences, which is for the model to do.
            places = last_axis(_moved_back(self.positions, self.shifts[i])) if reads_positions else None
            given["position_ids"] = places
        return given

    def _mask(self, i: int, hidden: Tensor) -> Any:
        kind, layer = layer_type(self.config, i), self.layers[i]
        real = layer.layout.real
        # Layers may have forgotten some columns by themselves.
        if self.length == 1 and real is not None and real.shape[1] == layer.get_mask_sizes(1)[0]:
            mask = step_mask(self.config, kind, real)
            if mask is not None:
                return mask.to(hidden.device)
        return layer_mask(self.config, kind, hidden, layer.padding_mask(), self.cache, i, None, False)

    def _make_ropes(self, i: int, hidden: Tensor) -> None:
        """Rotary embeddings of this layer, and of the others of its kind: all at once where that gives the same."""
        kind, shifts = self.adapter.rope_kinds[i], [self.shifts[i]]
        if rotates_by_position_alone(self.config):
            shifts = list({id(shift): shift for shift in self.shifts}.values())[1:]
        known = next(shift for shift in self.shifts if shift is not None)
        moved = torch.stack([known.new_zeros(known.shape) if shift is None else shift for shift in shifts])
        places = (self.positions.unsqueeze(-3) - moved.to(self.positions.device)).clamp(min=0)
        ropes = self.adapter.rope(i, hidden, places.flatten(-3, -2).to(hidden.device))
        ropes = [ropes] if len(shifts) == 1 else _parted(ropes, len(shifts))
        self.memo |= {("rope", kind, id(shift)): rope for shift, rope in zip(shifts, ropes, strict=True)}


def _parted(ropes: Any, parts: int) -> Sequence[Any]:
    """Rotary embeddings of so many batches that were made as one: tensors (..., batches, n, rotary dim), or several."""
    if ropes is None:
        return [None] * parts
    if torch.is_tensor(ropes):
        return ropes.chunk(parts, -3)
    return [type(ropes)(rope) for rope in zip(*(_parted(rope, parts) for rope in ropes), strict=True)]


def _moved_back(positions: Tensor, shift: Tensor | None) -> Tensor:
    """Position ids (..., batch | 1, n) less a layout's shift (batch, 1)."""
    return positions if shift is None else (positions - shift.to(positions.device)).clamp(min=0)


def go_on(
    adapter: Adapter,
    config: Any,
    cache: Cache,
    pruned: list[PrunedLayer],
    hidden: Tensor,
    kwargs: dict[str, Any],
    mask: Any,
) -> tuple[dict[str, Any], Continuation | None]:
    """Prepare a call of the language model on embeddings (batch, length, dim) behind a pruned cache.

    config: of the language model. pruned: the wrapped layers of the cache. kwargs: the language model's arguments.
    mask: what the outer model was called with.
    Returns the arguments to call it with, and what its layers are given; None if they are right without.
    Raises UnsupportedStageError for a mask that is not of columns.
    """
    length = hidden.shape[1]
    layouts = list({id(layer.layout): layer.layout for layer in pruned}.values())
    padded = any(layout.real is not None for layout in layouts)
    moved = any(layout.shift is not None for layout in layouts)
    uneven = len(layouts) > 1 and len({layout.dropped for layout in layouts}) > 1
    if uneven and not padded and length == 1 and unmasked_steps(config):
        # A window that is full is masked, although nothing in it is.
        uneven = any(layer.is_sliding for layer in pruned)
    kwargs = {**kwargs, "attention_mask": None}
    if length == 1 and not (padded or uneven or moved):
        return kwargs, None
    arriving = None
    if length == 1:  # which is never padding
        check_of_columns(mask)
        positions = positions_of(hidden, kwargs, lambda: int(cache.get_seq_length()))
    else:
        columns = Columns.of(hidden, kwargs, mask, has_images=False)
        positions = columns.positions
        arriving = None if bool(columns.real.all()) else columns.real
    padded = padded or arriving is not None
    layers = [cache.layers[source] for source in adapter.key_sources]
    # A layer that carries a state has what all others have: where such layers are, nothing is cut between.
    layers = [layer if isinstance(layer, PrunedLayer) else pruned[0] for layer in layers]
    shifts = [layer.layout.shift for layer in layers]
    masks: list[Hashable] = [None] * len(layers)
    # What a layer stores takes a while to read, and many read the keys of one layer.
    stored = {id(layer): layer.physical for layer in pruned} if padded or uneven else {}
    if padded or uneven:
        # Layers that have stored the same columns see the same ones.
        states = [(id(layer.layout), stored[id(layer)]) for layer in layers]
        kinds = layer_kinds(config, len(layers))
        masks = [None if s == states[0] else ("mask", kind, *s) for kind, s in zip(kinds, states, strict=True)]
        if length > 1:
            ask_for_all_rows(kwargs)
    if padded:
        shift = None if arriving is None else _overcounted(arriving, positions)
        _extend(pruned, stored, length, None if arriving is None else send(arriving, hidden.device), shift)
        kwargs["attention_mask"] = layers[0].padding_mask()
    ropes: list[Hashable] = [None] * len(layers)
    if moved:
        ropes = [
            None if s is shifts[0] else ("rope", k, id(s)) for k, s in zip(adapter.rope_kinds, shifts, strict=True)
        ]
        kwargs["position_ids"] = _moved_back(positions, shifts[0])
    if not any(masks) and not any(ropes):
        return kwargs, None
    return kwargs, Continuation(adapter, config, cache, layers, length, positions, shifts, masks, ropes)


def _extend(
    pruned: Sequence[PrunedLayer], stored: Mapping[int, int], length: int, real: Tensor | None, shift: Tensor | None
) -> None:
    """Tell cache layers that `length` more columns arrive, `real` (batch, length) of them; None for all.

    stored: `id` of a layer -> columns that it stores. shift: (batch, 1) positions that tokens behind them must be moved
    back by.
    """
    longer: dict[tuple[int, int], CacheLayout] = {}
    for layer in pruned:
        layout, physical = layer.layout, stored[id(layer)]
        key = id(layout), physical
        if key not in longer:
            longer[key] = layout.extend(length, real, 0, shift, physical)
        layer.layout = longer[key]


def _overcounted(real: Tensor, positions: Tensor) -> Tensor | None:
    """(batch, 1): by how much callers count too far, who count on from the last column; None if that is no padding.

    real (batch, n) bool, on the CPU; positions (..., batch | 1, n).
    """
    if bool(real[:, -1].all()):
        return None
    columns = torch.arange(real.shape[1]).expand_as(real)
    ends = columns[:, -1:], torch.where(real, columns, 0).amax(1, keepdim=True)
    positions = positions.expand(*positions.shape[:-2], *real.shape)
    last, end = (counted_from(positions, columns) for columns in ends)
    return last - end
