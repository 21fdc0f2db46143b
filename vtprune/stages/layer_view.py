# SPDX-License-Identifier: Apache-2.0
"""What a signal sees on the input of a decoder layer: the `vtprune.signals.LayerView` of one cut."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtprune.adapters.base import Adapter
from vtprune.attention import LayerAttention, Places, RowContext
from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.signals import EncoderSignal, LayerSignal
from vtprune.stages.cache import PrunedLayer
from vtprune.stages.call import Call
from vtprune.stages.encoded import EncodedMedia
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.layout import Groups, take_columns
from vtprune.transformers_private import cached_keys, layer_type, project_keys, project_queries

QUERIES_KEYS = ("queries", "keys")


@dataclass
class Recorded:
    """What was recorded for signals in one forward call of the language model, cut along with the sequence."""

    projected: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Decoder layer and "queries" or "keys" -> what the layer projected."""
    places: dict[int, Places] = field(default_factory=dict)
    """Decoder layer -> the positions that it was given."""
    measured: dict[tuple[LayerSignal, int], Tensor] = field(default_factory=dict)
    """Signal and decoder layer -> (batch, n), the sum over the layer's blocks."""
    marked: dict[LayerSignal, Tensor] = field(default_factory=dict)
    """(batch, call length) bool."""

    def cut(self, index: Tensor) -> None:
        """Keep the columns `index` (batch, m) of the sequence."""
        self.projected = {key: take_columns(values, index) for key, values in self.projected.items()}
        self.places = {layer: places.take(index) for layer, places in self.places.items()}
        self.measured = {key: take_columns(values, index) for key, values in self.measured.items()}

    def forget(self, layer: int) -> None:
        """Release the projections of a decoder layer: queries of whole prompts are large."""
        for what in QUERIES_KEYS:
            self.projected.pop((layer, what), None)
        self.places.pop(layer, None)


