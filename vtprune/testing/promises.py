# SPDX-License-Identifier: Apache-2.0
"""Checks of the library's promises on one model, whatever it is.

    case = Case(model, batch)
    for result in run_checks(case):
        print(result.check, result.method, result.status, result.measured, result.tolerance, result.detail)

A check runs the model under a session and compares logits with what the same model gives without one: alone, without a
cache, with eager attention. What is generated is dictated, so that two runs feed the same tokens and differ in nothing
else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StaticCache

import vtprune
from vtprune.methods import build_method
from vtprune.methods.base import Method
from vtprune.methods.fastv import FastV
from vtprune.report import Report
from vtprune.signals import LastQueryAttention
from vtprune.testing.families import Batch
from vtprune.testing.recompute import encoded, keep_all, recompute, visual_columns
from vtprune.transformers_private import attention_back_end, cache_of, with_cache

METHODS: tuple[Mapping[str, Any], ...] = (
    {"name": "divprune", "keep_ratio": 0.5, "positions": "original"},
    {"name": "fastv", "layer": 2, "positions": "original"},
)
"""What is checked by default: a method before the LLM and one inside it."""

NEW = 3
"""Tokens that are generated in each turn."""
QUESTION = 4
"""Tokens of text that a second turn brings."""

LOGITS, SHARE_OF_LOGITS = 1e-4, 1e-5
"""Largest error of a logit in float32 and float64: this, or a share of the largest logit if that is more."""
NOISE, ROUNDINGS, MOST = 4.0, 4.0, 0.1
"""Largest error of a logit in shorter floats: so many times the unpatched model's own difference between a padded batch
and its samples alone, at least so many roundings of the largest logit, and never more than this share of it."""
WEIGHTS, SHARE_OF_WEIGHTS = 1e-4, 0.2
"""Largest error of an attention weight: in float32 and float64; in shorter floats as a share of the largest weight."""

Status = Literal["ok", "failed", "refused", "error"]


@dataclass(frozen=True)
class Result:
    """What one check found on one model under one method."""

    check: str
    """name of the check, a key of `CHECKS`"""
    method: str
    status: Status
    """"ok", "failed" (measured is over the tolerance), "refused" (the session was refused by name, so that nothing was
    checked) or "error" (something was raised)"""
    measured: float | None = None
    """largest difference found; None if nothing could be compared"""
    tolerance: float | None = None
    """largest difference allowed"""
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == "ok"


class Refused(Exception):
    """A check cannot say anything about this model; the message says why."""


class _Dictation(LogitsProcessor):
    """Makes generation say given tokens. tokens: (batch, new tokens), said from column `start` on."""

    def __init__(self, tokens: Tensor, start: int):
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.start
        return torch.full_like(scores, float("-inf")).scatter(1, self.tokens[:, step : step + 1], 0.0)


def _largest_difference(got: Tensor, expected: Tensor) -> float:
    """Infinite where something is not a number."""
    difference = (got.float() - expected.float()).abs().max().item()
    return difference if difference == difference else float("inf")


class Case:
    """A model and a batch for it, and what the model does without a session.

    Args:
        model: a loaded model of a supported family, in evaluation mode.
        batch: two samples or more, padded on the left, of different lengths, on the model's device.
    """

    def __init__(self, model, batch: Batch):
        self.model, self.batch = model, batch
        self._alone: dict[Method, list[tuple[Tensor, list[Tensor]]]] = {}

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
            options["logits_processor"] = [_Dictation(dictated, inputs["input_ids"].shape[1])]
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
        return _largest_difference(together, torch.cat(alone))

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

    def alone(self, method: Method) -> list[tuple[Tensor, list[Tensor]]]:
        """Each sample generated alone under a session: logits (NEW, vocabulary) and `kept` of every layer."""
        if method not in self._alone:
            self._alone[method] = []
            with vtprune.prune(self.model, method) as session:
                for sample, single in enumerate(self.batch.singles):
                    logits = steps(self.generate(single, self.answers[[sample]]))[0]
                    self._alone[method].append((logits, kept_columns(session.report, 0, 0)))
        return self._alone[method]

    def expected(self, sample: int, generated: Tensor, kept: list[Tensor], positions: str) -> Tensor:
        """(NEW, vocabulary) recomputed logits of the last `NEW` of the tokens `generated` behind a sample's prompt."""
        logits = recompute(self.model, self.batch.singles[sample], generated[:-1], kept, positions)
        return logits[-NEW:]

    @functools.cached_property
    def unknown_to_recompute(self) -> str | None:
        """Why the recompute cannot be compared with: it does not give the model's own logits when nothing is pruned."""
        single, answer = self.batch.singles[-1], self.answers[-1]
        plain = steps(self.generate(single, answer[None]))[0]
        try:
            got = self.expected(-1, answer, keep_all(self.model, single), "original")
        except Exception as error:
            return f"the recompute does not know this model: {type(error).__name__}: {error}"
        if (difference := _largest_difference(got, plain)) <= self.tolerance:
            return None
        return f"the recompute does not know this model: without pruning it is off by {difference:.2g}"


