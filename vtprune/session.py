# SPDX-License-Identifier: Apache-2.0
"""Sessions: put the hooks on one model, take them off, keep the report."""

from __future__ import annotations

import dataclasses
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vtprune.adapters import adapter_for
from vtprune.adapters.base import Adapter
from vtprune.callers import Caller, PerCaller, PerThread, Underway, caller, lives
from vtprune.errors import NothingPrunedError, UnsupportedModelError, UnsupportedStageError, VTPruneError
from vtprune.graphs import is_graph, outside_graphs
from vtprune.methods import MethodLike, build_methods
from vtprune.methods.base import AfterPrefill, BeforeLLM, InEncoder, InLLM, Method
from vtprune.report import Report, Timings, Totals
from vtprune.stages.before_llm import prune_before_llm
from vtprune.stages.cache import Owner, PrunedLayer, check_cache, pruned_layers
from vtprune.stages.call import Call
from vtprune.stages.encoder import EncoderTap, clock
from vtprune.stages.eviction import EvictionStage
from vtprune.stages.in_llm import InLLMStage
from vtprune.stages.incoming import Behind, Columns, Incoming, check_traced, open_call
from vtprune.stages.prefill_report import prefill_report, text_report
from vtprune.stages.question import Text
from vtprune.stages.reading import check_signals
from vtprune.stages.replays import Replays
from vtprune.stages.revival import RevivalStage
from vtprune.stages.slots import CacheContents
from vtprune.tokens import Selection, VisualTokens
from vtprune.transformers_private import (
    cache_of,
    check_decoder,
    check_release,
    is_paged,
    longest_prunable,
    state_kinds,
    unmasked_steps,
)

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()
"""Language model -> the session that is on it. Keyed by the decoder, so that wrappers of one model count as one; both
are held weakly, for a session holds its model."""


PromptLength = int | Sequence[int] | Tensor | None


def prune(
    model: nn.Module,
    method: MethodLike,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    strict: bool = True,
    text: Text | None = None,
    prompt_length: PromptLength = None,
    profile: bool = False,
    **parameters: Any,
) -> Session:
    """A context manager inside which `model` prunes visual tokens.

    Args:
        model: a loaded Hugging Face vision-language model of a supported family (`vtprune.adapter_for`).
        method: a registered name, a method object, a mapping with `name`, a list of those, or a YAML file's path.
        keep_ratio: share of visual tokens kept, averaged over the LLM's layers, in (0, 1].
        keep_tokens: the same as a count per image, >= 0. Give one of the two (or neither, for methods with a published
            schedule); lists of methods carry their own.
        strict: raise NothingPrunedError if visual tokens came, pruning was asked for, and nothing was dropped.
        text: the question for text-guided methods, as text (the tokenizer is then loaded from the model's checkpoint)
            or as token ids; by default they read the prompt's own tokens.
        prompt_length: tokens of each prompt (an int, or one a sample), padding not counted, in calls that hold more: an
            answer that is scored, for example. Choices are made by the prompt alone. By default it ends where `labels`
            begin (unless they begin with the prompt), or where `logits_to_keep` says; else all is prompt.
        profile: measure the times in `report.timings`.
        **parameters: further fields of a single method, e.g. `layer=2`.

    Raises:
        UnsupportedModelError, UnsupportedStageError, BudgetError, ConfigError: before anything is changed.
    """
    budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    parameters |= {key: value for key, value in budget.items() if value is not None}
    methods = build_methods(method, **parameters)
    return Session(model, methods, strict=strict, text=text, prompt_length=prompt_length, profile=profile)


def patch(model: nn.Module, method: MethodLike, **options: Any) -> Session:
    """Like `prune`, but starts at once and lasts until `session.remove()`."""
    session = prune(model, method, **options)
    session.install()
    return session


def _active(decoder: nn.Module) -> Session | None:
    """The session that is on a language model."""
    reference = _ACTIVE.get(decoder)
    return None if reference is None else reference()


