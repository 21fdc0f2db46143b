# SPDX-License-Identifier: Apache-2.0
"""After prefill: evicts visual tokens from the KV cache, and brings tokens back for the tokens being generated.

Eviction happens once, when the prefill is over. With revival, every later call chooses anew at each cut, among all
visual tokens that got there: a chosen token whose keys a layer lacks is computed there beside the new tokens, from the
hidden state that was put aside when it was cut. So each token is computed at most once in each layer.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.cache import PrunedLayer, pruned_layers
from vtprune.callers import PerThread
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.layout import Groups, Segment, compact_columns, last_axis, take_columns
from vtprune.methods.base import AfterPrefill, InLLM, Method, Reviving
from vtprune.signals import AliveInLastLayer, LastQueryAttention, Places, cached_attention_row
from vtprune.slots import Aside, Holdings, PromptTable, Slots
from vtprune.stages.before_llm import Chooser
from vtprune.stages.call import Call
from vtprune.stages.hooks import hidden_of, with_hidden
from vtprune.stages.incoming import Columns
from vtprune.tokens import ModelShape, VisualTokens
from vtprune.transformers_private import Cache, attention_back_end, is_plain_layer, layer_type, reads_positions


@dataclass
class _Step:
    """One call of the language model on a cache that tokens may come back to."""

    layers: list[PrunedLayer]
    table: PromptTable
    new: Tensor
    """(batch, q) long: columns of the sequence of the tokens that came in, -1 for padding."""
    new_positions: Tensor
    """(..., batch, q)"""
    chosen: Tensor
    """(batch, columns of the prompt) bool: visual tokens that the layer at hand sees."""
    revived: Tensor
    """(batch, f) long: columns of the tokens that are computed again beside the new ones, which stand behind them."""
    views: dict[int, _View] = field(default_factory=dict)
    """By number of cuts passed: the layers between two cuts share one."""


@dataclass
class _Following:
    """What one thread is doing."""

    step: _Step | None = None
    """None outside of such a call."""
    queries: Tensor | None = None
    """Output of `q_proj` of the layer before the next cut."""


@dataclass
class _View:
    """What the decoder layers between two cuts are given."""

    slots: Slots
    """With the tokens of this step."""
    mask: Tensor
    """(batch, 1, f + q, physical), to be added to attention scores."""
    places: Places
    """Of the tokens computed in this step."""


class DecodeStage:
    """What happens to the KV cache of a prefill afterwards."""

    def __init__(self, adapter: Adapter, methods: Sequence[Method], shape: ModelShape, choose: Chooser):
        self.adapter = adapter
        self.shape = shape
        self.choose = choose
        self.evicting = [method for method in methods if isinstance(method, AfterPrefill)]
        self.reviving = next((method for method in methods if isinstance(method, Reviving)), None)
        self.cuts = () if self.reviving is None else self.reviving.cuts(shape)
        if len(self.evicting) > 1:
            names = " and ".join(method.name for method in self.evicting)
            raise ConfigError(f"{names}: a KV cache is emptied once; leave one of them out")
        if self.reviving is not None:
            self._check_model(methods)
        self._following = PerThread(_Following)

    def _check_model(self, methods: Sequence[Method]) -> None:
        name, config = self.reviving.name, self.adapter.text_config
        others = [m.name for m in methods if isinstance(m, InLLM | AfterPrefill) and m is not self.reviving]
        if others:
            raise ConfigError(f"{name} cannot be combined with {others[0]}: what that drops inside the LLM is gone")
        if any(layer_type(config, layer) != "full_attention" for layer in range(self.shape.decoder_layers)):
            raise UnsupportedStageError(
                f"{name} brings tokens back into the KV cache, and decoder layers of this model have a sliding window, "
                "which forgets by itself; methods that bring nothing back work: fastv, transprune"
            )

    def __bool__(self) -> bool:
        return bool(self.evicting) or self.reviving is not None

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        if self.reviving is None:
            return
        for i, layer in enumerate(self.adapter.decoder_layers):
            yield layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True)
            if i + 1 in self.cuts:
                yield layer.self_attn.q_proj.register_forward_hook(self._watch)

    def end(self) -> None:
        """Forget the call."""
        self._following.renew()

    def forget(self) -> None:
        """Forget the calls of all threads."""
        self._following.clear()

    @property
    def now(self) -> _Following:
        """What the calling thread is doing."""
        return self._following()

    def check(self, call: Call, replayed: bool) -> None:
        """Raise UnsupportedStageError unless what a prefill leaves can be worked on; nothing is changed."""
        if replayed and self:
            raise UnsupportedStageError("what happens to the KV cache while decoding needs one: use_cache=True")
        if self.reviving is None or call.cache is None:
            return
        if call.wrapped:
            raise UnsupportedStageError(
                f"{self.reviving.name} takes images in one turn of a conversation only; start with a new cache"
            )
        back_end = attention_back_end(self.adapter.text_config)
        if back_end not in ("sdpa", "eager"):
            raise UnsupportedStageError(
                f"{self.reviving.name} brings tokens back into the middle of the KV cache, which {back_end} cannot "
                "mask: load the model with attn_implementation='sdpa'"
            )

    # -- once, after prefill ------------------------------------------------------------------------------------

    def after_prefill(self, call: Call, aside: dict[int, Aside]) -> Holdings:
        """Evict from the cache that a prefill filled, or note what may come back to it.

        aside: for each cut what it dropped on the input of its layer.
        Returns what the cache holds, which goes on saying so while tokens come back.
        """
        holdings = Holdings()
        if call.cache is None or not call.pruned or not self:
            return holdings
        for layer in pruned_layers(call.cache):
            if not is_plain_layer(layer.inner) and not layer.is_sliding:
                raise UnsupportedStageError(
                    f"tokens cannot be evicted from, or come back to, a {type(layer.inner).__name__} cache layer; use "
                    "the default dynamic cache"
                )
        for method in self.evicting:
            self._evict(call, method)
        if call.held:
            holdings.columns = [
                (s.columns + call.past).masked_fill(~call.held.get(i, s.computed), -1).cpu()
                for i, s in enumerate(map(call.segment_at, range(len(call.cache.layers))))
            ]
        if self.reviving is not None:
            self._note(call, aside, holdings)
        return holdings

    def _evict(self, call: Call, method: AfterPrefill) -> None:
        made: dict[int, tuple[Tensor, PrunedLayer]] = {}
        for i in method.layers(self.shape):
            layer = call.cache.layers[i]
            if layer.is_sliding:
                continue  # it forgets by itself, and counts on its columns being consecutive
            segment = call.segment_at(i)
            past = call.before[i][1]
            groups = call.sample_groups(segment)
            tokens = VisualTokens(
                features=groups.gather(rearrange(layer.inner.keys[:, :, past:], "b h n d -> b n (h d)")),
                valid=groups.valid,
                budget=torch.full((call.batch,), -1, device=groups.valid.device),
                signals=functools.partial(self._eviction_signal, call, segment, groups),
                shape=self.shape,
                layer=i,
            )
            keep = self.choose(method, tokens).keep.to(groups.valid.device)
            left = groups.scatter(keep & groups.valid, segment.visual)
            left &= ~call.idle_separators(left, segment)
            lost = segment.visual & ~left
            if not bool(lost.any()):
                continue
            held = layer.layout.real
            if held is None:
                held = segment.real.new_ones(call.batch, layer.physical)
            held = held.clone()
            held[:, past:] &= ~lost.to(held.device)
            index, real = compact_columns(held)
            layer.evict(index.to(layer.inner.keys.device), None if bool(real.all()) else real)
            # Layers that hold the same share one layout, and so their masks.
            same = made.get(id(segment))
            if same is not None and torch.equal(same[0], left):
                layer.layout = same[1].layout
            made[id(segment)] = left, layer
            call.held[i] = left

    def _eviction_signal(self, call: Call, segment: Segment, groups: Groups, request: Hashable) -> Tensor:
        if isinstance(request, AliveInLastLayer):
            alive = _spread(call.segment.columns, call.segment.visual, call.length)
            return groups.gather(take_columns(alive, segment.columns))
        raise UnsupportedStageError(f"{type(request).__name__} is not available after prefill")

    # -- revival ------------------------------------------------------------------------------------------------

    def _note(self, call: Call, aside: dict[int, Aside], holdings: Holdings) -> None:
        """Tell every cache layer what its columns are, and those after a cut what was left there."""
        entering = call.segment_at(0)
        before = [call.segment_at(cut) for cut in self.cuts]
        table = PromptTable(
            first=call.past,
            prunable=_spread(entering.columns, call.crop_labels(entering) >= 0, call.length),
            positions=call.positions_of_columns(entering).movedim(-2, 0),
            blocks=call.blocks,
            planes={
                layer: _spread(entering.columns, call.plane(layer, entering), call.length)
                for layer in range(self.cuts[0], len(call.planes))
            },
            counts=torch.stack([(call.crop_labels(segment) >= 0).sum(1) for segment in before], 1),
            holdings=holdings,
        )
        made: dict[int, Slots] = {}
        for i, layer in enumerate(pruned_layers(call.cache)):
            segment = call.segment_at(i)
            if id(segment) not in made:
                columns = (segment.columns + call.past).masked_fill(~segment.real, -1)
                if call.past:
                    old = torch.arange(call.past, device=columns.device).expand(call.batch, -1)
                    old = old if call.past_real is None else old.masked_fill(~call.past_real.to(old.device), -1)
                    columns = torch.cat([old, columns], 1)
                made[id(segment)] = Slots(columns=columns, table=table)
            layer.slots, layer.aside = made[id(segment)], aside.get(i)
            layer.layout = replace(layer.layout, real=None, _derived={})
        _take_stock(pruned_layers(call.cache))

    def begin(self, cache: Cache, hidden: Tensor, given: Columns) -> None:
        """Follow a call of the language model on `hidden` (batch, q, dim) on a cache that tokens may come back to."""
        layers = pruned_layers(cache)
        batch, count = hidden.shape[:2]
        table, shift = layers[0].slots.table, layers[0].layout.shift
        columns = torch.arange(given.past, given.past + count, device=table.prunable.device).expand(batch, -1)
        # A turn of text alone may come with one row of positions, which is that of all axes of M-RoPE, and with or
        # without the row in front of the axes that is for masks alone.
        axes = table.positions.shape[1:-1]
        positions = given.positions.to(columns.device)
        if (*axes, *positions.shape[:-2]) == (4, 3):
            positions = torch.cat([positions[:1], positions])
        elif (*axes, *positions.shape[:-2]) == (3, 4):
            positions = positions[1:]
        positions = positions.expand(*axes, batch, -1)
        self.now.step = _Step(
            layers=layers,
            table=table,
            new=columns.masked_fill(~given.real.to(columns.device), -1),
            new_positions=positions if shift is None else (positions - shift.to(columns.device)).clamp(min=0),
            chosen=table.prunable,
            revived=columns[:, :0],
        )

    def finish(self, output):
        """The language model's output without the rows of the tokens that came back."""
        step = self.now.step
        count = step.new.shape[1]
        _take_stock(step.layers)
        self.end()
        if isinstance(output, tuple):
            return output[0][:, -count:], *output[1:]
        output.last_hidden_state = output.last_hidden_state[:, -count:]
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(None if state is None else state[:, -count:] for state in output.hidden_states)
        return output

    def _watch(self, module, args, output) -> None:
        now = self.now
        if now.step is not None:
            now.queries = output.detach()

    def _before_layer(self, i: int):
        def hook(module, args, kwargs):
            step = self.now.step
            if step is None:
                return None
            hidden = hidden_of(args, kwargs)
            back = step.revived.shape[1]
            if back and i - 1 in step.table.planes:
                plane = step.table.planes[i - 1].to(hidden)
                due = take_columns(plane, step.table.places(step.revived))
                hidden = torch.cat([hidden[:, :back] + due, hidden[:, back:]], 1)
            if i in self.cuts:
                hidden = self._cut(i, hidden)
            view = self._view(i, hidden)
            layer = step.layers[i]
            grown = view.slots.columns.shape[1] - layer.slots.columns.shape[1]
            layer.slots = view.slots
            # All lengths that are asked for stay those of the unpruned sequence.
            missing = layer.layout.dropped + step.new.shape[1] - grown
            layer.layout = replace(layer.layout, dropped=missing, _derived={})
            own = {"position_embeddings": view.places.rope, "attention_mask": view.mask}
            own["position_ids"] = view.places.ids if reads_positions(module) else None
            return with_hidden(args, {**kwargs, **own}, hidden)

        return hook

    def _view(self, i: int, hidden: Tensor) -> _View:
        step, number = self.now.step, bisect_right(self.cuts, i)
        if number not in step.views:
            table, slots = step.table, step.layers[i].slots
            queries = torch.cat([step.revived, step.new], 1)
            keys = torch.cat([slots.columns, queries], 1)
            seen = keys[:, None] <= queries[..., None]
            if table.blocks is not None:
                own, other = (table.look_up(table.blocks, columns, -1) for columns in (queries, keys))
                seen |= (own[..., None] == other[:, None]) & (own[..., None] >= 0)
            seen &= self._visible(keys)[:, None]
            mask = torch.zeros(seen.shape, dtype=hidden.dtype, device=hidden.device)
            mask.masked_fill_(~seen.to(hidden.device), torch.finfo(hidden.dtype).min)
            positions = torch.cat([table.positions_of(step.revived), step.new_positions], -1).to(hidden.device)
            step.views[number] = _View(
                slots=Slots(columns=keys, table=table),
                mask=mask[:, None],
                places=Places(last_axis(positions), self.adapter.rope(i, hidden, positions)),
            )
        return step.views[number]

    def _visible(self, columns: Tensor) -> Tensor:
        """columns (batch, n) of the sequence -> (batch, n) bool: text, and the visual tokens chosen at present."""
        step = self.now.step
        table = step.table
        hidden = table.prunable & ~step.chosen
        return (columns >= 0) & ~table.look_up(hidden, columns, False)

    def _cut(self, i: int, hidden: Tensor) -> Tensor:
        """Choose again before layer i; hidden (batch, f + q, dim) -> (batch, f' + q, dim)."""
        step = self.now.step
        back = step.revived.shape[1]
        step.chosen = self._chosen(i)
        layer = step.layers[i]
        there = layer.slots.columns
        prunable = step.table.look_up(step.table.prunable, there, False)
        held = _spread(step.table.places(there), prunable, step.chosen.shape[1])
        columns, states = step.revived, hidden[:, :back]
        if layer.aside is not None:
            columns = torch.cat([columns, layer.aside.columns], 1)
            states = torch.cat([states, layer.aside.hidden.to(states)], 1)
        wanted = step.table.look_up(step.chosen & ~held, columns, False)
        returning, left = (_gathered(states, columns, which) for which in (wanted, (columns >= 0) & ~wanted))
        layer.aside = left
        step.revived = columns[:, :0] if returning is None else returning.columns
        new = hidden[:, back:]
        return new if returning is None else torch.cat([returning.hidden, new], 1)

    def _chosen(self, i: int) -> Tensor:
        """(batch, columns of the prompt) bool: the method's choice before layer i among what layer i - 1 saw."""
        step = self.now.step
        before = step.layers[i - 1]
        table, view = step.table, step.views[bisect_right(self.cuts, i - 1)]
        columns = before.slots.columns
        keys = before.inner.keys
        last = torch.where(step.new >= 0, torch.arange(step.new.shape[1], device=columns.device), 0).amax(1)
        row = (last + step.revived.shape[1])[:, None]
        weights = cached_attention_row(
            take_columns(self.now.queries, row),
            keys,
            self._visible(columns).to(keys.device),
            self.adapter.decoder_layers[i - 1].self_attn,
            view.places.take(row),
        )
        rows = torch.arange(len(columns), device=columns.device)
        groups = Groups.of_labels(torch.where(step.chosen, rows[:, None], -1), rows, torch.full_like(rows, -1))
        slots = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        inside = table.look_up(table.prunable, columns, False)
        slot = torch.zeros_like(step.chosen, dtype=torch.long).scatter_reduce(
            1, table.places(columns), slots.masked_fill(~inside, 0), "amax"
        )
        slot = groups.gather(slot)
        valid = groups.valid.to(keys.device)[..., None]
        features = take_columns(rearrange(keys, "b h n d -> b n (h d)"), slot).masked_fill(~valid, 0)
        rowed = take_columns(weights.transpose(1, 2), slot).masked_fill(~valid, 0).transpose(1, 2)
        tokens = VisualTokens(
            features=features,
            valid=groups.valid,
            budget=torch.minimum(table.counts[:, self.cuts.index(i)], groups.valid.sum(1)),
            signals={LastQueryAttention(i - 1): rowed},
            shape=self.shape,
            layer=i,
        )
        keep = self.choose(self.reviving, tokens).keep.to(groups.valid.device)
        return groups.scatter(keep & groups.valid, torch.zeros_like(step.chosen))


