# SPDX-License-Identifier: Apache-2.0
"""KV-cache layers that know their logical and their physical length.

After pruning, a layer stores fewer columns than the unpruned model would. `PrunedLayer` wraps one layer of a
transformers cache and reports the *logical* length (what the unpruned model would hold) wherever a length is asked
for, while masks are sized by the *physical* one, shifted by the number of dropped columns: the mechanism that
transformers' own sliding-window layers use, so every mask factory and `generate()` work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtprune.errors import UnsupportedStageError, VTPruneError
from vtprune.stages.slots import PerSample, Slots, Stored
from vtprune.transformers_private import (
    Cache,
    CacheLayerMixin,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    cache_of,
    create_missing_layers,
    has_keys,
    is_paged,
    is_plain_layer,
    is_prunable,
    keeps_prompt,
    with_cache,
)


@dataclass(frozen=True, eq=False)
class CacheLayout(PerSample):
    """How the physical columns of one cache layer relate to the unpruned sequence. Immutable; shared by layers."""

    dropped: int = 0
    """Columns the unpruned model would hold and this layer does not."""
    real: Tensor | None = None
    """(batch, physical) bool: False for padding; None if every column is real."""
    shift: Tensor | None = None
    """(batch, 1) long: what is subtracted from the positions of tokens to come (compact positions); None for zero."""

    def extend(self, length: int, real: Tensor | None, dropped: int, shift: Tensor | None, past: int) -> CacheLayout:
        """Layout once `length` more columns arrive: `real` (batch, length) or None, after `past` physical ones."""
        if self.real is None and real is None:
            joined = None
        else:
            old = real.new_ones(len(real), past) if self.real is None else self.real
            joined = pad(old, (0, length), value=True) if real is None else torch.cat([old, real.to(old.device)], 1)
        if shift is not None and self.shift is not None:
            shift = self.shift + shift
        return CacheLayout(dropped=self.dropped + dropped, real=joined, shift=self.shift if shift is None else shift)

    def mask(self) -> Tensor | None:
        """2D padding mask of logical length, as transformers' mask factories index it; None if all columns are real."""
        return None if self.real is None else pad(self.real, (self.dropped, 0), value=True)


class Owner:
    """Who pruned a cache; goes inactive with its session, after which the cache refuses to be used.

    Copies of a cache have the same owner; one that another process has written has one that is gone.
    """

    def __init__(self):
        self.active = True
        self.key = uuid4().hex
        _OWNERS[self.key] = self

    def __copy__(self) -> Owner:
        return self

    def __deepcopy__(self, memo) -> Owner:
        return self

    def __reduce__(self):
        return _owner, (self.key,)


_OWNERS: WeakValueDictionary[str, Owner] = WeakValueDictionary()


def _owner(key: str) -> Owner:
    """The owner with a key; an inactive one if there is none here."""
    owner = _OWNERS.get(key)
    if owner is None:
        owner = Owner()
        owner.active = False
    return owner


class PrunedLayer(CacheLayerMixin):
    """Wraps a dynamic cache layer; everything it does not define is the inner layer's."""

    _own = ("inner", "owner", "layout", "slots", "stored")

    def __init__(self, inner: CacheLayerMixin, owner: Owner):
        self.__dict__.update(inner=inner, owner=owner, layout=CacheLayout())
        self.slots: Slots | None = None
        """Which token each column is, once some may come back in between; `layout.real` then says nothing."""
        self.stored: Stored | None = None
        """What may come back."""

    def __getattr__(self, name):
        if "inner" not in self.__dict__:  # while it is being copied
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)

    def __setattr__(self, name, value):
        if name in self._own:
            self.__dict__[name] = value
        else:
            setattr(self.inner, name, value)

    # Class attributes of the mix-in would hide the inner layer's values, hence properties.
    is_compileable = property(lambda self: self.inner.is_compileable)
    is_croppable = property(lambda self: self.inner.is_croppable)
    is_sliding = property(lambda self: getattr(self.inner, "is_sliding", False))
    _layer_type = property(lambda self: self.inner._layer_type)
    supports_early_init = property(lambda self: self.inner.supports_early_init)

    @property
    def physical(self) -> int:
        """Number of columns stored."""
        return int(self.inner.get_seq_length())

    def get_seq_length(self) -> int:
        return self.inner.get_seq_length() + self.layout.dropped

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        length, offset = self.inner.get_mask_sizes(query_length)
        return length, offset + self.layout.dropped

    def padding_mask(self) -> Tensor | None:
        """See `CacheLayout.mask`."""
        return self.layout.mask()

    def get_max_length(self) -> int:
        return self.inner.get_max_length()

    def lazy_initialization(self, *args, **kwargs) -> None:
        self.inner.lazy_initialization(*args, **kwargs)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if not self.owner.active:
            raise VTPruneError(
                "this KV cache was pruned in a vtprune session that has been removed; start a new one, or keep the "
                "session open for as long as its cache is used"
            )
        return self.inner.update(key_states, value_states, *args, **kwargs)

    def evict(self, index: Tensor, real: Tensor | None) -> None:
        """Keep the columns `index` (batch, m) of those stored, `real` (batch, m) of them (None: all)."""
        gone = self.physical - index.shape[1]
        index = index[:, None, :, None]
        self.inner.keys, self.inner.values = (
            x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.inner.keys, self.inner.values)
        )
        self.layout = replace(self.layout, dropped=self.layout.dropped + gone, real=real, _derived={})

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.slots is not None:
            raise UnsupportedStageError(
                "tokens cannot be taken back from a KV cache that visual tokens come back to (assisted decoding); use "
                "a method that brings nothing back: fastv, transprune"
            )
        if tokens_to_remove and self.layout.real is not None:
            self.layout = replace(self.layout, real=self.layout.real[:, : -abs(tokens_to_remove)], _derived={})
        self.inner.crop(tokens_to_remove)

    def reset(self) -> None:
        self.layout, self.slots, self.stored = CacheLayout(), None, None
        self.inner.reset()

    def _derive(self, key: str, argument, make: Callable[[Tensor], Tensor]) -> None:
        for name in ("layout", "slots", "stored"):
            if (state := getattr(self, name)) is not None:
                setattr(self, name, state.derive(key, argument, make))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._derive("reorder", beam_idx, lambda t: t.index_select(0, beam_idx.to(t.device)))
        self.inner.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._derive("repeat", repeats, lambda t: t.repeat_interleave(repeats, 0))
        self.inner.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._derive("select", indices, lambda t: t[indices.to(t.device)])
        self.inner.batch_select_indices(indices)

    def offload(self) -> None:
        self.inner.offload()

    def prefetch(self) -> None:
        self.inner.prefetch()


