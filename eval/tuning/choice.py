# SPDX-License-Identifier: Apache-2.0
"""The result of a race for people: the Pareto front, the choice, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.eval.results.statistics import difference, retention_interval
from vtprune.eval.tuning.candidates import SMALLER_IMAGE
from vtprune.eval.tuning.config import Goal
from vtprune.eval.tuning.measuring import Sample
from vtprune.eval.tuning.race import ERROR, Found, Run

BASELINES = (SMALLER_IMAGE, "random", "uniform", "pool")


@dataclass(frozen=True)
class Outcome:
    """What `vtprune tune` found."""

    goal: Goal
    found: Found
    held_out: Sample | None
    """the choice on examples that chose nothing; None without a choice"""
    held_out_of: int
    """examples that are held out; `held_out` may have fewer if the time was short"""
    refused: dict[str, str]
    """method -> why the model does not support it"""


def front(runs: Sequence[Run]) -> list[Run]:
    """The runs that no other beats with as few tokens and as high a retention, from the fewest tokens on."""
    best, kept = -1.0, []
    for run in sorted(runs, key=lambda run: (run.sample.tokens, -run.sample.retention)):
        if run.sample.retention > best:
            best = run.sample.retention
            kept.append(run)
    return kept


def shown(outcome: Outcome) -> list[Run]:
    """The front, the choice, and each baseline where it was measured last; from the fewest tokens on."""
    found = outcome.found
    chosen = [found.choice] if found.choice else []
    baselines = []
    for name in BASELINES:
        final = [run for run in found.runs if run.candidate.names == (name,)]
        earlier = [run for run in found.earlier if run.candidate.names == (name,)]
        baselines += sorted(final or earlier, key=lambda run: -run.sample.retention)[:1]
    listed = {run.sample.cell.title: run for run in [*front(found.runs), *chosen, *baselines]}
    return sorted(listed.values(), key=lambda run: run.sample.tokens)


def retention(sample: Sample) -> str:
    """In per cent, with its paired interval: "97.1 [95.0, 98.9]"."""
    ratio, interval = retention_interval(list(sample.scores), list(sample.full))
    if ratio is None or interval is None:
        return "no score of the full model"
    return f"{100 * ratio:.1f} [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def why(outcome: Outcome) -> list[str]:
    """Why the choice was made, or why none was; a sentence or two an entry."""
    found = outcome.found
    lines = [] if found.complete else [f"The time was short: the race ended with {found.examples} examples."]
    if found.choice is None:
        return [*lines, *_none(outcome)]
    lines += _by_retention(outcome, found.choice) if outcome.goal.kind == "retain" else _by_cost(outcome, found.choice)
    return [*lines, *_smaller_image(outcome, found.choice), *_held_out(outcome)]


def _none(outcome: Outcome) -> list[str]:
    if outcome.goal.kind != "retain":
        return [f"No method can run at {outcome.goal.words}."]
    lines = [
        f"No setting is sure to keep {outcome.goal.words} on {outcome.found.examples} examples, so none is chosen. "
        "Give more examples, which make intervals narrower, or a lower goal."
    ]
    best = max(outcome.found.runs, key=lambda run: run.sample.retention, default=None)
    if best is not None:
        lines.append(f"The highest retention is that of {best.name}: {retention(best.sample)} %.")
    return lines


def _by_retention(outcome: Outcome, choice: Run) -> list[str]:
    found = outcome.found
    return [
        f"{choice.name} has the fewest tokens ({choice.sample.tokens:.1f} an example) of the settings that surely keep "
        f"{outcome.goal.words}: on {found.examples} examples it keeps {100 * choice.sample.retention:.1f} %, and the "
        f"lower bound is {100 * (found.bound or 0):.1f} %. {found.finalists} candidates were in the final. In at most "
        f"one of {1 / ERROR:.0f} such races the choice is truly below the goal."
    ]


def _by_cost(outcome: Outcome, choice: Run) -> list[str]:
    rivals = [run for run in outcome.found.runs if run is not choice and run.candidate.is_method]
    level, worse = [], []
    for run in rivals:
        found = difference(choice.sample.scores, run.sample.scores)
        (worse if found.significant else level).append(run.name)
    lines = [
        f"{choice.name} has the highest score ({100 * choice.sample.score:.1f} %) of the settings with "
        f"{outcome.goal.words}, on {outcome.found.examples} examples."
    ]
    if worse:
        lines.append(f"Significantly lower: {', '.join(worse)}.")
    if level:
        lines.append(f"No significant difference to: {', '.join(level)}.")
    return lines


def _smaller_image(outcome: Outcome, choice: Run) -> list[str]:
    runs = [run for run in outcome.found.runs if run.candidate.names == (SMALLER_IMAGE,)]
    cheaper = [
        run for run in runs if run.sample.tokens <= choice.sample.tokens and run.sample.score >= choice.sample.score
    ]
    if cheaper:
        run = min(cheaper, key=lambda run: run.sample.tokens)
        return [
            f"A smaller image does as well: with {run.sample.tokens:.1f} tokens it keeps {retention(run.sample)} %. "
            "It needs no method; let the processor make smaller images."
        ]
    return []


def _held_out(outcome: Outcome) -> list[str]:
    sample = outcome.held_out
    if sample is None:
        return ["The time did not reach for the examples held out. Start the command again with more --time."]
    number = len(sample.scores)
    part = "" if number == outcome.held_out_of else f" (of {outcome.held_out_of}; the time was short)"
    lines = [
        f"Held out: on {number} other examples{part}, which chose nothing, it keeps {retention(sample)} % of the full "
        f"model's score with {sample.tokens:.1f} tokens, {100 * sample.costs['flops']:.1f} % of the FLOPs of the "
        f"prefill and {100 * sample.costs['kv']:.1f} % of the KV cache. This is the number to quote."
    ]
    _, interval = retention_interval(list(sample.scores), list(sample.full))
    if outcome.goal.kind == "retain" and interval is not None and interval[1] < outcome.goal.value:
        lines.append("The whole interval is below the goal: the race was lucky. Do not use this setting.")
    return lines
