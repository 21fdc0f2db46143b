# SPDX-License-Identifier: Apache-2.0
"""Between decoder layers: drops or merges visual tokens on the input of a layer, during prefill.

The language model's loop keeps passing its own masks, positions and rotary embeddings to every layer, so each layer
whose columns differ from layer 0's is given its own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.cache import PrunedLayer
from vtprune.callers import PerThread
from vtprune.certificate import check_attention
from vtprune.errors import UnsupportedStageError
from vtprune.layout import Groups, compact_columns, take_columns
from vtprune.methods.base import InLLM, Reviving
from vtprune.ops.dual_attention import dual_attention, key_tokens
from vtprune.ops.raters import text_raters
from vtprune.ops.transition import token_transition
from vtprune.signals import (
    AttentionPageRank,
    AttentionShare,
    ClsAttention,
    InstructionAttention,
    KeyNorms,
    KeyTokens,
    LastQueryAttention,
    NormedStates,
    Places,
    RaterAttention,
    RowContext,
    SampleKeys,
    TextAttention,
    Transition,
    decoder_attention_rows,
    decoder_attention_share,
    decoder_key_norms,
    decoder_page_rank,
    rotary_logits,
)
from vtprune.slots import Aside
from vtprune.stages.before_llm import Chooser, encoder_signal
from vtprune.stages.call import Call
from vtprune.stages.encoder import EncoderTap
from vtprune.stages.hooks import hidden_of, with_hidden
from vtprune.tokens import ModelShape, Selection, VisualTokens
from vtprune.transformers_private import attention_back_end, check_arguments, check_replay, layer_type, reads_positions

TEXT_ROWS = 256
"""Rows of text whose attention is held in memory at a time."""


@dataclass
class _Following:
    """The forward call of the language model that one thread makes, and what was measured in it so far."""

    call: Call | None = None
    selecting: bool = False
    """Whether choices are made in it."""
    entering: Tensor | None = None
    """(batch,) long: visual tokens that enter the first layer."""
    transitions: dict[int, Tensor] = field(default_factory=dict)
    projected: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    """Decoder layer and projection -> its output."""
    places: dict[int, Places] = field(default_factory=dict)
    marks: dict[KeyTokens, Tensor] = field(default_factory=dict)
    raters: Tensor | None = None
    """(batch, call length) bool: the text tokens that rate."""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """id of a method -> its budgets."""
    aside: dict[int, Aside] = field(default_factory=dict)
    """Decoder layer -> what a cut on its input dropped that may come back."""


class InLLMStage:
    """Hooks on the decoder layers: cuts at chosen ones, gives every layer its view, and taps what methods ask for."""

    def __init__(self, adapter: Adapter, methods: Sequence[InLLM], shape: ModelShape, choose: Chooser, tap: EncoderTap):
        self.adapter = adapter
        self.tap = tap
        self.shape = shape
        self.choose = choose
        self.cuts: dict[int, list[tuple[InLLM, int]]] = {}
        """Decoder layer -> the methods that cut on its input, each with the number of this cut in its schedule."""
        self.passing: set[int] = set()
        """Decoder layers whose queries and keys are needed until the cut that follows."""
        requests = set()
        for method in methods:
            requests.update(method.signals(shape))
            passing = (AttentionPageRank, AttentionShare, KeyNorms, RaterAttention, TextAttention)
            tapped = any(isinstance(r, passing) for r in method.signals(shape))
            for number, layer in enumerate(method.cuts(shape)):
                self.cuts.setdefault(layer, []).append((method, number))
                if tapped:
                    self.passing.add(layer - 1)
        self.measured = {layer for r in requests if isinstance(r, Transition) for layer in r.layers}
        self.watched = {r.layer for r in requests if isinstance(r, LastQueryAttention)}
        self.keys = {r for r in requests if isinstance(r, KeyTokens)}
        self.rated = any(isinstance(r, RaterAttention) for r in requests)
        for layer in sorted(self.watched | self.passing):
            check_attention(adapter, layer, of_input=False)
        if any(isinstance(r, InstructionAttention) for r in requests):
            for layer in self.cuts:
                check_attention(adapter, layer, of_input=True)
        for layer in sorted(self.measured):
            self._check_blocks(adapter.decoder_layers[layer])
        self._reading = {i for i, layer in enumerate(adapter.decoder_layers) if reads_positions(layer)}
        self._following = PerThread(_Following)

    @staticmethod
    def _check_blocks(layer: nn.Module) -> None:
        """Raise unless a decoder layer has the two blocks whose transitions are measured."""
        missing = [name for name in ("self_attn", "mlp") if not hasattr(layer, name)]
        if missing:
            raise UnsupportedStageError(
                f"this method measures what the blocks of a decoder layer change, and a {type(layer).__name__} has no "
                f"{' and no '.join(missing)}; methods before the LLM work: mmtok, divprune"
            )

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        for i, layer in enumerate(self.adapter.decoder_layers):
            yield layer.register_forward_pre_hook(self._before_layer(i), with_kwargs=True)
            if i in self.measured:
                for block in (layer.self_attn, layer.mlp):
                    yield block.register_forward_hook(self._measure(i), with_kwargs=True)
            if i in self.watched | self.passing:
                for name in ("q_proj", "k_proj"):
                    yield getattr(layer.self_attn, name).register_forward_hook(self._watch(i, name))

    def cuts_before(self, layer: int) -> bool:
        """Whether something may be dropped on the input of a decoder layer up to this one."""
        return any(cut <= layer for cut in self.cuts)

    def begin(self, call: Call) -> None:
        """Follow a forward call of the language model until `end`."""
        now = self._following()
        now.call = call
        now.selecting = call.media is not None and bool(self.cuts)
        if now.selecting or call.planes:
            check_replay(self.adapter.decoder_layers[0])
        if now.selecting:
            now.entering = call.sample_groups().valid.sum(1).cpu()
            now.marks = {request: self._mark(call, request) for request in self.keys}

    def end(self) -> None:
        """Forget the call and everything measured in it."""
        self._following.renew()

    def forget(self) -> None:
        """Forget the calls of all threads."""
        self._following.clear()

    @property
    def now(self) -> _Following:
        """What the calling thread is doing."""
        return self._following()

    # -- hooks --------------------------------------------------------------------------------------------------

    def _before_layer(self, i: int):
        def hook(module, args, kwargs):
            now = self.now
            call = now.call
            if call is None:
                return None
            hidden = call.add_plane(i - 1, hidden_of(args, kwargs))
            if now.selecting and self.rated and i == 0:
                now.raters = self._rate(hidden)
            if now.selecting and i in self.cuts:
                hidden = self._cut(i, hidden)
            if now.selecting and i in self.watched | self.passing:
                now.places[i] = call.places_at(i, hidden)
            if not call.pruned and not call.wrapped and not call.planes:
                return None
            if i == 0:
                check_arguments(type(module).__name__, kwargs, call.batch, hidden.shape[1])
            kwargs = dict(kwargs)
            differs = call.key(i) != call.key(0)
            if differs:
                kwargs["position_embeddings"] = call.places_at(i, hidden).rope
                kwargs["attention_mask"] = call.mask_at(i, hidden)
            if i not in self._reading:
                # Attention back ends read position ids to detect packed sequences, for which gaps would be mistaken.
                kwargs["position_ids"] = None
            else:
                places = call.places_at(i, hidden).ids
                if call.pruned:
                    self._check_packing(places)
                if differs:
                    kwargs["position_ids"] = places
            return with_hidden(args, kwargs, hidden)

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
        def hook(module, args, kwargs, output):
            now = self.now
            if now.call is None or not now.selecting:
                return
            inputs = hidden_of(args, kwargs)
            outputs = output[0] if isinstance(output, tuple) else output
            segment = now.call.segment_at(i)
            counts = (segment.real & now.call.prompt_at(segment)).to(inputs.device)
            score = token_transition(inputs.detach(), outputs.detach(), counts)
            now.transitions[i] = now.transitions[i] + score if i in now.transitions else score

        return hook

    def _watch(self, i: int, name: str):
        def hook(module, args, output):
            now = self.now
            if now.call is not None and now.selecting:
                now.projected[i, name] = output.detach()

        return hook

    # -- one cut ------------------------------------------------------------------------------------------------

    def _cut(self, i: int, hidden: Tensor) -> Tensor:
        now = self.now
        call = now.call
        for method, number in self.cuts[i]:
            groups = call.sample_groups()
            budget = self._budgets(method)[number]
            alive = groups.valid.sum(1).cpu()
            if bool((budget >= alive).all()):
                continue
            tokens = VisualTokens(
                features=groups.gather(hidden),
                valid=groups.valid,
                budget=torch.minimum(budget, alive).to(hidden.device),
                signals=functools.partial(self._signal, i, hidden, groups),
                spans=groups.gather(call.spans()),
                shape=self.shape,
                layer=i,
            )
            selection = self.choose(method, tokens)
            reviving = isinstance(method, Reviving)
            if reviving:
                self._put_aside(i, hidden, groups, selection)
            compact = method.positions == "compact"
            cut = call.apply(
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
                now.transitions = {layer: take_columns(t, index) for layer, t in now.transitions.items()}
                now.projected = {key: take_columns(t, index) for key, t in now.projected.items()}
                now.places = {layer: places.take(index) for layer, places in now.places.items()}
        if i - 1 in self.passing - self.watched:
            # Queries of whole prompts are large; nothing later asks for them.
            del now.places[i - 1], now.projected[i - 1, "q_proj"], now.projected[i - 1, "k_proj"]
        return hidden

    def _budgets(self, method: InLLM) -> Tensor:
        """(cuts, samples) long: a method's budgets in this call, all its cuts at once."""
        now = self.now
        if id(method) not in now.counts:
            media = now.call.media
            original = (media.labels >= 0).sum(1).cpu()
            crops = media.crops_per_sample.cpu()
            now.counts[id(method)] = method.prompt_budgets(self.shape, now.entering, crops, original)
        return now.counts[id(method)]

    def _put_aside(self, i: int, hidden: Tensor, groups: Groups, selection: Selection) -> None:
        now = self.now
        segment = now.call.segment
        dropped = groups.scatter(~selection.keep.to(groups.valid.device), torch.zeros_like(segment.real))
        if bool(dropped.any()):
            index, real = compact_columns(dropped)
            columns = (take_columns(segment.columns, index) + now.call.past).masked_fill(~real, -1)
            now.aside[i] = Aside(hidden=take_columns(hidden.detach(), index), columns=columns)

    def _signal(self, i: int, hidden: Tensor, groups: Groups, request) -> Tensor | tuple[Tensor, Tensor] | list[int]:
        now = self.now
        if isinstance(request, Transition):
            done = [now.transitions[layer] for layer in request.layers if layer in now.transitions]
            if not done:
                raise UnsupportedStageError(f"no transition was measured before layer {i}: measure an earlier one")
            return groups.gather(sum(t.to(hidden.device) for t in done))
        if isinstance(request, LastQueryAttention):
            rows, _ = self._text_rows(last_only=True)
            queries = take_columns(now.projected[request.layer, "q_proj"], rows)
            keys = now.projected[request.layer, "k_proj"]
            context = self._context(request.layer)
            weights = decoder_attention_rows(queries, keys, rows, context)
            return self._over_groups(weights[:, :, 0], groups)
        if isinstance(request, KeyTokens):
            return groups.gather(take_columns(now.marks[request], now.call.segment.columns))
        if isinstance(request, NormedStates):
            normed, (rows, _) = self.adapter.language_model.norm(hidden).to(hidden.device), self._text_rows()
            return groups.gather(normed), take_columns(normed, rows)
        if isinstance(request, KeyNorms):
            norms = decoder_key_norms(now.projected[i - 1, "k_proj"], self._context(i - 1))
            rows, text = self._text_rows()
            # Where no text follows, the row is a visual token's.
            text = (text & ~now.call.segment.visual.gather(1, rows)).to(norms.device)
            return groups.gather(norms), take_columns(norms, rows).masked_fill(~text, -1)
        if isinstance(request, (AttentionPageRank, AttentionShare, RaterAttention, TextAttention)):
            queries, keys = (now.projected[i - 1, name] for name in ("q_proj", "k_proj"))
            context = self._context(i - 1)
            if isinstance(request, RaterAttention):
                return self._over_groups(self._rater_attention(queries, keys, context, request), groups)
            if isinstance(request, TextAttention):
                return groups.gather(self._text_attention(queries, keys, context))
            if isinstance(request, AttentionPageRank):
                return groups.gather(decoder_page_rank(queries, keys, request, context))
            share = decoder_attention_share(queries, keys, context)
            if request.of_padded:
                behind = (now.call.real & ~now.call.prompt).sum(1, keepdim=True)
                share = share / (now.call.length - behind).to(share.device)
            return groups.gather(share)
        if isinstance(request, InstructionAttention):
            layer = self.adapter.decoder_layers[i]
            rows, valid = self._text_rows(last_only=request.last_only)
            inner = layer.input_layernorm(hidden)
            queries = layer.self_attn.q_proj(take_columns(inner, rows))
            keys = layer.self_attn.k_proj(inner)
            context = self._context(i, now.call.places_at(i, hidden))
            weights = decoder_attention_rows(queries, keys, rows, context).mean(1)
            valid = valid.to(weights.device)[..., None]
            return groups.gather((weights * valid).sum(1) / valid.sum(1))
        if isinstance(request, SampleKeys):
            return [now.call.prompt_key(row) for row in range(now.call.batch)]
        raise UnsupportedStageError(f"{type(request).__name__} is not available inside the LLM")

    def _text_attention(self, queries: Tensor, keys: Tensor, context: RowContext) -> Tensor:
        """(batch, n, 2): see `TextAttention`."""
        rows, valid = self._text_rows()
        total, peak = None, None
        # All of a long text at once would be large.
        for some, real in zip(rows.split(TEXT_ROWS, 1), valid.split(TEXT_ROWS, 1), strict=True):
            weights = decoder_attention_rows(take_columns(queries, some), keys, some, context)
            sums, most = dual_attention(weights * real.to(weights.device)[:, None, :, None])
            total = sums if total is None else total + sums
            peak = most if peak is None else torch.maximum(peak, most)
        return torch.stack([total, peak], -1)

    def _rate(self, hidden: Tensor) -> Tensor:
        """(batch, call length) bool: the text tokens that rate, by what enters the first layer."""
        now = self.now
        (rows, valid), groups, hidden = self._text_rows(), now.call.sample_groups(), hidden.detach()
        real = (groups.valid.to(hidden.device), valid.to(hidden.device))
        raters = text_raters(groups.gather(hidden), take_columns(hidden, rows), *real).to(rows.device)
        columns = take_columns(now.call.segment.columns, rows)
        return torch.zeros_like(now.call.real).scatter(1, columns, raters)

    def _rater_attention(self, queries: Tensor, keys: Tensor, context: RowContext, request: RaterAttention) -> Tensor:
        """(batch, heads, n): see `RaterAttention`."""
        now = self.now
        rows, valid = self._rows_of(take_columns(now.raters, now.call.segment.columns) & now.call.segment.real)
        total, valid = 0, valid.to(keys.device)
        for some, rates in zip(rows.split(TEXT_ROWS, 1), valid.split(TEXT_ROWS, 1), strict=True):
            weights = decoder_attention_rows(take_columns(queries, some), keys, some, context)
            if request.undo_rotation:
                weights = weights / rotary_logits(some, context)[:, None].to(weights.device)
            total = total + weights.masked_fill(~rates[:, None, :, None], 0).sum(2)
        return total / valid.sum(1)[:, None, None]

    def _mark(self, call: Call, request: KeyTokens) -> Tensor:
        """(batch, call length) bool: see `KeyTokens`."""
        groups = call.crop_groups()
        rows = encoder_signal(call, groups, self.tap, ClsAttention((request.layer,)))[:, 0]
        keys = key_tokens(rows, groups.valid.to(rows.device), request.share)
        marked = groups.scatter(keys, torch.zeros_like(call.segment.real))
        return torch.zeros_like(call.real).scatter(1, call.segment.columns, marked)

    def _over_groups(self, weights: Tensor, groups: Groups) -> Tensor:
        """(batch, heads, n) -> (groups, heads, tokens)."""
        return groups.gather(weights.transpose(1, 2)).transpose(1, 2)

    def _text_rows(self, last_only: bool = False) -> tuple[Tensor, Tensor]:
        """Columns (batch, r) of the prompt's text after its last visual token, and which of them are real rows.

        Samples without such text, and `last_only`, give the prompt's last column.
        """
        segment, prompt = self.now.call.segment, self._prompt()
        columns = torch.arange(prompt.shape[1], device=prompt.device).expand_as(prompt)
        if last_only:
            last = torch.where(prompt, columns, -1).amax(1, keepdim=True)
            return last, torch.ones_like(last, dtype=torch.bool)
        last_visual = torch.where(segment.visual, columns, -1).amax(1, keepdim=True)
        text = segment.real & take_columns(self.now.call.text, segment.columns)
        return self._rows_of(text & (columns > last_visual))

    def _prompt(self) -> Tensor:
        """(batch, n) bool: the real columns of the prompt, at present."""
        now = self.now
        segment = now.call.segment
        return segment.real & now.call.prompt_at(segment)

    def _rows_of(self, marked: Tensor) -> tuple[Tensor, Tensor]:
        """Columns (batch, r) of what is marked, (batch, n) bool, and which are real rows; the prompt's last column
        where nothing is."""
        columns = torch.arange(marked.shape[1], device=marked.device)
        last = torch.where(self._prompt(), columns, -1).amax(1, keepdim=True)
        marked = torch.where(marked.any(1, keepdim=True), marked, columns == last)
        width = int(marked.sum(1).max())
        rows = torch.argsort(marked.to(torch.uint8), dim=1, stable=True)[:, -width:]
        return rows, marked.gather(1, rows)

    def _context(self, layer: int, places: Places | None = None) -> RowContext:
        """What the rows of a decoder layer need; places: of its columns, by default those it was given, cut since."""
        now = self.now
        call = now.call
        layout, past = call.before[layer]
        config = call.text_config
        sliding = layer_type(config, layer) == "sliding_attention"
        window = config.sliding_window if sliding else None
        keys = None
        if call.cache is not None and past:
            if window is not None and past + call.segment.real.shape[1] > window:
                raise UnsupportedStageError(
                    f"attention in decoder layer {layer} cannot be recomputed: its sliding window of {window} tokens "
                    "no longer holds all of the conversation so far"
                )
            held = call.cache.layers[layer]
            keys = (held.inner if isinstance(held, PrunedLayer) else held).keys[:, :, :past]
        return RowContext(
            attention=self.adapter.decoder_layers[layer].self_attn,
            places=now.places[layer] if places is None else places,
            real=call.segment.real,
            past_keys=keys,
            past_real=layout.real,
            # What was tapped in an earlier layer has been cut along with the sequence since.
            blocks=call.blocks_at(call.starts[-1]),
            window=window,
            window_cuts_blocks=self.adapter.window_cuts_blocks,
            present=call.segment.present,
            counting=call.prompt_at(call.segment),
        )
