# SPDX-License-Identifier: Apache-2.0
"""Static caches: once the tokens are chosen, all lengths are known, and decoding needs no cache that grows.

A prefill that prunes fills layers that grow, which take the places of the static ones as it begins (`grow`). As it ends
(`settle`), each layer's keys and values are copied into buffers of as many columns as the layer holds, and as the
static cache had left for what is generated. From then on each token is one step of the same shape: what a layer sees
of its columns follows from the cache alone, so that the steps can be compiled, and nothing of them depends on the
session's state (`enter_step`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.adapters.base import Adapter
from vtprune.attention import Places
from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.graphs import OUTSIDE
from vtprune.stages.cache import CacheLayout, PrunedLayer
from vtprune.stages.layout import last_axis
from vtprune.stages.slots import PerSample
from vtprune.transformers_private import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    StaticCache,
    attention_back_end,
    attention_window,
    by_name,
    cache_of,
    fixed_address,
    has_keys,
    layer_mask,
    layer_type,
    static_columns,
)

_BACK_ENDS = ("eager", "sdpa")
"""Attention back ends that take a mask over columns that are not filled yet."""


@dataclass(frozen=True, eq=False)
class FixedLayout(PerSample):
    """How the columns of fixed cache layers relate to the unpruned sequence. Immutable; shared by layers."""

    number: int
    """Which of the cache's layouts it is; layer 0 has number 0."""
    dropped: int
    """Columns the unpruned model would hold and these layers do not."""
    padding: Tensor | None
    """(batch, limit) bool, as transformers' mask factories index it: False for padding; None if all columns are real,
    those to be filled included."""
    shift: Tensor | None
    """(batch, 1) long: what is subtracted from the positions of tokens to come (compact positions); None for zero."""


@dataclass(frozen=True)
class View:
    """What a decoder layer is handed in a step of one token."""

    mask: Any
    """In the form that the attention back end wants."""
    places: Places
    """Of the token."""


