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

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vtprune
from vtprune.methods import build_method
from vtprune.methods.base import Method
from vtprune.methods.schedules import Reviving
from vtprune.testing.attention import attention_rows
from vtprune.testing.cases import (
    NEW,
    Case,
    Refused,
    Result,
    Status,
    compared,
    found,
    largest_difference,
    steps,
)
from vtprune.testing.traces import back_ends, changed, fingerprint, random_state, same_random_state, seeded
from vtprune.transformers_private import cache_of, has_keys

METHODS: tuple[Mapping[str, Any], ...] = (
    {"name": "divprune", "keep_ratio": 0.5, "positions": "original"},
    {"name": "fastv", "layer": 2, "positions": "original"},
)
"""What is checked by default: a method before the LLM and one inside it."""

# -- the checks -------------------------------------------------------------------------------------------------------


def keep_everything(case: Case, method: Method) -> Result:
    """Asked to keep everything, a session changes neither logits nor ids, bit for bit."""
    everything = dataclasses.replace(method, keep_ratio=1.0, keep_tokens=None)
    plain = case.plain
    with vtprune.prune(case.model, everything):
        kept = case.generate(case.batch.inputs)
    difference = largest_difference(steps(kept), steps(plain))
    if difference == 0.0 and not torch.equal(kept.sequences, plain.sequences):
        return Result("", "", "failed", difference, 0.0, "the logits are the same, the ids are not")
    return compared(difference, 0.0)


def batch_is_singles(case: Case, method: Method) -> Result:
    """In a padded batch a sample keeps the tokens, and gets the logits, that it has alone."""
    with case.session(method) as session:
        logits = steps(case.generate(case.batch.inputs, case.answers))
        together = [session.sample(row, case.batch.first_column(row), logits[row]) for row in case.samples]
    alone = case.alone(method)
    measured, flipped = 0.0, 0
    for sample, (got, own) in enumerate(zip(together, alone, strict=True)):
        expected = own.logits
        if not all(map(torch.equal, got.kept + got.cached, own.kept + own.cached)):
            flipped += 1
            if not case.is_exact:  # rounding may turn the choice between two tokens that are worth the same
                expected = case.expected(sample, case.answers[sample], got, case.positions(method))
        measured = max(measured, largest_difference(got.logits, expected))
    notes = [f"{flipped} of {len(alone)} samples keep other tokens alone"] if flipped else []
    if measured > case.tolerance:
        notes.append(f"without vtprune batch and samples differ by {case.noise:.2g}")
    if flipped and case.is_exact:
        return Result("", "", "failed", measured, case.tolerance, "; ".join(notes))
    return compared(measured, case.tolerance, "; ".join(notes))


def cached_is_recomputed(case: Case, method: Method) -> Result:
    """Each sample alone: the pruned cache gives what the same tokens give without a cache."""
    outputs, positions = case.alone(method), case.positions(method)
    if reason := case.unknown_to_recompute:
        raise Refused(reason)
    measured = 0.0
    for sample, got in enumerate(outputs):
        expected = case.expected(sample, case.answers[sample], got, positions)
        measured = max(measured, largest_difference(got.logits, expected))
    return compared(measured, case.tolerance)


def second_turn(case: Case, method: Method) -> Result:
    """A second turn of text on the batch's pruned cache counts all tokens and gives the recomputed logits."""
    with case.session(method) as session:
        first = case.generate(case.batch.inputs, case.answers)
        report = session.report
        second = case.second_turn(first)
        length = int(cache_of(second).get_seq_length())
        samples = [
            session.sample(row, case.batch.first_column(row), steps(second)[row], report) for row in case.samples
        ]
    if length != (logical := second.sequences.shape[1] - 1):
        return Result(
            "", "", "failed", float(length), float(logical), f"the cache counts {length} tokens, not {logical}"
        )
    positions = case.positions(method)
    if reason := case.second_turn_unknown_to_recompute:
        raise Refused(reason)
    measured = 0.0
    for sample, got in enumerate(samples):
        expected = case.expected(sample, case.conversation(sample), got, positions)
        measured = max(measured, largest_difference(got.logits, expected))
    return compared(measured, case.tolerance)