def steps(output: Any) -> Tensor:
    """(batch, new tokens, vocabulary) logits of a generation."""
    return torch.stack(output.logits, 1)


def kept_columns(report: Report, sample: int, first: int) -> list[Tensor]:
    """`report.kept` of one sample in every layer, as columns of its own unpadded prompt."""
    return [report.kept(sample, layer) - first for layer in range(report.depth)]


def _compared(measured: float, tolerance: float, detail: str = "") -> Result:
    """A result that `run_check` names."""
    return Result("", "", "ok" if measured <= tolerance else "failed", measured, tolerance, detail)


# -- the checks -------------------------------------------------------------------------------------------------------


def keep_everything(case: Case, method: Method) -> Result:
    """Asked to keep everything, a session changes neither logits nor ids, bit for bit."""
    everything = dataclasses.replace(method, keep_ratio=1.0, keep_tokens=None)
    plain = case.plain
    with vtprune.prune(case.model, everything):
        kept = case.generate(case.batch.inputs)
    difference = _largest_difference(steps(kept), steps(plain))
    if difference == 0.0 and not torch.equal(kept.sequences, plain.sequences):
        return Result("", "", "failed", difference, 0.0, "the logits are the same, the ids are not")
    return _compared(difference, 0.0)


def batch_is_singles(case: Case, method: Method) -> Result:
    """In a padded batch a sample keeps the tokens, and gets the logits, that it has alone."""
    with vtprune.prune(case.model, method) as session:
        together, report = steps(case.generate(case.batch.inputs, case.answers)), session.report
    alone = case.alone(method)
    measured, flipped = 0.0, 0
    for sample, (expected, own) in enumerate(alone):
        kept = kept_columns(report, sample, case.batch.first_column(sample))
        if not all(map(torch.equal, kept, own)):
            flipped += 1
            if not case.is_exact:  # rounding may turn the choice between two tokens that are worth the same
                expected = case.expected(sample, case.answers[sample], kept, method.positions)
        measured = max(measured, _largest_difference(together[sample], expected))
    notes = [f"{flipped} of {len(alone)} samples keep other tokens alone"] if flipped else []
    if measured > case.tolerance:
        notes.append(f"without vtprune batch and samples differ by {case.noise:.2g}")
    if flipped and case.is_exact:
        return Result("", "", "failed", measured, case.tolerance, "; ".join(notes))
    return _compared(measured, case.tolerance, "; ".join(notes))


def cached_is_recomputed(case: Case, method: Method) -> Result:
    """Each sample alone: the pruned cache gives what the same tokens give without a cache."""
    outputs = case.alone(method)
    if reason := case.unknown_to_recompute:
        raise Refused(reason)
    measured = 0.0
    for sample, (logits, kept) in enumerate(outputs):
        expected = case.expected(sample, case.answers[sample], kept, method.positions)
        measured = max(measured, _largest_difference(logits, expected))
    return _compared(measured, case.tolerance)


def second_turn(case: Case, method: Method) -> Result:
    """A second turn of text on the batch's pruned cache counts all tokens and gives the recomputed logits."""
    inputs, answers = case.batch.inputs, case.answers.roll(1, 0)
    mask = inputs["attention_mask"]
    with vtprune.prune(case.model, method) as session:
        first = case.generate(inputs, case.answers)
        report = session.report
        ids = torch.cat([first.sequences, case.questions], 1)
        turn = {"input_ids": ids, "attention_mask": torch.cat([mask, mask.new_ones(len(ids), NEW + QUESTION)], 1)}
        second = case.generate(with_cache(case.model, turn, cache_of(first)), answers)
        length = int(cache_of(second).get_seq_length())
    if length != (logical := ids.shape[1] + NEW - 1):
        return Result(
            "", "", "failed", float(length), float(logical), f"the cache counts {length} tokens, not {logical}"
        )
    if reason := case.unknown_to_recompute:
        raise Refused(reason)
    measured = 0.0
    for sample in case.samples:
        generated = torch.cat([case.answers[sample], case.questions[sample], answers[sample]])
        kept = kept_columns(report, sample, case.batch.first_column(sample))
        expected = case.expected(sample, generated, kept, method.positions)
        measured = max(measured, _largest_difference(steps(second)[sample], expected))
    return _compared(measured, case.tolerance)


def static_cache_is_refused(case: Case, method: Method) -> Result:
    """A cache of fixed length, from which no token can be missing, ends in the library's own error."""
    single = case.batch.singles[0]
    cache = StaticCache(config=case.model.config.get_text_config(), max_cache_len=single["input_ids"].shape[1] + NEW)
    with vtprune.prune(case.model, method), torch.no_grad():
        try:
            case.model(**with_cache(case.model, {**single, "use_cache": True}, cache))
        except vtprune.UnsupportedStageError as error:
            return Result("", "", "ok", detail=str(error))
        except Exception as error:
            return Result("", "", "failed", detail=f"not refused: it ends in {type(error).__name__}: {error}")
    return Result("", "", "failed", detail="not refused: the model runs on it")


