# SPDX-License-Identifier: Apache-2.0
"""Once after the prefill: drops visual tokens from the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vtprune.devices import send
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.base import AfterPrefill, Method
from vtprune.signals import CacheSignal
from vtprune.stages.cache import PrunedLayer, check_changeable
from vtprune.stages.call import Call
from vtprune.stages.cutting import idle_separators
from vtprune.stages.layout import Groups, SequenceLayout, compact_columns, spread_columns, take_columns
from vtprune.stages.reading import Chooser, visual_tokens
from vtprune.stages.slots import CacheContents
from vtprune.tokens import ModelShape

NEEDS_CACHE = "what happens to the KV cache while decoding needs one: use_cache=True"


@dataclass(frozen=True)
class _CacheView:
    """See `vtprune.signals.CacheView`."""

    call: Call
    sequence: SequenceLayout
    groups: Groups

    def read(self, signal: CacheSignal) -> Any:
        return signal.read_cache(self)

    def alive(self, layer: int) -> Tensor:
        other = self.call.sequence if layer == -1 else self.call.sequence_at(layer)
        alive = spread_columns(other.columns, other.visual, self.call.length)
        return self.groups.gather(take_columns(alive, self.sequence.columns))


class EvictionStage:
    """What is dropped from the KV cache that a prefill filled."""

    def __init__(self, methods: Sequence[Method], shape: ModelShape, choose: Chooser):
        self.shape = shape
        self.choose = choose
        self.methods = [method for method in methods if isinstance(method, AfterPrefill)]
        if len(self.methods) > 1:
            names = " and ".join(method.name for method in self.methods)
            raise ConfigError(f"{names}: a KV cache is emptied once; leave one of them out")

    def check(self, replayed: bool) -> None:
        """Raise UnsupportedStageError if there is no cache: the prompt is sent again for every token."""
        if self.methods and replayed:
            raise UnsupportedStageError(NEEDS_CACHE)

    def after_prefill(self, call: Call, contents: CacheContents) -> None:
        """Drop what the methods drop, and note in `contents` what is left."""
        if not self.methods or call.cache is None or not call.pruned:
            return
        check_changeable(call.cache)
        for method in self.methods:
            self._evict(call, method)
        if call.left_in_cache:
            contents.columns = [
                (s.columns + call.past).masked_fill(~call.left_in_cache.get(i, s.computed), -1)
                for i, s in ((i, call.sequence_at(i)) for i in call.adapter.key_sources)
            ]

    def _evict(self, call: Call, method: AfterPrefill) -> None:
        made: dict[tuple[int, int, int], tuple[Tensor, PrunedLayer]] = {}
        for i in method.layers(self.shape):
            layer = call.cached(i)
            if layer.is_sliding or call.adapter.key_sources[i] != i:
                continue  # a window forgets by itself, and counts on its columns being consecutive
            sequence = call.sequence_at(i)
            past = call.before[i][1]
            groups = call.sample_groups(sequence)
            tokens = visual_tokens(
                method,
                self.shape,
                groups,
                groups.gather(rearrange(layer.inner.keys[:, :, past:], "b h n d -> b n (h d)")),
                _CacheView(call, sequence, groups).read,
                budget=torch.full((call.batch,), -1),
                layer=i,
            )
            keep = self.choose(method, tokens).on_host().keep
            left = groups.scatter(keep & groups.valid, sequence.visual)
            left &= ~idle_separators(call, left, sequence)
            lost = sequence.visual & ~left
            if not bool(lost.any()):
                continue
            stays = layer.layout.real
            stays = torch.ones(call.batch, layer.physical, dtype=torch.bool) if stays is None else stays.cpu().clone()
            stays[:, past:] &= ~lost
            index, real = compact_columns(stays)
            device = layer.inner.keys.device
            layer.evict(send(index, device), None if bool(real.all()) else send(real, device))
            # Layers that hold the same, also of earlier turns, share one layout, and so their masks.
            same = made.get(call.key(i))
            if same is not None and torch.equal(same[0], left):
                layer.layout = same[1].layout
            made[call.key(i)] = left, layer
            call.left_in_cache[i] = left