def static_is_grown(case: Case, method: Method) -> Result:
    """The padded batch gets the logits on a static cache that it gets on one that grows, or is refused by name."""
    try:
        case.generate(case.batch.inputs, case.answers, cache_implementation="static")
    except Exception as error:
        return found("ok", f"the model itself runs on no static cache: {type(error).__name__}: {error}")
    with case.session(method):
        grown = steps(case.generate(case.batch.inputs, case.answers))
        try:
            static = steps(case.generate(case.batch.inputs, case.answers, cache_implementation="static"))
        except vtprune.UnsupportedStageError as error:
            return found("ok", str(error))
    return compared(largest_difference(static, grown), case.tolerance)


def text_stays(case: Case, method: Method) -> Result:
    """What goes is visual: a cache layer holds all text, and the visual tokens that the report says are there."""
    visual_ids = torch.tensor(case.batch.visual_ids)
    revives = any(isinstance(part, Reviving) for part in method.parts(vtprune.adapter_for(case.model).shape))
    missing = 0
    for inputs in (*case.batch.singles, case.batch.inputs):
        with case.session(method) as session:
            output = case.generate(inputs)
            report = session.report
        ids = inputs["input_ids"].cpu()
        visual = [torch.isin(row, visual_ids).nonzero().flatten() for row in ids]
        texts = (inputs["attention_mask"].sum(1).cpu() - torch.tensor([len(columns) for columns in visual])).tolist()
        for sample, before in enumerate(visual):
            for layer in range(report.depth):
                kept = report.kept(sample, layer).cpu()
                if not (torch.isin(kept, before).all() and bool((kept.diff() > 0).all())):
                    return found("failed", f"sample {sample}, layer {layer}: columns {kept.tolist()} are not visual")
                if len(kept) != report.counts[sample, layer]:
                    return found("failed", f"sample {sample}, layer {layer}: {len(kept)} columns, another count")
                before = kept
        # Layers with a state, without keys of their own or with a full window hold no tokens to be counted; what may
        # come back is counted elsewhere.
        layers = [] if revives else list(enumerate(cache_of(output).layers))
        for index, layer in layers:
            if not has_keys(layer) or getattr(layer, "is_sliding", False):
                continue
            there = max(len(report.cached(sample, index)) + text for sample, text in enumerate(texts)) + NEW - 1
            missing = max(missing, abs(there - layer.keys.shape[-2]))
    return compared(float(missing), 0.0, "tokens that a cache layer holds more or less than reported" * bool(missing))


def nothing_is_left(case: Case, method: Method) -> Result:
    """After the session the model has no hook, no attribute and no setting more, and gives what it gave before."""
    plain = steps(case.plain)  # transformers installs hooks of its own on the first call, for good
    before = fingerprint(case.model)
    weights = {name: value.clone() for name, value in case.model.state_dict().items()}
    with vtprune.prune(case.model, method):
        case.generate(case.batch.inputs)
    if differing := changed(before, fingerprint(case.model)):
        return found("failed", f"it is left on {', '.join(differing[:5])}")
    after = case.model.state_dict()
    if other := [name for name in weights.keys() | after.keys() if not _same(weights.get(name), after.get(name))]:
        return found("failed", f"weights differ: {', '.join(sorted(other)[:5])}")
    return compared(largest_difference(steps(case.generate(case.batch.inputs)), plain), 0.0)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