def attention_rows(case: Case, method: Method) -> Result:
    """The attention that FastV scores with, which is recomputed from queries and keys, is that of eager attention."""
    seen: dict[str, Tensor] = {}

    @dataclass(frozen=True, kw_only=True)
    class Spy(FastV):
        name: ClassVar[str] = method.name

        def scores(self, tokens):
            seen["rows"], seen["lengths"] = tokens[LastQueryAttention(tokens.layer - 1)].clone(), tokens.lengths
            return super().scores(tokens)

    spy = Spy(**dataclasses.asdict(method))
    with vtprune.prune(case.model, spy) as session, torch.no_grad():
        case.model(**case.batch.inputs)
    layer = spy.cuts(session.adapter.shape)[0] - 1
    measured = largest = 0.0
    for sample, single in enumerate(case.batch.singles):
        columns = _content(case.model, session.adapter, single)
        expected = _eager_weights(case.model, session.adapter.decoder_layers[layer], single)[:, -1, columns]
        if len(columns) != (n := int(seen["lengths"][sample])):
            return Result("", "", "failed", detail=f"sample {sample} has {len(columns)} visual tokens, {n} were scored")
        measured = max(measured, _largest_difference(seen["rows"][sample, :, :n], expected))
        largest = max(largest, expected.max().item())
    return _compared(measured, WEIGHTS if case.is_exact else SHARE_OF_WEIGHTS * largest, f"decoder layer {layer}")


@torch.no_grad()
def _content(model, adapter: vtprune.Adapter, single: dict[str, Tensor]) -> Tensor:
    """Columns of a single prompt that hold visual tokens with content: no separators."""
    columns = visual_columns(model, single)[:0]
    for kind, own, arguments, output in encoded(model, single):
        media = adapter.media(kind, arguments, output.pooler_output)
        crops = torch.cat([medium.crops for medium in media]).to(own.device)
        columns = torch.cat([columns, own[crops >= 0]])
    return columns.sort().values


@torch.no_grad()
def _eager_weights(model, layer, single: dict[str, Tensor]) -> Tensor:
    """(heads, n, n) attention weights of a decoder layer for a single prompt, by the whole model's own eager code."""
    weights: list[Tensor] = []
    with _eager(model):
        # Of this layer alone: those of all layers of a large model would not fit into memory.
        watch = layer.self_attn.register_forward_hook(lambda module, args, output: weights.append(output[1]))
        try:
            model(**single, use_cache=False)
        finally:
            watch.remove()
    if weights[0] is None:
        raise Refused("its eager attention gives no weights")
    return weights[0][0].float()


@contextlib.contextmanager
def _eager(model) -> Iterator[None]:
    parts = [name for name in model.config.sub_configs if getattr(model.config, name, None) is not None]
    before = {name: attention_back_end(getattr(model.config, name)) for name in parts}
    before[""] = attention_back_end(model.config)
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Check:
    """One promise, as a function and in words."""

    run: Callable[[Case, Method], Result]
    broken: str
    """what it means for a user if the check fails"""
    methods: tuple[str, ...] | None = None
    """names of the methods it can be asked of; None: all"""


CHECKS: dict[str, Check] = {
    "keep all": Check(keep_everything, "keep_ratio=1.0 does not give the model's own output"),
    "batch": Check(batch_is_singles, "in a padded batch samples get other answers than alone"),
    "cached": Check(cached_is_recomputed, "answers on a pruned KV cache are not those of the tokens that were kept"),
    "2nd turn": Check(second_turn, "conversations on a pruned KV cache go wrong after the first turn"),
    "static": Check(static_cache_is_refused, "with a static cache answers may be wrong without a word"),
    "rows": Check(attention_rows, "methods that go by attention inside the LLM choose by wrong numbers", ("fastv",)),
}
"""Name, as a column of a table -> check."""


def run_check(name: str, case: Case, method: Method | Mapping[str, Any]) -> Result:
    """One check of `CHECKS` under one method, whatever happens in it."""
    method = build_method(method)

    def result(status: Status, detail: object) -> Result:
        return Result(name, method.name, status, detail=" ".join(str(detail).split()))

    try:
        vtprune.prune(case.model, method)
    except vtprune.VTPruneError as error:
        return result("refused", error)
    try:
        found = CHECKS[name].run(case, method)
    except Refused as reason:
        return result("refused", reason)
    except Exception as error:
        return result("error", f"{type(error).__name__}: {error}")
    return dataclasses.replace(found, check=name, method=method.name)


def run_checks(
    case: Case, methods: Iterable[Method | Mapping[str, Any]] = METHODS, checks: Iterable[str] = tuple(CHECKS)
) -> list[Result]:
    """All checks under all methods that they can be asked of."""
    built = [build_method(method) for method in methods]
    return [
        run_check(name, case, method)
        for name in checks
        for method in built
        if CHECKS[name].methods is None or method.name in CHECKS[name].methods
    ]
