# SPDX-License-Identifier: Apache-2.0
"""Runs settings: the full answer, and what methods and people make of it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

import vtprune
from vtprune.auto import default_for, is_auto
from vtprune.demo.exactly import Exactly
from vtprune.demo.setting import Setting
from vtprune.demo.sheet import Sheet
from vtprune.demo.uploads import Shown, open_example, open_upload
from vtprune.errors import ConfigError, VTPruneError
from vtprune.eval.inputs import answers, chat_inputs, load_model
from vtprune.eval.pages.views import view_of
from vtprune.eval.running.clock import Stopwatch
from vtprune.eval.tasks import Kind
from vtprune.methods import AUTO
from vtprune.report import Report
from vtprune.support import fits

FULL = "full"
BY_HAND = "by hand"

_HEIGHTS: dict[Kind, tuple[int, int]] = {"image": (336, 672), "video": (168, 336)}
"""Least and largest height of a picture in pixels."""
_REMEMBERED = 4
"""Prompts whose inputs and full answers stay in memory."""


@dataclass(frozen=True)
class Numbers:
    """What an answer costs."""

    tokens: int
    """visual tokens in the last layer"""
    average: float
    """visual tokens, averaged over the layers"""
    prefill_flops: float
    """of the language model"""
    kv_bytes: int
    """of the prompt"""
    seconds: float
    """until the first token: encoder, choice and prefill"""


@dataclass(frozen=True)
class Answer:
    """What the model answers to a prompt, with these of its visual tokens."""

    name: str
    """FULL, BY_HAND or a method's"""
    spec: dict[str, Any] | Exactly | None
    """the method, as `vtprune.prune` takes it; None: none"""
    text: str
    kept: tuple[int, ...]
    """ascending visual tokens alive in the last layer, counted from 0"""
    numbers: Numbers
    notes: tuple[str, ...] = ()
    """what the session says beside its numbers"""


@dataclass(frozen=True)
class Refused:
    """Why there is no answer."""

    name: str
    why: str


@dataclass(frozen=True)
class Prompt:
    """A question about a picture or clip, as the model gets it."""

    shown: Shown
    inputs: Any
    sheet: Sheet | None
    """None where the places of the visual tokens are not known"""
    full: Answer


@dataclass(frozen=True)
class Outcome:
    """A setting, and what came of it."""

    setting: Setting
    prompt: Prompt
    answers: tuple[Answer | Refused, ...]
    """the full one, one for each method, and one by hand if a person chose"""


@dataclass(frozen=True)
class Source:
    """A model and its place, as `vtprune.eval.inputs.load_model` takes them."""

    model: str = "digitscenes"
    device: str = "cpu"
    dtype: str = "auto"