def deterministic(case: Case, method: Method) -> Result:
    """With other global seeds the same tokens are kept, and the seeds are not touched."""
    runs = []
    for seed in (0, 1):
        with seeded(seed):
            before = random_state()
            with case.session(method) as session, torch.no_grad():
                logits = case.model(**case.batch.inputs).logits
                samples = [session.sample(row, 0, logits[row]) for row in case.samples]
            if not same_random_state(before, random_state()):
                return found("failed", "it moves the global random state")
        runs.append(samples)
    other = sum(not all(map(torch.equal, one.kept, two.kept)) for one, two in zip(*runs, strict=True))
    measured = max(largest_difference(one.logits, two.logits) for one, two in zip(*runs, strict=True))
    if other:
        return Result("", "", "failed", measured, 0.0, f"{other} samples keep other tokens after another global seed")
    return compared(measured, 0.0)


def back_end_stays(case: Case, method: Method) -> Result:
    """In the session the model keeps its attention back end, and nobody asks it for attention weights."""
    before, asked = back_ends(case.model), []

    def note(module, args, kwargs):
        if kwargs.get("output_attentions"):
            asked.append(type(module).__name__)

    with vtprune.prune(case.model, method):
        watches = [
            module.register_forward_pre_hook(note, with_kwargs=True)
            for module in {id(m): m for m in (case.model.base_model, case.model.get_decoder())}.values()
        ]
        try:
            case.generate(case.batch.inputs)
        finally:
            for watch in watches:
                watch.remove()
        during = back_ends(case.model)
    if during != before or back_ends(case.model) != before:
        return found("failed", f"{sorted(set(before))} became {sorted(set(during))}")
    return found("failed", f"output_attentions of {asked[0]}") if asked else found("ok")


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
    "static": Check(static_is_grown, "answers on a static cache are not those on a cache that grows"),
    "rows": Check(attention_rows, "methods that go by attention inside the LLM choose by wrong numbers", ("fastv",)),
}
"""Name, as a column of a table -> check: what can break on a machine, or with a release of transformers."""

MORE_CHECKS: dict[str, Check] = {
    "text": Check(text_stays, "text goes, or the report does not say what the KV cache holds"),
    "removal": Check(nothing_is_left, "the model is not what it was before the session"),
    "chance": Check(deterministic, "one prompt gives different answers, or other code gets different random numbers"),
    "back end": Check(back_end_stays, "the session slows all attention down, or changes its results"),
}
"""What a method or an adapter can break, besides."""

ALL_CHECKS = CHECKS | MORE_CHECKS


def run_check(name: str, case: Case, method: Method | Mapping[str, Any]) -> Result:
    """One check of `ALL_CHECKS` under one method, whatever happens in it."""
    method = build_method(method)

    def result(status: Status, detail: object) -> Result:
        return Result(name, method.name, status, detail=" ".join(str(detail).split()))

    try:
        vtprune.prune(case.model, method)
    except vtprune.VTPruneError as error:
        return result("refused", error)
    try:
        outcome = ALL_CHECKS[name].run(case, method)
    except Refused as reason:
        return result("refused", reason)
    except Exception as error:
        return result("error", f"{type(error).__name__}: {error}")
    return dataclasses.replace(outcome, check=name, method=method.name)


def run_checks(
    case: Case, methods: Iterable[Method | Mapping[str, Any]] = METHODS, checks: Iterable[str] = tuple(CHECKS)
) -> list[Result]:
    """All checks under all methods that they can be asked of."""
    built = [build_method(method) for method in methods]
    return [
        run_check(name, case, method)
        for name in checks
        for method in built
        if (asked := ALL_CHECKS[name].methods) is None or method.name in asked
    ]


def told(result: Result, broken: str) -> str:
    """What a check found, in one line: what was measured, and what it means that the promise is broken."""
    measured = ""
    if result.measured is not None:
        measured = f" measured {result.measured:.3g}, allowed {result.tolerance:.3g}."
    meaning = "" if result.status == "refused" else f" It means: {broken}."
    detail = f" {result.detail.rstrip('.')}." if result.detail else ""
    where = ", ".join(part for part in (result.where, result.check, result.method) if part)
    return f"{where}: {WORDS[result.status]}.{measured}{detail}{meaning}"


WORDS = {"ok": "ok", "failed": "FAILED", "refused": "refused", "error": "error"}
"""Status -> what people read."""