@dataclass
class _Following:
    """The calls that one thread makes."""

    behind: Behind | None = None
    """What the outer model was told, until its base model is called."""
    incoming: Incoming | None = None
    """What the base model was called with, until its language model is called."""
    call: Call | None = None
    """The call of the language model that runs now."""
    replays: Replays = field(default_factory=Replays)
    selector_seconds: float = 0.0
    started: float = 0.0
    """Clock at the beginning of the prefill."""

    def end_call(self) -> None:
        self.call = self.incoming = None


class Session:
    """One model with hooks on it. Use `prune` or `patch` to make one.

    Several threads may call the model at the same time. `text` and `prompt_length` are those of all of them; one
    thread may change them between calls.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: list[Method],
        *,
        strict: bool,
        text: Text | None,
        prompt_length: PromptLength,
        profile: bool,
    ):
        check_release()
        self.adapter: Adapter = adapter_for(model)
        self._check_compiled(model)
        self.methods = methods
        self.strict = strict
        self._text = text
        self._prompt_length = prompt_length
        self._teller: Caller | None = None
        """Who changed `text` or `prompt_length` last."""
        self._reports: PerCaller[tuple[Report, CacheContents]] = PerCaller()
        self._totals, self._lock = Totals(), threading.Lock()
        self._profile = profile
        self._entered = self._called = False
        self._owner = Owner()
        self._handles: list = []
        self._following = PerThread(_Following)
        self._underway = Underway()

        shape = self.adapter.shape
        for method in methods:
            method.check_budget(shape)
        parts = [part for method in methods for part in method.parts(shape)]
        for part in parts:
            check_signals(part, shape)
        requests = [request for part in parts for request in part.signals(shape)]
        active = [part for part in parts if part.keep_ratio != 1.0]
        self._check_states(active)
        self._longest = longest_prunable(self.adapter.language_model.config, shape.decoder_layers)
        self._before = [m for m in active if isinstance(m, BeforeLLM)]
        encoder = [m for m in active if isinstance(m, InEncoder)]
        self._tap = EncoderTap(self.adapter, requests, encoder, profile=profile)
        inside = [m for m in active if isinstance(m, InLLM)]
        self._in_llm = InLLMStage(self.adapter, inside, shape, self._choose, self._tap)
        self._eviction = EvictionStage(active, shape, self._select)
        self._revival = RevivalStage(self.adapter, active, shape, self._select)
        self._prunes = bool(active)

    def _check_compiled(self, model) -> None:
        modules = chain(model.modules() if isinstance(model, nn.Module) else (), self.adapter.model.modules())
        found = next(filter(is_graph, modules), None)
        if found is not None:
            raise UnsupportedModelError(
                f"this model is compiled, traced or exported ({type(found).__name__} is, at least); pruning works by "
                "hooks, which a graph leaves out: prune the uncompiled model, and compile it in the session"
            )

    def _check_states(self, active: list[Method]) -> None:
        """Raise if tokens are to be dropped where the language model cannot do without them."""
        decoder, depth = self.adapter.language_model, len(self.adapter.decoder_layers)
        check_decoder(decoder)
        states = state_kinds(decoder.config, depth)
        inside = [part.name for part in active if isinstance(part, InLLM | AfterPrefill)]
        if states and inside:
            raise UnsupportedStageError(
                f"{', '.join(inside)}: tokens cannot be dropped inside this language model, which has layers that "
                f"carry a state from token to token ({', '.join(states)}); methods before the LLM work: mmtok, divprune"
            )

    @property
    def text(self) -> Text | None:
        """The question; see `prune`."""
        return self._text

    @text.setter
    def text(self, text: Text | None) -> None:
        self._tell()
        self._text = text

    @property
    def prompt_length(self) -> PromptLength:
        """Tokens of each prompt; see `prune`."""
        return self._prompt_length

    @prompt_length.setter
    def prompt_length(self, prompt_length: PromptLength) -> None:
        self._tell()
        self._prompt_length = prompt_length

    def _tell(self) -> None:
        """Note who changes what all calls share. Raises VTPruneError if somebody else does so, too."""
        own = caller()
        with self._lock:
            if self._teller not in (None, own) and lives(self._teller):
                raise VTPruneError(
                    "text and prompt_length are those of all threads and tasks, and another one has changed them: it "
                    "would be guided by yours; leave text out (the prompt's own question is read), or change them in "
                    "one thread only"
                )
            self._teller = own

    @property
    def report(self) -> Report | None:
        """The last prefill of this thread (or asyncio task), and what became of its KV cache since; None before one.

        A thread that made none is given that of another one if there is only one; with several, VTPruneError.
        """
        last = self._reports.get()
        return None if last is None else _current(*last)[0]

    @property
    def totals(self) -> Totals:
        """All prefills since the session was made, of all threads."""
        return self._totals

    # -- life ---------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the hooks on the model. Raises VTPruneError if a session is on it already."""
        decoder = self.adapter.language_model
        if _active(decoder) is not None:
            raise VTPruneError(
                "a vtprune session is active on this model already; remove it first, or pass a list of methods to "
                "compose them in one session"
            )
        _ACTIVE[decoder] = weakref.ref(self)
        self._owner.active, self._called = True, False
        try:
            # One at a time: what an adapter states wrongly fails half way, and then everything has to come off again.
            for handle in chain(
                self._tap.install(), self._install_own(), self._in_llm.install(), self._revival.install()
            ):
                self._handles.append(outside_graphs(handle))
        except BaseException:
            self.remove()
            raise

    def _install_own(self) -> Iterator[RemovableHandle]:
        decoder = self.adapter.language_model
        if self.adapter.model is not self.adapter.base:
            yield self.adapter.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
        yield self.adapter.base.register_forward_pre_hook(self._before_base, with_kwargs=True)
        yield self.adapter.base.register_forward_hook(self._after_base)
        yield decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True)
        yield decoder.register_forward_hook(self._after_decoder, with_kwargs=True)
        yield decoder.register_forward_hook(self._leave_decoder, always_call=True)

    def remove(self) -> None:
        """Take the hooks off; the model is exactly what it was. Idempotent.

        A forward call of the language model that another thread is in ends first. Caches that were pruned are refused
        from now on.
        """
        self._owner.active = False
        self._underway.wait_for_others()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if _active(self.adapter.language_model) is self:
            del _ACTIVE[self.adapter.language_model]
        self._entered = False
        self._tap.forget()
        self._in_llm.forget()
        self._revival.forget()
        self._following.clear()
        self._reports.replace(lambda last: _current(*last))

    def __enter__(self) -> Session:
        if self._entered:
            raise VTPruneError(
                "this session is entered already, and leaving it once would end it for the block around, too; open it "
                "in one place only"
            )
        if not self._handles:
            self.install()
        self._entered = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        unseen = self.strict and self._prunes and not self._called and error is None
        self.remove()
        if unseen:
            warnings.warn(
                "no call of the model reached this vtprune session, so nothing was pruned; a function that was "
                "compiled or traced before the session began leaves its hooks out (pass strict=False if there was no "
                "call)",
                UserWarning,
                stacklevel=2,
            )

    def __deepcopy__(self, memo):
        # Hooks are bound to their session, so this is reached by whatever copies a model that has one.
        raise VTPruneError(
            "a model cannot be copied or pickled while a vtprune session is on it; end the session first"
        )

    def __reduce__(self):
        return self.__deepcopy__({})

    @property
    def now(self) -> _Following:
        """What the calling thread is doing."""
        return self._following()

    def _end_call(self) -> None:
        self.now.end_call()
        self._in_llm.end()
        self._revival.end()

    # -- hooks --------------------------------------------------------------------------------------------------

    def _before_model(self, module, args, kwargs):
        self.now.behind = Behind.of(kwargs, self.prompt_length)

    def _before_base(self, module, args, kwargs):
        check_traced()
        now = self.now
        behind, now.behind = now.behind, None
        now.incoming = Incoming.of(self.adapter, args, kwargs, behind or Behind(self.prompt_length))

    def _after_base(self, module, args, output):
        if self.now.incoming is not None and self._prunes:
            raise UnsupportedModelError(
                "the language model ran without the hooks of this vtprune session, so nothing was pruned: it is in a "
                "graph that was compiled before; call torch.compiler.reset(), or prune the uncompiled model"
            )

    def _leave_decoder(self, module, args, output):
        self._underway.end()

    def _before_decoder(self, module, args, kwargs):
        now = self.now
        incoming = now.incoming
        self._end_call()
        self._underway.begin()
        if not self._owner.active:  # another thread removes the session at this moment
            self._underway.end()
            if incoming is not None and incoming.kinds and self._tap.has_merged:
                raise VTPruneError("this vtprune session was removed while the images of this call were encoded")
            return None
        self._called = True
        hidden = kwargs.get("inputs_embeds")
        if hidden is None:
            return None
        cache = cache_of(kwargs)
        if incoming is not None and self._prunes:
            incoming.check_cache(cache)
        pruned = pruned_layers(cache)
        mask = kwargs.get("attention_mask") if incoming is None else incoming.mask
        has_images = incoming is not None and bool(incoming.kinds)
        if pruned or (has_images and self._prunes):
            if cache is not None:
                check_cache(cache, self._owner)
            if incoming is not None:
                incoming.check_packed()
            self._check_length(hidden.shape[1] + (0 if cache is None else int(cache.get_seq_length())))
        if not has_images:
            if not pruned:
                if incoming is not None and self._prunes and hidden.shape[1] > 1:
                    incoming.check_text_only(self.adapter)
                self._report_text_only(hidden, mask, cache)
                return None
            if pruned[0].slots is not None:
                self._revival.begin(cache, hidden, Columns.of(hidden, kwargs, mask, has_images=False))
                return args, {**kwargs, "attention_mask": None}
            if self._needs_no_mask(hidden.shape[1], mask, pruned):
                return args, {**kwargs, "attention_mask": None}
        kwargs = dict(kwargs)
        try:
            noted = incoming if has_images else None
            call = now.call = open_call(self.adapter, self._owner, self._tap, hidden, kwargs, mask, noted)
        except UnsupportedStageError:
            if self._prunes or pruned:
                raise
            return None  # nothing will be pruned, so there is nothing to refuse; only the report goes without
        if has_images:
            self._start_prefill(call, incoming)
            hidden = prune_before_llm(call, hidden, self._before, self._tap, self.text, self._choose)
            self._take_deepstack(call, kwargs)
        self._in_llm.begin(call)
        if not call.pruned and not call.wrapped:
            return (args, kwargs) if call.cache is not cache or call.deepstack else None
        kwargs["inputs_embeds"] = hidden
        kwargs["position_ids"] = call.positions_at(0)
        kwargs["attention_mask"] = call.model_mask(hidden)
        return args, kwargs

    def _check_length(self, length: int) -> None:
        if self._longest is not None and length > self._longest:
            raise UnsupportedStageError(
                f"{length} tokens are too many to prune: this language model attends in chunks, or scales its queries "
                f"by the tokens before them, and stays right up to {self._longest} tokens only"
            )

    def _take_deepstack(self, call: Call, kwargs: dict) -> None:
        """Take over the DeepStack features if tokens go missing in the layers to whose outputs the model adds them.

        The language model would add them where the visual tokens stood before any was dropped.
        """
        deepstack = kwargs.get("deepstack_visual_embeds")
        if deepstack and (call.pruned or self._in_llm.cuts_before(len(deepstack))):
            call.deepstack = kwargs.pop("deepstack_visual_embeds")
            kwargs.pop("visual_pos_masks", None)

    def _needs_no_mask(self, length: int, mask: Tensor | None, pruned: list[PrunedLayer]) -> bool:
        """Whether the next `length` tokens on a pruned cache are right with what the model builds without a mask.

        They are if every column is real, positions run on, and one mask (or none at all) fits every layer.
        """
        if any(layer.layout.real is not None or layer.layout.shift is not None for layer in pruned):
            return False
        # A window that is full is masked, although nothing in it is.
        windows = any(layer.is_sliding for layer in pruned)
        unmasked = length == 1 and not windows and unmasked_steps(self.adapter.text_config)
        if not unmasked and len({layer.layout.dropped for layer in pruned}) > 1:
            return False
        return length == 1 or mask is None or bool(torch.as_tensor(mask)[:, -length:].all())

    def _start_prefill(self, call: Call, incoming: Incoming) -> None:
        """Check what is about to be pruned, and find out whether its choices were made before."""
        now = self.now
        # Without a cache generate() sends the whole prompt again for every token; the choices of its prefill hold.
        replayable = not incoming.pixels and call.cache is None and call.ids is not None
        now.replays.begin(tuple(incoming.encoded.values()), call.ids if replayable else None)
        now.selector_seconds, now.started = 0.0, self._clock()
        self._eviction.check(now.replays.replaying)
        self._revival.check(call, now.replays.replaying)
        features = call.embeddings[call.sequence.visual.to(call.embeddings.device)]
        if self._prunes and not bool(features.isfinite().all()):
            raise VTPruneError("the image features contain NaN or Inf; nothing was pruned")

    def _after_decoder(self, module, args, kwargs, output):
        if self._revival.now.step is not None:
            return self._revival.finish(output)
        now = self.now
        call = now.call
        if call is None:
            return None
        if call.media is not None and not now.replays.replaying:
            contents = CacheContents()
            self._eviction.after_prefill(call, contents)
            self._revival.after_prefill(call, self._in_llm.now.stored, contents)
            self._finish_prefill(call, contents)
        self._end_call()
        return call.restore(output) if call.pruned else None

    # -- selection ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, method: Method, tokens: VisualTokens) -> Selection:
        replays = self.now.replays
        return replays.next() if replays.replaying else replays.note(self._select(method, tokens))

    @torch.no_grad()
    def _select(self, method: Method, tokens: VisualTokens) -> Selection:
        started = self._clock()
        selection = method.choose(tokens)
        self.now.selector_seconds += self._clock() - started
        return selection

    def _clock(self) -> float:
        return clock(self.adapter.model) if self._profile else 0.0

    # -- report -------------------------------------------------------------------------------------------------

    def _report_text_only(self, hidden: Tensor, mask: Any, cache) -> None:
        """A prompt without images, on an empty cache: a report that says so. Decoding steps change nothing."""
        if (cache is not None and (is_paged(cache) or cache.get_seq_length())) or hidden.shape[1] == 1:
            return
        self._keep(text_report(self.adapter, self.methods, hidden, mask), CacheContents())

    def _finish_prefill(self, call: Call, contents: CacheContents) -> None:
        timings = None
        if self._profile:
            now, encoding = self.now, sum(encoding.seconds for encoding in call.media.encodings)
            timings = Timings(encoding, now.selector_seconds, self._clock() - now.started)
        report = prefill_report(call, self._tap, self.methods, timings)
        self._keep(report, contents)
        wants_less = not all(self._asks_for_everything(method, call) for method in self.methods)
        if self.strict and wants_less and any(report.original_tokens) and report.keep_ratio == 1.0:
            raise NothingPrunedError(
                f"{', '.join(m.name for m in self.methods)}: {sum(report.original_tokens)} visual tokens came "
                "and none was dropped; the budget rounds to everything (pass strict=False to allow it)"
            )

    def _keep(self, report: Report, contents: CacheContents) -> None:
        self._reports.set((report, contents))
        with self._lock:
            self._totals += report

    def _asks_for_everything(self, method: Method, call: Call) -> bool:
        """A count budget that equals the image asks for nothing to be dropped."""
        crops = call.media.crops_per_sample.clamp(min=1)
        content = (call.media.labels >= 0).sum(1)
        return method.keep_ratio == 1.0 or (
            method.keep_tokens is not None and bool((method.keep_tokens * crops >= content).all())
        )


def _current(report: Report, contents: CacheContents) -> tuple[Report, CacheContents]:
    """A report that says what its KV cache holds by now, and need not be asked again."""
    in_cache, auxiliary_bytes = contents.of(report.visual)
    if in_cache is None:
        return report, contents
    return dataclasses.replace(report, in_cache=in_cache, auxiliary_bytes=auxiliary_bytes), CacheContents()
