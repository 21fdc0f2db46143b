# SPDX-License-Identifier: Apache-2.0
"""Calls of a language model on static caches: prefills that are pruned into one, and the steps of one token after."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vtprune.adapters.base import Adapter
from vtprune.callers import ThreadAware
from vtprune.graphs import OUTSIDE
from vtprune.stages.cache import Owner, check_cache
from vtprune.stages.hooks import Wrapped
from vtprune.stages.static_cache import FixedLayer, check_static, enter_step, first_fixed, grow, in_step, settle
from vtprune.transformers_private import Cache, StaticCache, cache_of

_PREPARE, _MASK = "prepare_inputs_for_generation", "attention_mask"


@dataclass
class _Following:
    """What one thread is doing."""

    made: Any = None
    """The mask that `generate()` made for the call to come, over the columns of the cache."""
    made_of: Tensor | None = None
    """(batch, columns): the 2D mask that it made it of."""
    limit: int | None = None
    """Columns of the unpruned sequence that the static cache is for which is being pruned into; None if none is."""


class StaticStage(ThreadAware[_Following]):
    """Prunes into static caches, each thread's by themselves."""

    def __init__(self, adapter: Adapter, reviving: str | None):
        """reviving: name of a method that brings tokens back into the cache, if there is one."""
        super().__init__(_Following)
        self.adapter = adapter
        self.reviving = reviving

    def install(self) -> Iterator[Wrapped]:
        """Yields what takes each hook off again, as soon as it is on."""
        if hasattr(self.adapter.model, _PREPARE):
            yield Wrapped(self.adapter.model, _PREPARE, self._note_mask)

    def _note_mask(self, prepare: Callable) -> Callable:
        """For caches of a fixed length `generate()` makes masks ahead, which hide what of the prompt is padding."""

        @functools.wraps(prepare)
        def noting(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            now, made = self.now, prepared.get(_MASK)
            known = _MASK in kwargs and made is not kwargs[_MASK]
            now.made, now.made_of = (made, kwargs[_MASK]) if known else (None, None)
            return prepared

        return noting

    def padding(self, mask: Any) -> Any:
        """The 2D mask that `generate()` made the mask of a call of; the mask itself if it made none."""
        now = self.now
        if now.made is not None and mask is not None and _all(mask) == _all(now.made):
            mask = now.made_of
        now.made = now.made_of = None
        return mask

    def begin(self, cache: Cache | None, length: int) -> None:
        """Let a static cache take a call of `length` tokens that is pruned, or continues one that was.

        Raises UnsupportedStageError or VTPruneError if it cannot; nothing is changed then.
        """
        self.now.limit = None
        if not isinstance(cache, StaticCache):
            return
        config = self.adapter.language_model.config
        check_static(cache, config, length, self.reviving)
        self.now.limit = grow(cache, config)

    @property
    def prunes(self) -> bool:
        """Whether the call at hand is pruned into a static cache, or continues one."""
        return self.now.limit is not None

    def enter_step(self, cache: Cache, first: FixedLayer, kwargs: dict[str, Any], owner: Owner) -> dict[str, Any]:
        """The language model's arguments for one more token on a static cache that was pruned."""
        if first.owner is not owner:
            check_cache(cache, owner)
        return enter_step(self.adapter, cache, first, kwargs)

    def settle(self, cache: Cache | None) -> None:
        """What a call has put into a static cache stands in it from now on."""
        limit, self.now.limit = self.now.limit, None
        if limit is not None:
            settle(cache, limit)


def _all(mask: Any) -> dict[str, int | None]:
    """Which tensor a mask is, or each of them if a model has several; None where it needs none."""
    masks = mask if isinstance(mask, dict) else {"": mask}
    return {kind: None if one is None else id(one) for kind, one in masks.items()}


def step_in_graph(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | object | None:
    """For the hook before the language model, in a graph: the arguments for one more token on a static cache, None if
    that was not pruned; `OUTSIDE` if the call is no such step."""
    if not in_step(args, kwargs):
        return OUTSIDE
    kwargs = self.adapter.embedded(kwargs)
    cache = cache_of(kwargs)
    first = first_fixed(cache)
    return None if first is None else (args, enter_step(self.adapter, cache, first, kwargs))
