# SPDX-License-Identifier: Apache-2.0
"""While tokens are generated: brings visual tokens back.

Every call after the prefill chooses anew at each cut, among all visual tokens that got there. A layer may lack the keys
of a chosen token; it is then computed there beside the new tokens, from the hidden state that was stored when it was
cut. So each token is computed at most once in each layer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.attention import Places, cached_attention_row
from vtprune.callers import ThreadAware
from vtprune.devices import send
from vtprune.errors import ConfigError, UnsupportedStageError
from vtprune.methods.base import AfterPrefill, InLLM, Method
from vtprune.methods.schedules import Reviving
from vtprune.signals import LastQueryAttention
from vtprune.stages.cache import PrunedLayer, check_changeable, pruned_layers
from vtprune.stages.call import Call
from vtprune.stages.eviction import NEEDS_CACHE
from vtprune.stages.hooks import hidden_of, with_hidden
from vtprune.stages.incoming import Columns
from vtprune.stages.layout import Groups, compact_columns, last_axis, spread_columns, take_columns
from vtprune.stages.reading import Chooser, visual_tokens
from vtprune.stages.slots import CacheContents, PromptTable, Slots, Stored
from vtprune.tokens import ModelShape
from vtprune.transformers_private import (
    Cache,
    attention_back_end,
    cached_keys,
    layer_type,
    projections,
    reads_positions,
)


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
    """Projected queries of the layer before the next cut."""


@dataclass
class _View:
    """What the decoder layers between two cuts are given."""

    slots: Slots
    """With the tokens of this step."""
    mask: Tensor
    """(batch, 1, f + q, physical), to be added to attention scores."""
    places: Places
    """Of the tokens computed in this step."""


class RevivalStage(ThreadAware[_Following]):
    """Brings visual tokens back to the KV cache of a prefill, for every token that is generated."""

    def __init__(self, adapter: Adapter, methods: Sequence[Method], shape: ModelShape, choose: Chooser):
        super().__init__(_Following)
        self.adapter = adapter
        self.shape = shape
        self.choose = choose
        self.reviving = next((method for method in methods if isinstance(method, Reviving)), None)
        self.cuts = () if self.reviving is None else self.reviving.cuts(shape)
        if self.reviving is not None:
            self._check_model(methods)

    def _check_model(self, methods: Sequence[Method]) -> None:
        name, config = self.reviving.name, self.adapter.text_config
        others = [m.name for m in methods if isinstance(m, InLLM | AfterPrefill) and m is not self.reviving]
        if others:
            raise ConfigError(f"{name} cannot be combined with {others[0]}: what that drops inside the LLM is gone")
        if len(set(self.adapter.rope_kinds)) > 1:
            raise UnsupportedStageError(
                f"{name} brings tokens back into the KV cache, in layers whose rotations differ in this model; methods "
                "that bring nothing back work: fastv, transprune"
            )
        if any(layer_type(config, layer) != "full_attention" for layer in range(self.shape.decoder_layers)):
            raise UnsupportedStageError(
                f"{name} brings tokens back into the KV cache, and decoder layers of this model have a sliding window "
                "or chunks, which forget by themselves; methods that bring nothing back work: fastv, transprune"
            )

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        if self.reviving is None:
            return
        for i, layer in enumerate(self.adapter.decoder_layers):
            yield layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True)
            if i + 1 in self.cuts:
                queries, _ = projections(layer.self_attn)
                yield getattr(layer.self_attn, queries).register_forward_hook(self._watch)

    def check(self, call: Call, replayed: bool) -> None:
        """Raise UnsupportedStageError unless what a prefill leaves can be worked on; nothing is changed."""
        if self.reviving is None:
            return
        if replayed:
            raise UnsupportedStageError(NEEDS_CACHE)
        if call.cache is None:
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

    def after_prefill(self, call: Call, stored: dict[int, Stored], contents: CacheContents) -> None:
        """Tell every cache layer what its columns are, and those after a cut what was left there.

        stored: for each cut what it dropped on the input of its layer. contents: for the report.
        """
        if self.reviving is None or call.cache is None or not call.pruned:
            return
        check_changeable(call.cache)
        entering, device = call.sequence_at(0), call.embeddings.device
        content = [call.crop_labels(call.sequence_at(cut)) >= 0 for cut in self.cuts]
        table = PromptTable(
            first=call.past,
            prunable=send(spread_columns(entering.columns, call.crop_labels(entering) >= 0, call.length), device),
            positions=call.positions_of_columns(entering).movedim(-2, 0),
            blocks=call.blocks,
            deepstack={
                layer: spread_columns(entering.columns, call.deepstack_at(layer, entering), call.length)
                for layer in call.deepstack
                if layer > self.cuts[0]
            },
            counts=send(torch.stack([flags.sum(1) for flags in content], 1), device),
            contents=contents,
        )
        made: dict[int, Slots] = {}
        for i, layer in enumerate(pruned_layers(call.cache)):
            sequence = call.sequence_at(i)
            if id(sequence) not in made:
                columns = (sequence.columns + call.past).masked_fill(~sequence.real, -1)
                old = torch.arange(call.past).expand(call.batch, -1)
                old = old if call.past_real is None else old.masked_fill(~call.past_real, -1)
                columns = send(torch.cat([old, columns], 1), device)
                made[id(sequence)] = Slots(columns=columns, table=table)
            layer.slots, layer.stored = made[id(sequence)], stored.get(i)
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
            new=columns.masked_fill(~send(given.real, columns.device), -1),
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
            if back and i in step.table.deepstack:
                added = step.table.deepstack[i].to(hidden)
                due = take_columns(added, step.table.places(step.revived))
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
            changed = {"position_embeddings": view.places.rope, "attention_mask": view.mask}
            changed["position_ids"] = view.places.ids if reads_positions(module) else None
            return with_hidden(args, {**kwargs, **changed}, hidden)

        return hook

    def _view(self, i: int, hidden: Tensor) -> _View:
        step, number = self.now.step, bisect_right(self.cuts, i)
        if number not in step.views:
            table, slots = step.table, step.layers[i].slots
            queries = torch.cat([step.revived, step.new], 1)
            keys = torch.cat([slots.columns, queries], 1)
            seen = keys[:, None] <= queries[..., None]
            if table.blocks is not None:
                block, other = (table.look_up(table.blocks, columns, -1) for columns in (queries, keys))
                seen |= (block[..., None] == other[:, None]) & (block[..., None] >= 0)
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
        columns, states = step.revived, hidden[:, :back]
        if layer.stored is not None:
            columns = torch.cat([columns, layer.stored.columns], 1)
            states = torch.cat([states, layer.stored.hidden.to(states)], 1)
        # No key of these is in the layer's cache: a token that gets past a cut is not stored there any more.
        wanted = step.table.look_up(step.chosen, columns, False)
        marked = wanted, (columns >= 0) & ~wanted
        most = torch.stack([which.sum(1).max() for which in marked]).tolist()  # one wait for an accelerator
        returning, left = (_gathered(states, columns, *part) for part in zip(marked, most, strict=True))
        layer.stored = left
        step.revived = columns[:, :0] if returning is None else returning.columns
        new = hidden[:, back:]
        return new if returning is None else torch.cat([returning.hidden, new], 1)

    def _chosen(self, i: int) -> Tensor:
        """(batch, columns of the prompt) bool: the method's choice before layer i among what layer i - 1 saw."""
        step = self.now.step
        before = step.layers[i - 1]
        table, view = step.table, step.views[bisect_right(self.cuts, i - 1)]
        columns = before.slots.columns
        attention = self.adapter.decoder_layers[i - 1].self_attn
        keys = cached_keys(attention, before.inner)
        last = torch.where(step.new >= 0, torch.arange(step.new.shape[1], device=columns.device), 0).amax(1)
        row = (last + step.revived.shape[1])[:, None]
        weights = cached_attention_row(
            take_columns(self.now.queries, row),
            keys,
            self._visible(columns).to(keys.device),
            attention,
            view.places.take(row),
        )
        groups = Groups.of_rows(step.chosen)
        slots = torch.arange(columns.shape[1], device=columns.device).expand_as(columns)
        inside = table.look_up(table.prunable, columns, False)
        slot = torch.zeros_like(step.chosen, dtype=torch.long).scatter_reduce(
            1, table.places(columns), slots.masked_fill(~inside, 0), "amax"
        )
        slot = groups.gather(slot)
        valid = groups.valid.to(keys.device)[..., None]
        features = take_columns(rearrange(keys, "b h n d -> b n (h d)"), slot).masked_fill(~valid, 0)
        rowed = take_columns(weights.transpose(1, 2), slot).masked_fill(~valid, 0).transpose(1, 2)
        tokens = visual_tokens(
            self.reviving,
            self.shape,
            groups,
            features,
            {LastQueryAttention(i - 1): rowed}.__getitem__,
            budget=torch.minimum(table.counts[:, self.cuts.index(i)], groups.valid.sum(1)),
            layer=i,
        )
        keep = self.choose(self.reviving, tokens).keep.to(groups.valid.device) & groups.valid
        return torch.zeros_like(step.chosen, dtype=torch.long).scatter_add(1, groups.columns, keep.long()) > 0


def _take_stock(layers: Sequence[PrunedLayer]) -> None:
    """Note what a cache that tokens may come back to holds."""
    contents = layers[0].slots.table.contents
    contents.columns = [layer.slots.columns for layer in layers]
    stored = [layer.stored for layer in layers if layer.stored is not None]
    contents.stored = [(a.columns, a.hidden.shape[-1] * a.hidden.element_size()) for a in stored]


def _gathered(hidden: Tensor, columns: Tensor, which: Tensor, most: int) -> Stored | None:
    """Of tokens (batch, n) those marked in `which`, at most `most` of a sample; None without any."""
    if not most:
        return None
    index, real = compact_columns(which, most)
    return Stored(hidden=take_columns(hidden, index), columns=columns.gather(1, index).masked_fill(~real, -1))
