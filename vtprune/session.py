# SPDX-License-Identifier: Apache-2.0
"""Sessions on vision-language models, and the functions that open a session on any model."""

from __future__ import annotations

import dataclasses
import threading
from itertools import chain
from typing import Any, ClassVar, Literal, cast

from torch import nn

from vtprune.adapters import Adapter, adapter_for, find_encoder
from vtprune.auto import choose, is_auto
from vtprune.callers import PerCaller
from vtprune.encoder_session import EncoderSession
from vtprune.errors import ConfigError, NothingPrunedError
from vtprune.guidance import Guidance, PromptLength
from vtprune.methods import MethodLike, build_methods
from vtprune.methods.base import Method
from vtprune.report import Report
from vtprune.session_life import SessionLife
from vtprune.stages.choosing import Profile, check_profile
from vtprune.stages.model_calls import ModelCalls
from vtprune.stages.question import Text
from vtprune.stages.slots import CacheContents
from vtprune.totals import Totals
from vtprune.transformers_private import check_release


def prune(
    model: nn.Module,
    method: MethodLike,
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    strict: bool = True,
    text: Text | None = None,
    prompt_length: PromptLength = None,
    profile: Profile = False,
    adapter: Literal["generic"] | None = None,
    **parameters: Any,
) -> Session:
    """A context manager inside which `model` prunes visual tokens; an `EncoderSession` for a vision encoder alone.

    Args:
        model: a loaded Hugging Face vision-language model of a supported family (`vtprune.adapter_for`); or a vision
            encoder alone, with methods that act inside it: a CLIP, SigLIP, ViT or DINOv2 of transformers, a
            `VisionTransformer` of timm, or a model of open_clip.
        method: a registered name, a method object, a mapping with `name`, a list of those, or a YAML file's path; or
            "auto": the default of the model's family (`vtprune.auto`), which the report then names with its reason.
        keep_ratio: share of visual tokens kept, averaged over the LLM's layers, in (0, 1]; of a method inside the
            encoder's layers, the share of patches left behind the last of them.
        keep_tokens: the same as a count per image, >= 0. Give one of the two (or neither, for methods with a published
            schedule); lists of methods carry their own.
        strict: raise NothingPrunedError if visual tokens came, pruning was asked for, and nothing was dropped.
        text: the question for text-guided methods, as text (the tokenizer is then loaded from the model's checkpoint)
            or as token ids; by default they read the prompt's own tokens.
        prompt_length: tokens of each prompt (an int, or one a sample), padding not counted, in calls that hold more: an
            answer that is scored, for example. Choices are made by the prompt alone. By default it ends where `labels`
            begin (unless they begin with the prompt), or where `logits_to_keep` says; else all is prompt.
        profile: True measures the times in `report.timings` (not for a vision encoder alone). "flops" counts the FLOPs
            of choosing tokens, `report.selection_flops`; each operation of a choice takes some 20 to 40 us longer.
        adapter: "generic" takes a model without an adapter of its own, for methods that need the projected features
            only. The model runs a few short prompts first, and is refused unless pruning gives what it gives itself
            without the dropped columns (`vtprune.generic`). By default the adapter of the model's family.
        **parameters: further fields of a single method, e.g. `layer=2`.

    Raises:
        UnsupportedModelError, UnsupportedStageError, BudgetError, ConfigError: before anything is changed.
    """
    check_profile(profile)
    budget = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
    parameters |= {key: value for key, value in budget.items() if value is not None}
    chosen = None
    if is_auto(method):
        method, chosen = choose(model, method, **parameters)
        parameters = {}
    methods = build_methods(method, **parameters)
    generic = None if adapter is None else _generic(model, methods, adapter)
    encoder = None if generic else find_encoder(model)
    if encoder is not None:
        given = {"text": text, "prompt_length": prompt_length}
        names = [name for name, value in given.items() if value is not None]
        if names:
            raise ConfigError(f"{', '.join(names)}: only for vision-language models; this is a vision encoder alone")
        # Which of the two it is only the model says. Type checkers are told the one that most callers get.
        return cast(Session, EncoderSession(model, encoder, methods, strict=strict, profile=profile))
    notes = () if chosen is None else (chosen,)
    return Session(
        model,
        methods,
        strict=strict,
        text=text,
        prompt_length=prompt_length,
        profile=profile,
        notes=notes,
        adapter=generic,
    )