class CutView:
    """See `vtprune.signals.LayerView`."""

    def __init__(
        self, adapter: Adapter, recorder: EncoderRecorder, call: Call, recorded: Recorded, layer: int, hidden: Tensor
    ):
        self.adapter, self.recorder, self.call, self.recorded = adapter, recorder, call, recorded
        self.layer, self.hidden = layer, hidden
        self._sequence = call.sequence

    def read(self, signal: LayerSignal) -> Any:
        return signal.read_layer(self)

    @functools.cached_property
    def groups(self) -> Groups:
        return self.call.sample_groups()

    def _there(self, values: Tensor) -> Tensor:
        """What is known on the CPU, on the device of the hidden states."""
        return send(values, self.hidden.device)

    @functools.cached_property
    def real(self) -> Tensor:
        return self._there(self._sequence.real)

    @functools.cached_property
    def present(self) -> Tensor:
        return self._there(self._sequence.present)

    @functools.cached_property
    def visual(self) -> Tensor:
        return self._there(self._sequence.visual)

    @functools.cached_property
    def padded_length(self) -> Tensor:
        behind = (self.call.real & ~self.call.prompt).sum(1, keepdim=True)
        return self._there(self.call.length - behind)

    def normed(self) -> Tensor:
        return self.adapter.normed(self.hidden).to(self.hidden.device)

    # -- rows ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _prompt(self) -> Tensor:
        """(batch, n) bool, on the CPU: the real columns of the prompt."""
        return self._sequence.real & self.call.prompt_at(self._sequence)

    @functools.cached_property
    def _last(self) -> Tensor:
        """(batch, 1) long, on the CPU: the prompt's last column."""
        columns = torch.arange(self._prompt.shape[1])
        return torch.where(self._prompt, columns, -1).amax(1, keepdim=True)

    def text_rows(self, *, last_only: bool = False) -> tuple[Tensor, Tensor]:
        sequence = self._sequence
        if last_only:
            rows = self._there(self._last)
            return rows, torch.ones_like(rows, dtype=torch.bool)
        columns = torch.arange(self._prompt.shape[1])
        last_visual = torch.where(sequence.visual, columns, -1).amax(1, keepdim=True)
        text = sequence.real & take_columns(self.call.text, sequence.columns)
        rows, valid = self.rows_of(text & (columns > last_visual))
        return self._there(rows), self._there(valid)

    def rows_of(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        columns = torch.arange(marked.shape[1], device=marked.device)
        marked = torch.where(marked.any(1, keepdim=True), marked, columns == send(self._last, marked.device))
        width = int(marked.sum(1).max())
        rows = torch.argsort(marked.to(torch.uint8), dim=1, stable=True)[:, -width:]
        return rows, marked.gather(1, rows)

    def by_head(self, weights: Tensor) -> Tensor:
        return self.groups.gather(weights.transpose(1, 2)).transpose(1, 2)

    # -- attention ----------------------------------------------------------------------------------------------

    def attention(self, layer: int) -> LayerAttention:
        if layer == self.layer:
            return self._ahead()
        queries, keys = (self.recorded.projected.get((layer, what)) for what in QUERIES_KEYS)
        if queries is None or keys is None:
            raise UnsupportedStageError(
                f"the attention of decoder layer {layer} was not kept for the cut on the input of layer {self.layer}; "
                "a signal names the layers that it reads in `attends`"
            )
        taken = functools.partial(take_columns, queries)
        context = self._context(layer, self.recorded.places[layer])
        return LayerAttention(context, lambda rows: queries if rows is None else taken(rows), lambda: keys)

    def _ahead(self) -> LayerAttention:
        """The attention of the layer that runs next."""
        layer = self.adapter.decoder_layers[self.layer]
        inner = self.adapter.attention_input(layer, self.hidden)
        return LayerAttention(
            self._context(self.layer, self.call.places_at(self.layer, self.hidden)),
            lambda rows: project_queries(layer.self_attn, inner if rows is None else take_columns(inner, rows)),
            lambda: project_keys(layer.self_attn, inner),
        )

    def _context(self, layer: int, places: Places) -> RowContext:
        call = self.call
        layout, past = call.before[layer]
        config = call.text_config
        sliding = layer_type(config, layer) == "sliding_attention"
        window = config.sliding_window if sliding else None
        attention, keys = self.adapter.decoder_layers[layer].self_attn, None
        if call.cache is not None and past:
            if window is not None and past + call.sequence.real.shape[1] > window:
                raise UnsupportedStageError(
                    f"attention in decoder layer {layer} cannot be recomputed: its sliding window of {window} tokens "
                    "no longer holds all of the conversation so far"
                )
            layer_cache = call.cache.layers[layer]
            held = layer_cache.inner if isinstance(layer_cache, PrunedLayer) else layer_cache
            keys = cached_keys(attention, held, past)
        return RowContext(
            attention=attention,
            places=places,
            real=self.real,
            past_keys=keys,
            past_real=layout.real,
            # What was recorded in an earlier layer has been cut along with the sequence since.
            blocks=call.blocks_at(layer, self._sequence),
            window=window,
            window_cuts_blocks=self.adapter.window_cuts_blocks,
            present=self.present,
            counting=self._there(call.prompt_at(self._sequence)),
        )

    # -- what was recorded --------------------------------------------------------------------------------------

    def measured(self, signal: LayerSignal) -> Tensor:
        values = [value for (measured, _), value in self.recorded.measured.items() if measured == signal]
        if not values:
            raise UnsupportedStageError(
                f"{type(signal).__name__}: nothing was measured before layer {self.layer}; measure an earlier layer"
            )
        return sum(value.to(self.hidden.device) for value in values)

    def marked(self, signal: LayerSignal) -> Tensor:
        return take_columns(self.recorded.marked[signal], self._sequence.columns)

    def mark(self, signal: LayerSignal) -> None:
        """Remember what a signal marks, by columns of the call."""
        marked = signal.mark(self)
        if marked is not None:
            nothing = torch.zeros_like(self.call.real, device=marked.device)
            self.recorded.marked[signal] = nothing.scatter(1, send(self._sequence.columns, marked.device), marked)

    def encoded(self, signal: EncoderSignal) -> tuple[Groups, Any]:
        groups = self.call.crop_groups()
        return groups, signal.read_encoded(EncodedMedia(self.call, groups, self.recorder, None))

    def prompt_keys(self) -> list[int]:
        return [self.call.prompt_key(row) for row in range(self.call.batch)]
