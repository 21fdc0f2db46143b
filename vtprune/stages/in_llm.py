# SPDX-License-Identifier: Apache-2.0
"""Between decoder layers: drops or merges visual tokens on the input of a layer, during prefill.

The language model's loop keeps passing its own masks, positions and rotary embeddings to every layer, so each layer
whose columns differ from layer 0's is given its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.callers import ThreadAware
from vtprune.certificate import check_attention
from vtprune.devices import send
from vtprune.errors import UnsupportedStageError
from vtprune.graphs import OUTSIDE, in_graphs
from vtprune.methods.base import InLLM
from vtprune.methods.schedules import Reviving
from vtprune.signals import LayerSignal
from vtprune.stages.cache import count_what_is_stored
from vtprune.stages.call import Call
from vtprune.stages.continuing import Continuation
from vtprune.stages.cutting import cut_sequence
from vtprune.stages.encoder import EncoderRecorder
from vtprune.stages.hooks import hidden_of, with_hidden
from vtprune.stages.layer_view import QUERIES_KEYS, CutView, Recorded
from vtprune.stages.layout import Groups, compact_columns, take_columns
from vtprune.stages.reading import Chooser, visual_tokens
from vtprune.stages.resting import RestingHooks
from vtprune.stages.slots import Stored
from vtprune.stages.static_cache import View, enter_layer, layer_in_graph
from vtprune.tokens import ModelShape, Selection
from vtprune.transformers_private import (
    attention_back_end,
    by_name,
    check_arguments,
    check_nothing_told,
    check_replay,
    column_counters,
    cut_along,
    projections,
    reads_positions,
)


@dataclass
class _Following:
    """The forward call of the language model that one thread makes, and what was measured in it so far."""

    call: Call | None = None
    continuation: Continuation | None = None
    """What layers are given in a call of text alone on a pruned cache."""
    selecting: bool = False
    """Whether choices are made in it."""
    entering: Tensor | None = None
    """(batch,) long: visual tokens that enter the first layer."""
    recorded: Recorded = field(default_factory=Recorded)
    """What signals read."""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """id of a method -> its budgets."""
    stored: dict[int, Stored] = field(default_factory=dict)
    """Decoder layer -> what a cut on its input dropped that may come back."""
    views: Mapping[int, View] = field(default_factory=dict)
    """Decoder layer -> what it is handed in a step on a static cache, if not the same as layer 0."""


class InLLMStage(ThreadAware[_Following]):
    """Hooks on the decoder layers: cut at chosen ones, give every layer its view, record what methods ask for."""

    def __init__(
        self, adapter: Adapter, methods: Sequence[InLLM], shape: ModelShape, choose: Chooser, recorder: EncoderRecorder
    ):
        super().__init__(_Following)
        self.adapter = adapter
        self.hooks = RestingHooks()
        """On the decoder layers and their parts."""
        self.recorder = recorder
        self.shape = shape
        self.choose = choose
        self.cuts: dict[int, list[tuple[InLLM, int]]] = {}
        """Decoder layer -> the methods that cut on its input, each with the number of this cut in its schedule."""
        self.signals: dict[LayerSignal, None] = {}
        """All that methods list in `signals`, in order."""
        self._last_use: dict[int, int] = {}
        """Decoder layer whose queries and keys are kept -> the last cut that reads them."""
        ahead: set[int] = set()
        for method in methods:
            signals = [signal for signal in method.signals(shape) if isinstance(signal, LayerSignal)]
            self.signals |= dict.fromkeys(signals)
            for number, cut in enumerate(method.cuts(shape)):
                self.cuts.setdefault(cut, []).append((method, number))
                if any(signal.ahead for signal in signals):
                    ahead.add(cut)
                # A method of several cuts lists at each one what it reads at any.
                for layer in {layer for signal in signals for layer in signal.attends(cut) if layer < cut}:
                    self._last_use[layer] = max(cut, self._last_use.get(layer, 0))
        self._check_sharing()
        self._measuring = {layer for signal in self.signals for layer in signal.measures()}
        for layer in sorted(self._last_use):
            check_attention(adapter, layer, of_input=False)
        for layer in sorted(ahead):
            check_attention(adapter, layer, of_input=True)
        for layer in sorted(self._measuring):
            self._check_blocks(adapter.decoder_layers[layer])
        self._reading = {i for i, layer in enumerate(adapter.decoder_layers) if reads_positions(layer)}

    def _check_sharing(self) -> None:
        """Raise if a cut comes behind a layer whose keys a later layer reads: they would still be those of all."""
        depth = self.shape.decoder_layers
        shared = [source for layer, source in enumerate(self.adapter.key_sources) if source != layer]
        late = {
            method.name: cut for cut, cuts in self.cuts.items() if shared and cut > min(shared) for method, _ in cuts
        }
        reviving = next((m.name for cuts in self.cuts.values() for m, _ in cuts if isinstance(m, Reviving)), None)
        if shared and reviving:
            raise UnsupportedStageError(
                f"{reviving} brings tokens back into the KV cache, and layers of this model read keys of earlier ones; "
                "methods that bring nothing back work: fastv, transprune"
            )
        if reviving:
            check_nothing_told(reviving, self.adapter.decoder_layers[0], self.adapter.text_config)
        if late:
            name, cut = next(iter(late.items()))
            raise UnsupportedStageError(
                f"{name} would drop tokens at layer {cut}, and the layers from {depth - len(shared)} on read keys of "
                f"layer {min(shared)} and later ones, which already hold these tokens; give it layers up to "
                f"{min(shared)}, or take a method before the LLM: mmtok, divprune"
            )

    def _check_blocks(self, layer: nn.Module) -> None:
        """Raise unless a decoder layer has the two blocks whose transitions are measured."""
        missing = [name for name in ("self_attn", self.adapter.decoder_mlp) if not hasattr(layer, name)]
        if missing:
            raise UnsupportedStageError(
                f"this method measures what the blocks of a decoder layer change, and a {type(layer).__name__} has no "
                f"{' and no '.join(missing)}; methods before the LLM work: mmtok, divprune"
            )

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        for module in column_counters(self.adapter.language_model):
            yield module.register_forward_pre_hook(count_what_is_stored, with_kwargs=True)
        layers, add = self.adapter.decoder_layers, self.hooks.add
        for i, layer in enumerate(layers):
            yield add(layers, layer, layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True))
            if i in self._measuring:
                for block in (layer.self_attn, getattr(layer, self.adapter.decoder_mlp)):
                    yield add(layer, block, block.register_forward_hook(self._measure(i), with_kwargs=True))
            if i in self._last_use:
                for what, name in zip(QUERIES_KEYS, projections(layer.self_attn), strict=True):
                    projection = getattr(layer.self_attn, name)
                    yield add(layer.self_attn, projection, projection.register_forward_hook(self._watch(i, what)))

    def cuts_before(self, layer: int) -> bool:
        """Whether something may be dropped on the input of a decoder layer up to this one."""
        return any(cut <= layer for cut in self.cuts)

    def begin(self, call: Call) -> None:
        """Follow a forward call of the language model until `end`."""
        self.hooks.want()
        now = self.now
        now.call = call
        now.selecting = bool(self.cuts)
        if now.selecting or call.deepstack:
            check_replay(self.adapter.decoder_layers[0])
        if now.selecting:
            now.entering = call.sample_groups().valid.sum(1)

    def go_on(self, continuation: Continuation | None) -> None:
        """Follow a call of text alone on a pruned cache until `end`; None if nothing is done in it."""
        if continuation is None:
            return self.hooks.rest()
        self.hooks.want()
        self.now.continuation = continuation

    def end(self) -> None:
        now = self.now
        if now.call is not None:
            return super().end()
        now.continuation, now.views = None, {}

    def forget(self) -> None:
        self.hooks.forget()
        super().forget()

    def _before_layer(self, i: int):
        reads_positions = i in self._reading

        @in_graphs(partial(layer_in_graph, i))
        def hook(module, args, kwargs):
            now = self.now
            call = now.call
            if call is None:
                if now.views:
                    return enter_layer(now.views, i, module, args, kwargs)
                return now.continuation and now.continuation.arguments(i, module, args, kwargs, reads_positions)
            hidden = call.add_deepstack(i, self.adapter.token_states(hidden_of(args, kwargs)))
            if now.selecting and i == 0:
                view = self._view(0, hidden)
                for signal in self.signals:
                    view.mark(signal)
            if now.selecting and i in self.cuts:
                hidden = self._cut(i, hidden)
            if now.selecting and i in self._last_use:
                now.recorded.places[i] = call.places_at(i, hidden)
            if not call.pruned and not call.wrapped and not call.deepstack:
                return None
            args, kwargs = by_name(module, args, dict(kwargs))
            if i == 0:
                check_arguments(type(module).__name__, kwargs, call.batch, hidden.shape[1])
            differs = call.key(i) != call.key(0)
            tail = call.is_tail(hidden)
            if not tail:
                cut_along(kwargs, call.from_first_layer(i))
            if differs:
                rope, mask = call.places_at(i, hidden).rope, call.mask_at(i, hidden)
                if tail:  # which sees all that the last tokens see
                    rope, mask = tuple(part[:, -1:] for part in rope), None if mask is None else mask[..., -1:, :]
                kwargs |= {"position_embeddings": rope, "attention_mask": mask}
            if not reads_positions:
                # Attention back ends read position ids to detect packed sequences, for which gaps would be mistaken.
                kwargs["position_ids"] = None
            else:
                places = call.places_at(i, hidden).ids
                if call.pruned:
                    self._check_packing(places)
                if differs:
                    kwargs["position_ids"] = places
            return with_hidden(args, kwargs, self.adapter.layer_input(hidden))

        return hook

    def _check_packing(self, places: Tensor) -> None:
        """Raise if positions (batch, n) that a layer has to be given would be taken for packed sequences."""
        packs = "flash" in attention_back_end(self.adapter.text_config) and len(places) == 1
        if packs and bool((places.diff() != 1).any()):
            raise UnsupportedStageError(
                "the layers of this language model read positions, and FlashAttention takes the gaps that pruning "
                "leaves in them for packed sequences; prune with positions='compact', or load the model with "
                "attn_implementation='sdpa'"
            )

    def _measure(self, i: int):
        @in_graphs(lambda module, args, kwargs, output: None if hidden_of(args, kwargs).shape[1] == 1 else OUTSIDE)
        def hook(module, args, kwargs, output):
            now = self.now
            if now.call is None or not now.selecting:
                return
            inputs = hidden_of(args, kwargs)
            # Experts may put out one row a token, of all samples together.
            outputs = (output[0] if isinstance(output, tuple) else output).reshape(inputs.shape)
            sequence = now.call.sequence_at(i)
            counts = send(sequence.real & now.call.prompt_at(sequence), inputs.device)
            sums = now.recorded.measured
            for signal in self.signals:
                if i in signal.measures():
                    value = signal.measure(inputs.detach(), outputs.detach(), counts)
                    sums[signal, i] = sums[signal, i] + value if (signal, i) in sums else value

        return hook

    def _watch(self, i: int, what: str):
        @in_graphs(lambda module, args, output: None if args[0].shape[1] == 1 else OUTSIDE)
        def hook(module, args, output):
            now = self.now
            if now.call is not None and now.selecting:
                now.recorded.projected[i, what] = output.detach()

        return hook

    def _cut(self, i: int, hidden: Tensor) -> Tensor:
        now = self.now
        call = now.call
        for method, number in self.cuts[i]:
            view = self._view(i, hidden)
            groups = view.groups
            budget = self._budgets(method)[number]
            alive = groups.valid.sum(1)
            if bool((budget >= alive).all()):
                continue
            tokens = visual_tokens(
                method,
                self.shape,
                groups,
                groups.gather(hidden),
                view.read,
                budget=torch.minimum(budget, alive),
                runs=groups.gather(call.runs()),
                layer=i,
            )
            selection = self.choose(method, tokens)
            reviving = isinstance(method, Reviving)
            if reviving:
                self._store(i, hidden, groups, selection)
            compact = method.positions == "compact"
            if (method, number) == self.cuts[i][-1]:
                self._forget(i)  # so that it is not cut along
            cut = cut_sequence(
                call,
                hidden,
                groups,
                selection,
                layer=i,
                compact=compact,
                keep_separators=reviving,
                masking=method.masks,
            )
            if cut is not None:
                hidden, index = cut
                now.recorded.cut(index)
        self._forget(i)
        return hidden

    def _forget(self, i: int) -> None:
        """Release what no cut behind the one on the input of layer i reads."""
        for layer, last in self._last_use.items():
            if last == i:
                self.now.recorded.forget(layer)

    def _budgets(self, method: InLLM) -> Tensor:
        """(cuts, samples) long: a method's budgets in this call, all its cuts at once."""
        now = self.now
        if id(method) not in now.counts:
            media = now.call.media
            original = (media.labels >= 0).sum(1)
            crops = media.crops_per_sample
            now.counts[id(method)] = method.prompt_budgets(self.shape, now.entering, crops, original)
        return now.counts[id(method)]

    def _store(self, i: int, hidden: Tensor, groups: Groups, selection: Selection) -> None:
        now = self.now
        sequence = now.call.sequence
        dropped = groups.scatter(~selection.on_host().keep, torch.zeros_like(sequence.real))
        if bool(dropped.any()):
            index, real = compact_columns(dropped)
            columns = (take_columns(sequence.columns, index) + now.call.past).masked_fill(~real, -1)
            columns = send(columns, hidden.device)
            now.stored[i] = Stored(hidden=take_columns(hidden.detach(), index), columns=columns)

    def _view(self, i: int, hidden: Tensor) -> CutView:
        now = self.now
        return CutView(self.adapter, self.recorder, now.call, now.recorded, i, hidden)