class FixedLayer(CacheLayerMixin):
    """A layer of a static cache once its prefill is pruned: keys and values in buffers of a fixed number of columns."""

    is_compileable = True
    is_croppable = True
    is_sliding = False

    def __init__(self, grown: PrunedLayer, layout: FixedLayout, limit: int):
        """grown: what the prefill has filled. limit: columns of the unpruned sequence that the static cache is for."""
        inner = grown.inner
        self.owner, self.layout, self.limit = grown.owner, layout, limit
        self.is_sliding = grown.is_sliding
        self.prompt = stored = inner.keys.shape[-2]
        self.forgotten = grown.physical - stored
        """Columns that went out of the layer's window during the prefill."""
        self.columns = stored + limit - grown.get_seq_length()
        self.keys, self.values = (
            fixed_address(pad(states, (0, 0, 0, self.columns - stored))) for states in (inner.keys, inner.values)
        )
        self.batch_size, self.device = len(self.keys), self.keys.device
        self.filled = fixed_address(torch.tensor(stored, device=self.device))
        """() long: columns that hold a token."""
        self.views: dict[int, View] = {}
        """In the first layer of a cache, during a step: decoder layer -> what it is handed, if not the same as layer
        0."""
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to be made."""

    @property
    def offset(self) -> int:
        """Columns of the unpruned sequence before the first one stored, as the number of those that are missing."""
        return self.layout.dropped + self.forgotten

    def get_seq_length(self) -> Tensor:
        return self.filled + self.offset

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns, self.offset

    def get_max_length(self) -> int:
        return self.limit

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.owner.active:
            raise VTPruneError(
                "this KV cache was pruned in a vtprune session that has been removed; start a new one, or keep the "
                "session open for as long as its cache is used"
            )
        places = torch.arange(key_states.shape[-2], device=self.device) + self.filled
        self.filled.add_(key_states.shape[-2])
        self.keys.index_copy_(2, places, key_states)
        self.values.index_copy_(2, places, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        if int(self.filled) - abs(tokens_to_remove) < self.prompt:
            raise UnsupportedStageError("tokens of a pruned prompt cannot be taken back from a static cache")
        self.filled.sub_(abs(tokens_to_remove))

    def reset(self) -> None:
        self.layout = FixedLayout(number=0, dropped=0, padding=None, shift=None)
        self.forgotten = self.prompt = 0
        self.filled.zero_()

    def _derive(self, key: str, argument, make) -> None:
        self.layout = self.layout.derive(key, argument, make)
        self.keys, self.values = make(self.keys), make(self.values)
        self.batch_size = len(self.keys)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._derive("reorder", beam_idx, lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._derive("repeat", repeats, lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._derive("select", indices, lambda t: t[indices.to(t.device)])


def first_fixed(cache: Cache | None) -> FixedLayer | None:
    """The first layer of a static cache whose prefill was pruned; None for all other caches."""
    if not isinstance(cache, StaticCache):
        return None
    for layer in cache.layers:
        if isinstance(layer, FixedLayer):
            return layer
    return None


def in_step(args: tuple, kwargs: Mapping[str, Any]) -> bool:
    """Whether a model, or a part of it, is called with one token, to follow those that a static cache holds."""
    cache = cache_of(kwargs)
    if not isinstance(cache, StaticCache):
        return False
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if kwargs.get(name) is not None:
            tokens = kwargs[name]
            break
    else:
        if not args:
            return False
        tokens = args[0]
    return tokens.shape[1] == 1 and any(has_keys(layer) and layer.is_initialized for layer in cache.layers)


def stays_as_it_is(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], *output):
    """In a graph of such a step, for a hook that does nothing then."""
    return None if in_step(args, kwargs) else OUTSIDE


def check_static(cache: Cache, config: Any, length: int, reviving: str | None) -> None:
    """Raise UnsupportedStageError unless `length` more tokens can be pruned into a static cache; nothing is changed.

    config: of the language model. reviving: name of a method that brings tokens back into the cache, if there is one.
    """
    if reviving:
        raise UnsupportedStageError(
            f"{reviving} brings tokens back into the KV cache, which a static cache has no room for; use the default "
            "dynamic cache, or a method that brings nothing back: fastv, transprune"
        )
    if cache.offloading:
        raise UnsupportedStageError(
            "visual tokens cannot be pruned in a static cache that is offloaded; use cache_implementation='static' or "
            "'offloaded'"
        )
    back_end = attention_back_end(config)
    if back_end not in _BACK_ENDS:
        raise UnsupportedStageError(
            f"visual tokens cannot be pruned in a static cache with attn_implementation={back_end!r}; load the model "
            "with 'sdpa', or use the default dynamic cache"
        )
    for layer in cache.layers:
        if has_keys(layer) and not isinstance(layer, FixedLayer) and static_columns(layer) is None:
            raise UnsupportedStageError(
                f"visual tokens cannot be pruned with a {type(layer).__name__} cache layer; use the default dynamic "
                "cache"
            )
    limit, past = _limit(cache, config), int(cache.get_seq_length())
    if past + length > limit:
        raise VTPruneError(
            f"the static cache is for {limit} columns, and {past + length} tokens came; make it for the whole prompt "
            "and what is generated: what pruning saves is not allocated"
        )


def _limit(cache: Cache, config: Any) -> int:
    """Columns of the unpruned sequence that a static cache is for."""
    limits = [layer.limit if isinstance(layer, FixedLayer) else static_columns(layer) for layer in cache.layers]
    limit = max(columns for columns in limits if columns is not None)
    if all(layer.is_sliding for layer in cache.layers if has_keys(layer)) and limit == attention_window(config):
        raise UnsupportedStageError(
            "visual tokens cannot be pruned in a static cache all of whose layers have a full sliding window, which "
            "does not tell how many tokens are to come; use the default dynamic cache"
        )
    return limit


def grow(cache: Cache, config: Any) -> int:
    """Put layers that grow into the places of a static cache's, with what these hold; returns what it was `settle` made
    for: columns of the unpruned sequence."""
    limit = _limit(cache, config)
    growing = DynamicCache(config=config).layers
    layouts: dict[FixedLayout, CacheLayout] = {}
    for i, layer in enumerate(cache.layers):
        if not has_keys(layer):
            continue
        grown, fixed = growing[i], isinstance(layer, FixedLayer)
        seen = int(layer.get_seq_length())
        stored = int(layer.filled) if fixed else min(seen, static_columns(layer))
        if stored:
            grown.update(layer.keys[:, :, :stored], layer.values[:, :, :stored])
        if layer.is_sliding and stored:
            grown.cumulative_length = stored + layer.forgotten if fixed else seen
        if fixed:
            grown, layout = PrunedLayer(grown, layer.owner), layer.layout
            if layout not in layouts:
                real = None if layout.padding is None else layout.padding[:, layout.dropped : seen]
                layouts[layout] = CacheLayout(dropped=layout.dropped, real=real, shift=layout.shift)
            grown.layout = layouts[layout]
        cache.layers[i] = grown
    return limit


def settle(cache: Cache, limit: int) -> None:
    """Put layers of a fixed length into the places of those that a prefill has filled.

    limit: columns of the unpruned sequence that they are to have room for.
    """
    layouts: dict[CacheLayout, FixedLayout] = {}
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, PrunedLayer):
            if layer.layout not in layouts:
                layouts[layer.layout] = _fixed(layer.layout, len(layouts), limit)
            cache.layers[i] = FixedLayer(layer, layouts[layer.layout], limit)


def _fixed(layout: CacheLayout, number: int, limit: int) -> FixedLayout:
    padding = layout.mask()
    if padding is not None:
        padding = fixed_address(pad(padding, (0, limit - padding.shape[1]), value=True))
    shift = layout.shift if layout.shift is None else fixed_address(layout.shift.clone())
    return FixedLayout(number=number, dropped=layout.dropped, padding=padding, shift=shift)


def enter_step(adapter: Adapter, cache: Cache, first: FixedLayer, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's arguments for one more token on a static cache whose prefill was pruned.

    Notes in the layer `first` what decoder layers are handed that see other columns than layer 0.
    """
    hidden, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
    changed = {**kwargs, "attention_mask": first.layout.padding}
    if first.layout.shift is not None:
        changed["position_ids"] = _moved(positions, cache, first.layout)
    views: dict[int, View] = {}
    made: dict[tuple, Any] = {}
    config = adapter.text_config
    for i, source in enumerate(adapter.key_sources):
        layer = cache.layers[source]
        if not isinstance(layer, FixedLayer) or layer.layout.number == 0:
            continue
        kind, layout = layer_type(config, i), layer.layout
        mask, rope = ("mask", kind, layout.number), ("rope", adapter.rope_kinds[i], layout.number)
        if mask not in made:
            made[mask] = layer_mask(config, kind, hidden, layout.padding, cache, source, None, False)
        if rope not in made:
            places = _moved(positions, cache, layout).to(hidden.device)
            made[rope] = Places(last_axis(places), adapter.rope(i, hidden, places))
        views[i] = View(made[mask], made[rope])
    first.views = views
    return changed