def _take_stock(layers: Sequence[PrunedLayer]) -> None:
    """Note what a cache that tokens may come back to holds."""
    holdings = layers[0].slots.table.holdings
    holdings.columns = [layer.slots.columns for layer in layers]
    asides = [layer.aside for layer in layers if layer.aside is not None]
    holdings.aside = [(a.columns, a.hidden.shape[-1] * a.hidden.element_size()) for a in asides]


def _spread(columns: Tensor, values: Tensor, length: int) -> Tensor:
    """values (batch, n[, dim]) of columns (batch, n) -> (batch, length[, dim]), 0 or False elsewhere.

    Where columns repeat, flags are joined by "or".
    """
    if values.dtype == torch.bool:
        counts = torch.zeros(len(columns), length, dtype=torch.long, device=columns.device)
        return counts.scatter_add(1, columns, values.to(columns.device).long()) > 0
    out = values.new_zeros(len(columns), length, values.shape[-1])
    return out.scatter(1, columns.to(values.device)[..., None].expand_as(values), values)


def _gathered(hidden: Tensor, columns: Tensor, which: Tensor) -> Aside | None:
    """Of tokens (batch, n) those marked in `which`; None without any."""
    if not bool(which.any()):
        return None
    index, real = compact_columns(which)
    return Aside(hidden=take_columns(hidden, index), columns=columns.gather(1, index).masked_fill(~real, -1))