def _generic(model: Any, methods: list[Method], name: str) -> Adapter:
    """The generic adapter of a model for methods that it can serve."""
    from vtprune.generic import GENERIC, generic_adapter  # it opens sessions itself

    if name != GENERIC:
        raise ConfigError(f"adapter={name!r}: give {GENERIC!r}, or leave it out to take that of the model's family")
    return generic_adapter(model, methods)


def patch(model: nn.Module, method: MethodLike, **options: Any) -> Session:
    """Like `prune`, but starts at once and lasts until `session.remove()`."""
    session = prune(model, method, **options)
    session.install()
    return session


class Session(SessionLife):
    """One vision-language model with hooks on it. Use `prune` or `patch` to make one.

    Several threads may call the model at the same time. `text` and `prompt_length` are those of all of them; one
    thread may change them between calls.
    """

    _calls_class: ClassVar[type[ModelCalls]] = ModelCalls

    def __init__(
        self,
        model: nn.Module,
        methods: list[Method],
        *,
        strict: bool,
        text: Text | None,
        prompt_length: PromptLength,
        profile: Profile,
        notes: tuple[str, ...] = (),
        adapter: Adapter | None = None,
    ):
        """notes: what each report says besides what it measured. adapter: of the model; None for that of its family."""
        check_release()
        self.adapter = adapter = adapter_for(model) if adapter is None else adapter
        modules = chain(model.modules() if isinstance(model, nn.Module) else (), adapter.model.modules())
        towers = [adapter.vision_tower(kind) for kind in adapter.visual_token_ids]
        super().__init__([adapter.language_model, *towers], modules, methods, strict=strict)
        self._guidance = Guidance(text, prompt_length)
        self._reports: PerCaller[tuple[Report, CacheContents]] = PerCaller()
        self._totals, self._lock = Totals(), threading.Lock()
        self._calls: ModelCalls = self._calls_class(
            adapter, methods, self._guidance, self._finished, profile=profile, notes=notes
        )

    @property
    def text(self) -> Text | None:
        """The question; see `prune`."""
        return self._guidance.text

    @text.setter
    def text(self, text: Text | None) -> None:
        self._guidance.text = text

    @property
    def prompt_length(self) -> PromptLength:
        """Tokens of each prompt; see `prune`."""
        return self._guidance.prompt_length

    @prompt_length.setter
    def prompt_length(self, prompt_length: PromptLength) -> None:
        self._guidance.prompt_length = prompt_length

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

    def __repr__(self) -> str:
        return f"{super().__repr__()}\n{self.totals}"

    def remove(self) -> None:
        """Take the hooks off; the model is exactly what it was. Idempotent.

        A forward call of the language model that another thread is in ends first. Caches that were pruned are refused
        from now on.
        """
        super().remove()
        self._reports.replace(lambda last: _current(*last))

    def _finished(self, report: Report, contents: CacheContents, wants_less: bool) -> None:
        """Keep the report of a prefill. wants_less: whether the methods were asked to drop anything of it."""
        self._reports.set((report, contents))
        with self._lock:
            self._totals += report
        if self.strict and wants_less and any(report.original_tokens) and report.keep_ratio == 1.0:
            raise NothingPrunedError(
                f"{', '.join(m.name for m in self.methods)}: {sum(report.original_tokens)} visual tokens came "
                "and none was dropped; the budget rounds to everything (pass strict=False to allow it)"
            )


def _current(report: Report, contents: CacheContents) -> tuple[Report, CacheContents]:
    """A report that says what its KV cache holds by now, and need not be asked again."""
    in_cache, auxiliary_bytes = contents.of(report.visual)
    if in_cache is None:
        return report, contents
    return dataclasses.replace(report, in_cache=in_cache, auxiliary_bytes=auxiliary_bytes), CacheContents()