class Comparison:
    """A model that answers with and without pruning. Calls of several threads wait for each other.

    Args:
        model: a vision-language model in evaluation mode.
        processor: its processor.
        source: how both were loaded.
        max_new_tokens: longest answer.

    Raises:
        UnsupportedModelError: the family cannot be pruned.
    """

    def __init__(self, model: Any, processor: Any, source: Source, max_new_tokens: int = 64):
        self.source, self.max_new_tokens = source, max_new_tokens
        self._model, self._processor = model, processor
        self._adapter = vtprune.adapter_for(model)
        self._default = default_for(model).spec
        self._prompts: OrderedDict[tuple[str, str], Prompt] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, source: Source, max_new_tokens: int = 64) -> Comparison:
        """Loads the model. Raises ConfigError if that fails, UnsupportedModelError if it cannot be pruned."""
        return cls(*load_model(source.model, source.dtype, device=source.device), source, max_new_tokens)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What the model takes: "image", "video" or both."""
        return self._adapter.kinds

    @property
    def example_kind(self) -> Kind:
        """What the examples are: clips for the built-in model that was trained on them, else scenes."""
        return "video" if self.source.model == "digitscenes_video" else "image"

    def methods(self) -> list[str]:
        """Names of the methods that this model takes, "auto" first."""
        return [AUTO, *sorted(name for name, fit in fits(self._model).items() if fit.reason is None)]

    def compare(self, setting: Setting, upload: Path | None = None) -> Outcome:
        """The answers of a setting. What a method refuses is among them, with the reason.

        Args:
            setting: its example, or else the upload, is what the question is about.
            upload: file of an image or a clip.

        Raises:
            ConfigError: there is nothing to ask about, or the model does not take it.
            VTPruneError: the library cannot answer at all.
        """
        if setting.example is not None:
            shown = open_example(setting.example, self.example_kind)
        elif upload is None:
            raise ConfigError("upload an image or a clip, or choose an example")
        else:
            shown = open_upload(upload)
        if shown.kind not in self.kinds:
            raise ConfigError(f"this model takes {' and '.join(self.kinds)} inputs, and this is a {shown.kind}")
        with self._lock:
            prompt = self._prompt(shown, setting.question)
            found: list[Answer | Refused] = [prompt.full]
            for name in setting.methods:
                spec = self._default if is_auto(name) else {"name": name}
                found.append(self._pruned(prompt, name, {**spec, "keep_ratio": setting.keep_ratio}))
            if setting.chosen is not None:
                found.append(self._by_hand(prompt, setting.chosen))
        return Outcome(setting, prompt, tuple(found))

    def toggle(self, outcome: Outcome, index: int, x: float, y: float) -> Outcome:
        """The outcome with an answer by hand: the tokens of an answer, but for the one at a point.

        Args:
            outcome: what is on the page.
            index: of the answer in `outcome.answers` that the person clicked on.
            x: the point in pixels of its sheet, from the left.
            y: from the top.

        Raises:
            ConfigError: there is no token, or no answer to begin with.
        """
        clicked, sheet = outcome.answers[index], outcome.prompt.sheet
        if isinstance(clicked, Refused) or sheet is None:
            raise ConfigError("there are no tokens to choose from")
        token = sheet.token_at(x, y)
        if token is None:
            raise ConfigError("there is no token at this point")
        chosen = tuple(sorted({*clicked.kept} ^ {token}))
        setting = replace(outcome.setting, chosen=chosen)
        others = tuple(answer for answer in outcome.answers if answer.name != BY_HAND)
        with self._lock:
            return Outcome(setting, outcome.prompt, (*others, self._by_hand(outcome.prompt, chosen)))

    def _prompt(self, shown: Shown, question: str) -> Prompt:
        key = (shown.digest, question)
        if key not in self._prompts:
            inputs = chat_inputs(self._processor, [cast(Any, shown.content)], [question], shown.kind)
            inputs = inputs.to(self._model.device, self._model.dtype)
            view = view_of(self._model, self._processor, inputs, question, shown.kind, _HEIGHTS[shown.kind])
            sheet = None if view is None else Sheet(*view)
            self._prompts[key] = Prompt(shown, inputs, sheet, self._full(inputs))
            if len(self._prompts) > _REMEMBERED:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(key)
        return self._prompts[key]

    def _answer(self, inputs: Any) -> str:
        texts, _ = answers(self._model, self._processor, inputs, self.max_new_tokens)
        return texts[0]

    def _first_token(self, inputs: Any) -> float:
        """Seconds until the first token."""
        with Stopwatch(self._model) as watch:
            answers(self._model, self._processor, inputs, max_new_tokens=1)
        seconds = watch.spent.prefill
        assert seconds is not None
        return seconds

    def _full(self, inputs: Any) -> Answer:
        text, seconds = self._answer(inputs), self._first_token(inputs)  # the first run warms up
        # A session that drops nothing counts.
        with vtprune.prune(self._model, "uniform", keep_ratio=1.0) as session:
            answers(self._model, self._processor, inputs, max_new_tokens=1)
            report = _report(session)
        return Answer(FULL, None, text, _kept(report), _numbers(report, seconds))

    def _by_hand(self, prompt: Prompt, chosen: tuple[int, ...]) -> Answer | Refused:
        try:
            method = self._exactly(prompt, chosen)
        except VTPruneError as error:
            return Refused(BY_HAND, str(error))
        return self._pruned(prompt, BY_HAND, method)

    def _exactly(self, prompt: Prompt, chosen: tuple[int, ...]) -> Exactly:
        """The method that keeps these visual tokens. They are counted with separators, which a method does not see."""
        if prompt.sheet is None:
            raise ConfigError("the places of the visual tokens of this model are not known")
        places = prompt.sheet.view.places
        ranks = {token: rank for rank, token in enumerate(t for t, place in enumerate(places) if place is not None)}
        if chosen and max(chosen) >= len(places):
            raise ConfigError(f"token {max(chosen)} was chosen, and there are {len(places)}, counted from 0")
        return Exactly(tokens=tuple(ranks[token] for token in chosen if token in ranks), of=len(ranks))

    def _pruned(self, prompt: Prompt, name: str, spec: dict[str, Any] | Exactly) -> Answer | Refused:
        """An answer with pruning. Whoever keeps everything is not told that nothing was pruned."""
        try:
            with vtprune.prune(self._model, spec, strict=False) as session:
                text = self._answer(prompt.inputs)
                report = _report(session)
                seconds = self._first_token(prompt.inputs)
        except VTPruneError as error:
            return Refused(name, str(error))
        return Answer(name, spec, text, _kept(report), _numbers(report, seconds), report.notes)


def _report(session: vtprune.Session) -> Report:
    assert session.report is not None  # the model has just run
    return session.report


def _kept(report: Report) -> tuple[int, ...]:
    return tuple(torch.searchsorted(report.visual[0], report.kept(0)).tolist())


def _numbers(report: Report, seconds: float) -> Numbers:
    return Numbers(
        tokens=report.final_tokens[0],
        average=report.keep_ratio * report.original_tokens[0],
        prefill_flops=report.prefill_flops,
        kv_bytes=report.kv_bytes,
        seconds=seconds,
    )