def enter_layer(
    views: Mapping[int, View], i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of decoder layer `i` in such a step; None if they stay."""
    if i not in views:
        return None
    view = views[i]
    args, kwargs = by_name(module, args, dict(kwargs))
    kwargs |= {"attention_mask": view.mask, "position_embeddings": view.places.rope}
    if kwargs.get("position_ids") is not None:  # which some layers scale their queries by
        kwargs["position_ids"] = view.places.ids
    return args, kwargs


def layer_in_graph(
    i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | object | None:
    """The same in a graph; `OUTSIDE` if the call is no such step."""
    if not in_step(args, kwargs):
        return OUTSIDE
    first = first_fixed(cache_of(kwargs))
    return None if first is None else enter_layer(first.views, i, module, args, kwargs)


def leave_step(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> object | None:
    """In a graph, behind the last layer of a step; `OUTSIDE` if the call is no such step."""
    if not in_step(args, kwargs):
        return OUTSIDE
    if (first := first_fixed(cache_of(kwargs))) is not None:
        first.views = {}
    return None


def _moved(positions: Tensor | None, cache: Cache, layout: FixedLayout) -> Tensor:
    """(..., batch, 1): the position of the next token in layers of a layout; `positions`: in the unpruned sequence."""
    if positions is None:
        positions = cache.get_seq_length().reshape(1, 1)
    return positions if layout.shift is None else (positions - layout.shift.to(positions.device)).clamp(min=0)
