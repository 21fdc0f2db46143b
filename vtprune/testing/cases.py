# SPDX-License-Identifier: Apache-2.0
"""A model with a batch for it, and what it gives with and without a session: what every check starts from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import vtprune
from vtprune.methods.base import BeforeLLM, InEncoder, InLLM, Method
from vtprune.methods.in_layers import InLayers
from vtprune.methods.schedules import Reviving
from vtprune.testing.families import Batch
from vtprune.testing.observed import ObservedSession, Sample
from vtprune.testing.recompute import keep_all, recompute
from vtprune.transformers_private import cache_of, with_cache

NEW = 3
"""Tokens that are generated in each turn."""
QUESTION = 4
"""Tokens of text that a second turn brings."""

LOGITS, SHARE_OF_LOGITS = 1e-4, 1e-5
"""Largest error of a logit in float32 and float64: this, or a share of the largest logit if that is more."""
NOISE, ROUNDINGS, MOST = 4.0, 4.0, 0.1
"""Largest error of a logit in shorter floats: so many times the unpatched model's own difference between a padded batch
and its samples alone, at least so many roundings of the largest logit, and never more than this share of it."""

Status = Literal["ok", "failed", "refused", "error"]


@dataclass(frozen=True)
class Result:
    """What one check found on one model under one method."""

    check: str
    """name of the check, a key of `promises.CHECKS` or `promises.MORE_CHECKS`"""
    method: str
    status: Status
    """"ok", "failed" (measured is over the tolerance), "refused" (the session was refused by name, so that nothing was
    checked) or "error" (something was raised)"""
    measured: float | None = None
    """largest difference found; None if nothing could be compared"""
    tolerance: float | None = None
    """largest difference allowed"""
    detail: str = ""
    where: str = ""
    """the model, and the medium that it was shown"""

    @property
    def passed(self) -> bool:
        return self.status == "ok"


class Refused(Exception):
    """A check cannot say anything about this model; the message says why."""


class PromiseBroken(AssertionError):
    """A promise does not hold. The message names each one, where it broke, and by how much."""

    def __init__(self, message: str, results: Sequence[Result]):
        super().__init__(message)
        self.results = list(results)
        """Of all checks, those that passed included."""


def _dictation(tokens: Tensor, start: int) -> Callable[[int, Tensor], list[int]]:
    """What makes generation say given tokens. tokens: (batch, new tokens), said from column `start` on."""
    return lambda sample, ids: [int(tokens[sample, len(ids) - start])]


def largest_difference(got: Tensor, expected: Tensor) -> float:
    """Infinite where something is not a number; 0 if there is nothing to compare."""
    if got.numel() == 0:
        return 0.0
    difference = (got.float() - expected.float()).abs().max().item()
    return difference if difference == difference else float("inf")


def compared(measured: float, tolerance: float, detail: str = "") -> Result:
    """A result that `run_check` names."""
    return Result("", "", "ok" if measured <= tolerance else "failed", measured, tolerance, detail)


def found(status: Status, detail: str = "") -> Result:
    """The same without numbers."""
    return Result("", "", status, detail=detail)


def steps(output: Any) -> Tensor:
    """(batch, new tokens, vocabulary) logits of a generation."""
    return torch.stack(output.logits, 1)


def numbering(parts: Iterable[Method]) -> str:
    """`positions` of a recompute of what methods of one stage each leave. Raises Refused if no recompute knows that."""
    parts = list(parts)
    if any(isinstance(part, Reviving) for part in parts):
        raise Refused("not checked: the recompute does not know tokens that come back while decoding")
    before = {part.positions for part in parts if isinstance(part, BeforeLLM | InEncoder | InLayers)}
    # What is only hidden keeps its place.
    inside = {"original" if part.masks else part.positions for part in parts if isinstance(part, InLLM)}
    if len(before | inside) <= 1:
        return next(iter(before | inside), "original")
    if (before, inside) == ({"compact"}, {"original"}):
        return "compact once"
    raise Refused("not checked: the recompute does not know parts that number tokens in turns")


class Case:
    """A model and a batch for it, and what the model does without a session.

    Args:
        model: a loaded model of a supported family, in evaluation mode.
        batch: two samples or more, padded on the left, of different lengths, on the model's device.
    """

    def __init__(self, model, batch: Batch):
        self.model, self.batch = model, batch
        self._alone: dict[Method, list[Sample]] = {}

    @property
    def samples(self) -> range:
        return range(len(self.batch))

    @property
    def length(self) -> int:
        """Columns of the padded prompts."""
        return self.batch.inputs["input_ids"].shape[1]

    @torch.no_grad()
    def generate(self, inputs: Mapping[str, Tensor], dictated: Tensor | None = None, **options: Any) -> Any:
        """`NEW` tokens with raw logits, greedy unless they are dictated (batch, NEW)."""
        if dictated is not None:
            # Janus passes no processors of logits on.
            options["prefix_allowed_tokens_fn"] = _dictation(dictated, inputs["input_ids"].shape[1])
        return self.model.generate(
            **inputs,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            num_beams=1,
            suppress_tokens=list(self.batch.visual_ids),
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )

    @functools.cached_property
    def plain(self) -> Any:
        """Greedy generation of the padded batch without a session."""
        return self.generate(self.batch.inputs)

    @functools.cached_property
    def answers(self) -> Tensor:
        """(samples, NEW): what is dictated in the first turn."""
        return self.plain.sequences[:, -NEW:]

    @functools.cached_property
    def questions(self) -> Tensor:
        """(samples, QUESTION): the last text of each prompt, which a second turn says again."""
        visual = torch.tensor(self.batch.visual_ids, device=self.answers.device)
        texts = (single["input_ids"][0] for single in self.batch.singles)
        texts = [ids[~torch.isin(ids, visual)] for ids in texts]
        return torch.stack([ids[torch.arange(-QUESTION, 0, device=ids.device) % len(ids)] for ids in texts])

    @functools.cached_property
    def noise(self) -> float:
        """Largest difference of a logit between the padded batch and its samples alone, without a session."""
        together = steps(self.plain)
        alone = [
            steps(self.generate(single, self.answers[[sample]])) for sample, single in enumerate(self.batch.singles)
        ]
        return largest_difference(together, torch.cat(alone))

    @functools.cached_property
    def tolerance(self) -> float:
        """Largest difference allowed between logits that should be the same."""
        largest = steps(self.plain).abs().max().item()
        if self.is_exact:
            return max(LOGITS, SHARE_OF_LOGITS * largest)
        rounding = torch.finfo(self.model.dtype).eps * largest
        return min(max(NOISE * self.noise, ROUNDINGS * rounding), MOST * largest)

    @property
    def is_exact(self) -> bool:
        """Whether the model computes in float32 or float64."""
        return self.model.dtype in (torch.float32, torch.float64)

    def session(self, method: Method) -> ObservedSession:
        """A session on the model, not entered yet."""
        return ObservedSession(self.model, method)

    def alone(self, method: Method) -> list[Sample]:
        """Each sample generated alone under one session."""
        if method not in self._alone:
            samples = []
            with self.session(method) as session:
                for sample, single in enumerate(self.batch.singles):
                    logits = steps(self.generate(single, self.answers[[sample]]))[0]
                    samples.append(session.sample(0, 0, logits))
            self._alone[method] = samples
        return self._alone[method]

    def expected(self, sample: int, generated: Tensor, got: Sample, positions: str) -> Tensor:
        """(NEW, vocabulary) recomputed logits of the last `NEW` of the tokens `generated` behind a sample's prompt, of
        which a session kept what it kept in `got`."""
        cached = None if all(map(torch.equal, got.kept, got.cached)) else got.cached
        single = self.batch.singles[sample]
        logits = recompute(self.model, single, generated[:-1], got.kept, positions, cached=cached, merges=got.merges)
        return logits[-NEW:]

    def positions(self, method: Method) -> str:
        """`numbering` of a method on this model."""
        return numbering(method.parts(vtprune.adapter_for(self.model).shape))

    def second_turn(self, first: Any) -> Any:
        """Generation of an answer to a second turn of text, on the cache of a first turn.

        first: a generation of the batch in which `answers` were dictated.
        """
        mask = self.batch.inputs["attention_mask"]
        ids = torch.cat([first.sequences, self.questions], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.cat([mask, mask.new_ones(len(ids), NEW + QUESTION)], 1)}
        return self.generate(with_cache(self.model, inputs, cache_of(first)), self.answers.roll(1, 0))

    def conversation(self, sample: int) -> Tensor:
        """(2 * NEW + QUESTION,): what follows a sample's prompt once both turns are over."""
        return torch.cat([self.answers[sample], self.questions[sample], self.answers.roll(1, 0)[sample]])

    @functools.cached_property
    def unknown_to_recompute(self) -> str | None:
        """Why the recompute cannot be compared with: it does not give the model's own logits when nothing is pruned."""
        answer = self.answers[-1]
        plain = steps(self.generate(self.batch.singles[-1], answer[None]))[0]
        return self._unknown("", lambda: self._off(-1, answer, plain))

    @functools.cached_property
    def second_turn_unknown_to_recompute(self) -> str | None:
        """Why the recompute cannot be compared with in a second turn: Qwen2.5-VL, for one, numbers the tokens of a turn
        that follows a video in another way than those of the whole conversation."""
        if self.unknown_to_recompute is not None:
            return self.unknown_to_recompute
        plain = steps(self.second_turn(self.generate(self.batch.inputs, self.answers)))
        return self._unknown(
            " in a second turn",
            lambda: max(self._off(sample, self.conversation(sample), plain[sample]) for sample in self.samples),
        )

    def _off(self, sample: int, generated: Tensor, plain: Tensor) -> float:
        """Largest difference between the recompute without pruning and the model's own logits (NEW, vocabulary)."""
        everything = keep_all(self.model, self.batch.singles[sample])
        got = self.expected(sample, generated, Sample(plain, everything, everything, None), "original")
        return largest_difference(got, plain)

    def _unknown(self, when: str, measure: Callable[[], float]) -> str | None:
        try:
            difference = measure()
        except Exception as error:
            return f"the recompute does not know this model{when}: {type(error).__name__}: {error}"
        if difference <= self.tolerance:
            return None
        return f"the recompute does not know this model{when}: without pruning it is off by {difference:.2g}"