class PrunedHybridLayer(PrunedLayer, LinearAttentionCacheLayerMixin):
    """The same for a layer that carries a state beside its keys and values; the state stays the inner layer's."""

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        return self.inner.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        return self.inner.update_recurrent_state(*args, **kwargs)

    def activate_past_recording(self) -> None:
        self.inner.activate_past_recording()


class PrunedPromptLayer(PrunedLayer):
    """The same for a layer that keeps the whole prompt, and a window of what follows it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if self.inner.prefill_length is not None and not self.inner.prefill_cumulative_length:
            # `generate()` told it how long the prompt would be.
            self.inner.prefill_length -= self.layout.dropped
        return super().update(key_states, value_states, *args, **kwargs)

    def padding_mask(self) -> Tensor | None:
        # The mask factories take the columns behind the prompt for those in front of it once the window has left some.
        left = self.inner.get_mask_sizes(1)[1]
        if self.layout.real is None or not left:
            return super().padding_mask()
        prompt, answer = self.layout.real.tensor_split([self.inner.prefill_length], 1)
        return pad(torch.cat([prompt, answer[:, left:]], 1), (self.layout.dropped + left, 0), value=True)


def pruned_layers(cache: Cache | None) -> list[PrunedLayer]:
    """The wrapped layers of a cache; empty if it was never pruned.

    One for each decoder layer, unless some hold a state instead of keys and values: these are never wrapped.
    """
    if cache is None or is_paged(cache):
        return []
    return [layer for layer in cache.layers if isinstance(layer, PrunedLayer)]


def as_stored(cache: Cache) -> Cache:
    """The same cache, whose layers state how many columns they hold. What is written to them is written to `cache`."""
    stored = copy(cache)
    stored.layers = [layer.inner if isinstance(layer, PrunedLayer) else layer for layer in cache.layers]
    return stored


def count_what_is_stored(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """A hook that hands a module the KV cache with the lengths that its layers hold."""
    cache = cache_of(kwargs)
    return (args, with_cache(module, kwargs, as_stored(cache))) if pruned_layers(cache) else None


def check_cache(cache: Cache, owner: Owner) -> None:
    """Raise unless a cache can be pruned by this owner; nothing is changed."""
    if is_paged(cache):
        raise UnsupportedStageError(
            f"visual tokens cannot be pruned with a {type(cache).__name__} (continuous batching); use generate() with "
            "the default dynamic cache"
        )
    for layer in cache.layers:
        if isinstance(layer, PrunedLayer):
            if layer.owner is not owner:
                raise VTPruneError("this KV cache was pruned in another vtprune session; start with a new cache")
            continue
        if getattr(layer, "owner", owner) is not owner:
            raise VTPruneError("this KV cache was pruned in another vtprune session; start with a new cache")
        if not is_prunable(layer) and not isinstance(cache, StaticCache):
            raise UnsupportedStageError(
                f"visual tokens cannot be pruned with a {type(layer).__name__} cache layer; use the default dynamic "
                "cache"
            )


def check_first_turn(cache: Cache | None, past: int) -> None:
    """Raise UnsupportedStageError unless tokens can go missing behind the `past` columns that a cache holds."""
    if past and any(keeps_prompt(layer) for layer in cache.layers):
        raise UnsupportedStageError(
            "visual tokens cannot be pruned in a later turn on a KV cache that keeps its first prompt, and a window of "
            "what follows; send the whole conversation with a new cache"
        )


def check_changeable(cache: Cache) -> None:
    """Raise UnsupportedStageError unless columns can leave a pruned cache, and join it, after the prefill."""
    for layer in pruned_layers(cache):
        if not is_plain_layer(layer.inner) and not layer.is_sliding:
            raise UnsupportedStageError(
                f"tokens cannot be evicted from, or come back to, a {type(layer.inner).__name__} cache layer; use "
                "the default dynamic cache"
            )


def wrap_cache(cache: Cache, owner: Owner, num_layers: int) -> None:
    """Wrap every layer of a cache that holds keys, in place (idempotent), creating those that transformers would create
    lazily."""
    create_missing_layers(cache, num_layers)
    for i, layer in enumerate(cache.layers):
        if has_keys(layer) and not isinstance(layer, PrunedLayer):
            has_state = isinstance(layer, LinearAttentionCacheLayerMixin)
            wrapper = PrunedPromptLayer if keeps_prompt(layer) else PrunedHybridLayer if has_state else PrunedLayer
            cache.layers[i] = wrapper(layer, owner)
