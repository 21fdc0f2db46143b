# SPDX-License-Identifier: Apache-2.0
"""Hooks on a model that follow each of its calls through the stages, from the pixels to the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vtprune.adapters.base import Adapter
from vtprune.callers import ThreadAware, Underway
from vtprune.checks import Condition, require_all
from vtprune.devices import send
from vtprune.errors import UnsupportedModelError, UnsupportedStageError, VTPruneError
from vtprune.graphs import in_graphs
from vtprune.guidance import Guidance
from vtprune.methods.base import BeforeLLM, InEncoder, InLLM, Method
from vtprune.methods.in_layers import InLayers
from vtprune.report import Report, Timings
from vtprune.stages.before_llm import prune_before_llm
from vtprune.stages.cache import Owner, check_cache, pruned_layers
from vtprune.stages.call import Call
from vtprune.stages.choosing import Profile, counting
from vtprune.stages.continuing import go_on
from vtprune.stages.encoder import EncoderRecorder, clock
from vtprune.stages.eviction import EvictionStage
from vtprune.stages.hooks import Uncopied
from vtprune.stages.in_llm import InLLMStage
from vtprune.stages.incoming import Behind, Columns, Incoming, check_traced, open_call
from vtprune.stages.model_checks import check_length, check_states
from vtprune.stages.prefill_report import asks_for_everything, prefill_report, substitutes, text_report
from vtprune.stages.reading import check_family, check_signals
from vtprune.stages.replays import Replays
from vtprune.stages.revival import RevivalStage
from vtprune.stages.slots import CacheContents
from vtprune.stages.static_cache import first_fixed, leave_step, stays_as_it_is
from vtprune.stages.static_calls import StaticStage, step_in_graph
from vtprune.tokens import Selection, VisualTokens
from vtprune.transformers_private import (
    cache_of,
    cut_along,
    deepstack_of,
    drop_deepstack,
    is_paged,
    longest_prunable,
    with_first_features,
)


@dataclass
class _Following:
    """The calls that one thread makes."""

    behind: Behind | None = None
    """What the outer model was told, until its base model is called."""
    incoming: Incoming | None = None
    """What the base model was called with, until its language model is called."""
    call: Call | None = None
    """The call of the language model that runs now, if it carries images."""
    followed: bool = False
    """Whether decoder layers may be given something in the call that runs now."""
    replays: Replays = field(default_factory=Replays)
    selector_seconds: float = 0.0
    selection_flops: int = 0
    """Of choices since the prefill began; those in the vision encoder are not among them."""
    started: float = 0.0
    """Clock at the beginning of the prefill."""
    conditions: list[Condition] = field(default_factory=list)
    """What the next choice asks with its own questions."""

    def take_conditions(self) -> list[Condition]:
        """What was to be asked, for the caller to ask it."""
        conditions, self.conditions = self.conditions, []
        return conditions


class ModelCalls(Uncopied, ThreadAware[_Following]):
    """Follows the calls of one model while its hooks are on, each thread's by themselves."""

    def __init__(
        self,
        adapter: Adapter,
        methods: Sequence[Method],
        guidance: Guidance,
        finished: Callable[[Report, CacheContents, bool], None],
        *,
        profile: Profile,
        notes: tuple[str, ...] = (),
    ):
        """finished: is given the report of each prefill, what the KV cache contains from then on, and whether the
        methods were asked to drop anything of it. notes: what each report says first."""
        super().__init__(_Following)
        self.adapter, self.methods, self.guidance = adapter, methods, guidance
        self.finished = finished
        self.owner = Owner()
        self.reached = False
        """Whether any call reached the language model since the hooks are on."""
        self._underway = Underway()
        self._profile = profile

        shape = adapter.shape
        for method in methods:
            method.check_budget(shape)
        parts = [part for method in methods for part in method.parts(shape)]
        for part in parts:
            check_signals(part, shape)
            check_family(part, adapter)
        signals = [signal for part in parts for signal in part.signals(shape)]
        self._notes = (*notes, *substitutes(methods, shape))
        active = [part for part in parts if part.keep_ratio != 1.0]
        self.prunes = bool(active)
        """Whether any method asks for less than everything."""
        check_states(adapter, active)
        self._longest = longest_prunable(adapter.language_model.config, shape.decoder_layers)
        self._before = [part for part in active if isinstance(part, BeforeLLM)]
        in_encoder = [part for part in active if isinstance(part, InEncoder)]
        in_layers = [part for part in active if isinstance(part, InLayers)]
        self._recorder = EncoderRecorder(adapter, signals, in_encoder, in_layers, profile=profile)
        inside = [part for part in active if isinstance(part, InLLM)]
        self._in_llm = InLLMStage(adapter, inside, shape, self.choose, self._recorder)
        self._eviction = EvictionStage(active, shape, self._select)
        self._revival = RevivalStage(adapter, active, shape, self._select)
        self._static = StaticStage(adapter, self._revival.reviving and self._revival.reviving.name)

    def install(self) -> Iterator[RemovableHandle]:
        """Yields what takes each hook off again, as soon as it is on."""
        self.owner.active, self.reached = True, False
        # Hooks on layers cost every generated token some time.
        inside = (self._static, self._in_llm, self._revival) if self.prunes else ()
        return chain(self._install_here(), *(stage.install() for stage in (self._recorder, *inside)))

    def _install_here(self) -> Iterator[RemovableHandle]:
        decoder = self.adapter.language_model
        yield self.adapter.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield self.adapter.base.register_forward_pre_hook(self._before_base, with_kwargs=True)
        yield self.adapter.base.register_forward_hook(self._after_base, with_kwargs=True)
        yield decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        yield decoder.register_forward_hook(self._after_decoder, with_kwargs=True)
        yield decoder.register_forward_hook(self._leave_decoder, with_kwargs=True, always_call=True)

    def stop(self) -> None:
        """Let later calls run as they are. Waits for a call of the language model that another thread is in."""
        self.owner.active = False
        self._recorder.in_layers.stop()
        self._underway.wait_for_others()

    def forget(self) -> None:
        """Forget all calls, once the hooks are off."""
        self._recorder.forget()
        self._in_llm.forget()
        self._revival.forget()
        self._static.forget()
        super().forget()

    def _end_call(self) -> None:
        now = self.now
        now.incoming = None
        if now.followed:
            now.call, now.followed, now.conditions = None, False, []
            self._in_llm.end()
            if self._revival.reviving:
                self._revival.end()

    # -- hooks --------------------------------------------------------------------------------------------------

    @in_graphs(stays_as_it_is)
    def _before_model(self, module, args, kwargs):
        self.now.behind = Behind.of(kwargs, self.guidance.prompt_length)

    @in_graphs(stays_as_it_is)
    def _before_base(self, module, args, kwargs):
        check_traced()
        now = self.now
        behind, now.behind = now.behind, None
        now.incoming = Incoming.of(self.adapter, args, kwargs, behind or Behind(self.guidance.prompt_length))

    @in_graphs(stays_as_it_is)
    def _after_base(self, module, args, kwargs, output):
        if self.now.incoming is not None and self.prunes:
            raise UnsupportedModelError(
                "the language model ran without the hooks of this vtprune session, so nothing was pruned: it is in a "
                "graph that was compiled before; call torch.compiler.reset(), or prune the uncompiled model"
            )

    @in_graphs(stays_as_it_is)
    def _leave_decoder(self, module, args, kwargs, output):
        self._in_llm.hooks.leave()
        self._underway.end()

    @in_graphs(step_in_graph)
    def _before_decoder(self, module, args, kwargs):
        now, incoming = self.now, self.now.incoming
        self._end_call()
        self._underway.begin()
        if not self.owner.active:  # another thread removes the session at this moment
            self._underway.end()
            if incoming is not None and incoming.kinds and self._recorder.has_merged:
                raise VTPruneError("this vtprune session was removed while the images of this call were encoded")
            return None
        self.reached = True
        kwargs = self.adapter.embedded(kwargs)
        hidden = kwargs.get("inputs_embeds")
        if hidden is None:
            return None
        cache = cache_of(kwargs)
        if incoming is not None and self.prunes:
            incoming.check_cache(cache)
        mask = self._static.padding(kwargs.get("attention_mask") if incoming is None else incoming.mask)
        has_images = incoming is not None and bool(incoming.kinds)
        first = first_fixed(cache)
        if first is not None and hidden.shape[1] == 1 and not has_images:
            kwargs = self._static.enter_step(cache, first, kwargs, self.owner)
            self._in_llm.now.views, now.followed = first.views, True
            return args, kwargs
        pruned = pruned_layers(cache)
        if pruned or first is not None or (has_images and self.prunes):
            if cache is not None:
                check_cache(cache, self.owner)
            if incoming is not None:
                incoming.check_packed()
            if self._longest is not None:
                check_length(self._longest, hidden.shape[1] + (0 if cache is None else int(cache.get_seq_length())))
            self._static.begin(cache, hidden.shape[1])
            if self._static.prunes:
                self._in_llm.hooks.stay()  # the steps to come may be in a graph
            pruned = pruned_layers(cache)
        if not has_images:
            if not pruned:
                if incoming is not None and self.prunes and hidden.shape[1] > 1:
                    incoming.check_text_only(self.adapter)
                self._in_llm.go_on(None)
                self._report_text_only(hidden, mask, cache)
                return None
            if pruned[0].slots is not None:
                now.followed = True
                self._revival.begin(cache, hidden, Columns.of(hidden, kwargs, mask, has_images=False))
                return args, {**kwargs, "attention_mask": None}
            kwargs, continuation = go_on(self.adapter, module.config, cache, pruned, hidden, kwargs, mask)
            now.followed = continuation is not None or self._static.prunes
            self._in_llm.go_on(continuation)
            return args, kwargs
        kwargs = dict(kwargs)
        try:
            whole = with_first_features(hidden, kwargs)
            now.followed = True
            call = now.call = open_call(self.adapter, self.owner, self._recorder, whole, kwargs, mask, incoming)
        except UnsupportedStageError:
            if self.prunes or pruned:
                raise
            return None  # nothing will be pruned, so there is nothing to refuse; only the report goes without
        self.start_prefill(call, incoming)
        entering = prune_before_llm(call, whole, self._before, self._recorder, self.guidance.text, self.choose)
        require_all(now.take_conditions())
        hidden = self._take_deepstack(call, kwargs, hidden, entering)
        self._in_llm.begin(call)
        if self._static.prunes and not call.wrapped:
            call.update_cache_layouts(0)
        if not call.pruned and not call.wrapped:
            return (args, kwargs) if call.cache is not cache or call.deepstack or self._in_llm.cuts else None
        cut_along(kwargs, call.sequence.takes_from(call.whole))
        kwargs |= {"inputs_embeds": hidden, "position_ids": call.positions_at(0)}
        kwargs["attention_mask"] = call.model_mask(hidden)
        return args, kwargs

    def _take_deepstack(self, call: Call, kwargs: dict, given: Tensor, entering: Tensor) -> Tensor:
        """The embeddings that the model is called with: those that came in (`given`), or those to go on with
        (`entering`) if tokens go missing where it would still add DeepStack features, which are then taken over."""
        deepstack = deepstack_of(kwargs)
        if deepstack and not call.pruned and not self._in_llm.cuts_before(max(deepstack)):
            return given
        drop_deepstack(kwargs)
        return call.take_deepstack(deepstack, entering)

    def start_prefill(self, call: Call, incoming: Incoming) -> None:
        """Check what is about to be pruned, and find out whether its choices were made before."""
        now = self.now
        # Without a cache generate() sends the whole prompt again for every token; the choices of its prefill hold.
        replayable = not incoming.pixels and call.cache is None and call.ids is not None
        now.replays.begin(tuple(incoming.encoded.values()), call.ids if replayable else None)
        now.selector_seconds, now.selection_flops, now.started = 0.0, 0, self._clock()
        self._eviction.check(now.replays.replaying)
        self._revival.check(call, now.replays.replaying)
        if self.prunes:
            visual = send(call.media.visual, call.embeddings.device)
            finite = (call.embeddings.isfinite().all(-1) | ~visual).all()
            now.conditions.append(Condition(finite, "the image features contain NaN or Inf; nothing was pruned"))

    @in_graphs(leave_step)
    def _after_decoder(self, module, args, kwargs, output):
        now = self.now
        if now.followed and self._revival.now.step is not None:
            return self._revival.finish(output)
        call = now.call
        if call is None:
            if now.followed:
                self._static.settle(cache_of(kwargs))
            return self._end_call()
        if not now.replays.replaying:
            contents = CacheContents()
            self._eviction.after_prefill(call, contents)
            self._revival.after_prefill(call, self._in_llm.now.stored, contents)
            self._finish_prefill(call, contents)
        self._static.settle(call.cache)
        self._end_call()
        return call.restore(output) if call.pruned else None

    @torch.no_grad()
    def choose(self, method: Method, tokens: VisualTokens) -> Selection:
        replays = self.now.replays
        return replays.next() if replays.replaying else replays.note(self._select(method, tokens))

    @torch.no_grad()
    def _select(self, method: Method, tokens: VisualTokens) -> Selection:
        now, started = self.now, self._clock()
        with counting(now, self._profile):
            selection = method.choose(tokens, now.take_conditions())
        now.selector_seconds += self._clock() - started
        return selection

    def _clock(self) -> float:
        return clock(self.adapter.model) if self._profile is True else 0.0

    def _report_text_only(self, hidden: Tensor, mask: Any, cache) -> None:
        """A prompt without images, on an empty cache: a report that says so. Decoding steps change nothing."""
        if hidden.shape[1] == 1 or (cache is not None and (is_paged(cache) or cache.get_seq_length())):
            return
        flops = 0 if self._profile == "flops" else None
        report = text_report(self.adapter, self.methods, self._notes, hidden, mask, selection_flops=flops)
        self.finished(report, CacheContents(), False)

    def _finish_prefill(self, call: Call, contents: CacheContents) -> None:
        timings = flops = None
        now, encodings = self.now, call.media.encodings
        if self._profile is True:
            encoding = sum(encoding.seconds for encoding in encodings)
            timings = Timings(encoding, now.selector_seconds, self._clock() - now.started)
        elif self._profile == "flops":
            flops = now.selection_flops + sum(encoding.selection_flops for encoding in encodings)
        report = prefill_report(call, self._recorder, self.methods, self._notes, timings=timings, selection_flops=flops)
        wants_less = not all(asks_for_everything(method, call) for method in self.methods)
        self.finished(report, contents, wants_less)
