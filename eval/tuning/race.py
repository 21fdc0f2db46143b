# SPDX-License-Identifier: Apache-2.0
"""Successive halving: all candidates on a few examples, the better ones on twice as many, and so on.

A *place* is a budget of the ladder. Each candidate stands on one: the cheapest that meets the goal on the examples so
far. From share to share it walks to a cheaper or a richer one, so budgets get finer where it matters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vtprune.eval.results.statistics import difference, retention_bound, retention_interval
from vtprune.eval.running.cells import Cell
from vtprune.eval.tuning.candidates import Candidate
from vtprune.eval.tuning.ladder import LADDER, bisect, walk
from vtprune.eval.tuning.measuring import OutOfTime, Sample

_SCREEN = LADDER[15]
"""The budget at which all candidates are compared first, a quarter of the tokens."""

FINALISTS = 4
"""So many candidates go on, however small the better half is."""

_WHEN_SHORT = 2
"""So many candidates are in the final if the time does not reach for all of them on the whole tuning share."""

ERROR = 0.1
"""How often the setting that is chosen may truly be below the goal."""

_SETTINGS_A_RUNG = 3
"""What a candidate measures on a new share, about; to foresee whether the time is enough."""

Say = Callable[[str], None]
More = Callable[[Sequence[Candidate], int], list[Candidate]]
"""The candidates that go on, the best first, and the number of the rung -> further ones that join them."""


class Measures(Protocol):
    """Where samples come from: a model, or a simulation in tests."""

    def sample(self, cell: Cell, batches: Sequence[range]) -> Sample | None: ...

    def affordable(self) -> float: ...


@dataclass(frozen=True)
class Run:
    """A candidate at a budget, measured."""

    candidate: Candidate
    sample: Sample

    @property
    def name(self) -> str:
        return f"{self.candidate.label} {self.sample.cell.keep_ratio:.3g}"


@dataclass
class Found:
    """How a race ended."""

    choice: Run | None
    """None if no setting meets the goal"""
    runs: list[Run]
    """all settings that were measured on the last share"""
    finalists: int
    examples: int
    """of the last share"""
    complete: bool
    """whether that is the whole tuning share; otherwise the time was short"""
    bound: float | None = None
    """of the choice's retention, where that was the goal"""
    earlier: list[Run] = field(default_factory=list)
    """each candidate where it stood last, on the share that it was last measured on"""


@dataclass
class Rung:
    """All that is measured on one share of the examples."""

    measures: Measures
    batches: Sequence[range]
    runs: dict[str, Run] = field(default_factory=dict)
    """title of the setting -> what it did"""

    def measure(self, candidate: Candidate, keep_ratio: float) -> Sample | None:
        cell = candidate.setting(keep_ratio)
        sample = self.measures.sample(cell, self.batches)
        if sample is not None:
            self.runs[cell.title] = Run(candidate, sample)
        return sample

    @property
    def examples(self) -> int:
        return sum(map(len, self.batches))


def shares(batches: Sequence[range], least: int = 32) -> list[int]:
    """Numbers of batches, each twice the one before, from at least `least` examples to all."""
    count = next((i + 1 for i in range(len(batches)) if batches[i].stop >= least), len(batches))
    found = []
    while count < len(batches):
        found.append(count)
        count *= 2
    return [*found, len(batches)]


def dominated(mine: Run, runs: Sequence[Run]) -> bool:
    """Whether another run has no more tokens and a score that is significantly higher, in a paired comparison."""
    cheaper = [run for run in runs if run is not mine and run.sample.tokens <= mine.sample.tokens]
    best = max(cheaper, key=lambda run: run.sample.score, default=None)
    if best is None or best.sample.score <= mine.sample.score:
        return False
    found = difference(mine.sample.scores, best.sample.scores)
    return found.significant and found.interval[1] < 0


def better_half(ranked: list[Candidate], out_of: int) -> list[Candidate]:
    """The first ones: at most half of those that ran, but never fewer than `FINALISTS`."""
    return ranked[: max(FINALISTS, out_of // 2)]


def shared_error(ranked: Sequence[str]) -> dict[str, float]:
    """The chance of a false choice that each finalist may have: the first half of `ERROR`, the others the rest.

    Several are tested, so each test has to be stricter than `ERROR`; and mostly it is the first one that is chosen.
    """
    if len(ranked) == 1:
        return {ranked[0]: ERROR}
    return {label: ERROR / 2 / (1 if place == 0 else len(ranked) - 1) for place, label in enumerate(ranked)}


class RetentionRace:
    """The race for the fewest tokens that retain a share of the full model's score."""

    def __init__(self, measures: Measures, batches: Sequence[range], retain: float, more: More, say: Say):
        """batches: those of the tuning share. more: adds candidates after a rung."""
        self._measures, self._batches, self._retain = measures, batches, retain
        self._more, self._say = more, say
        self._places: dict[str, int] = {}
        self._stood: dict[str, Run] = {}

    def run(self, candidates: Sequence[Candidate]) -> Found:
        """Raises OutOfTime if not even the first share could be measured."""
        counts = shares(self._batches)
        alive = self._screened(candidates, counts[0])
        done, rung = 0, None
        for number, count in enumerate(counts[:-1] or counts):
            needed = len(alive) * _SETTINGS_A_RUNG * (count - done)
            if rung is not None and needed > self._measures.affordable() / 2:
                break
            try:
                this = self._rung(alive, count)
            except OutOfTime:
                if rung is None:
                    raise
                break
            rung, done = this, count
            alive = self._survivors(rung, alive)
            self._say(f"{rung.examples} examples: {self._standing(rung, alive)}")
            alive += [new for new in self._more(alive, number) if new.label not in self._places]
        if self._measures.affordable() < counts[-1] * (len(alive) + _SETTINGS_A_RUNG):
            # More examples for few candidates say more than few examples for all.
            alive = [candidate for candidate in alive if candidate.is_method][:_WHEN_SHORT]
        affordable = min(self._measures.affordable() / (len(alive) + _SETTINGS_A_RUNG), counts[-1])
        return self._finish(alive, max(done, int(affordable)), rung)

    def _screened(self, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """All candidates at one budget on the first share, or on less if the time is short; the better half goes on.

        Those whose floor is above the budget go on, too, behind the others.
        """
        affordable = min(self._measures.affordable() / (4 * len(candidates)), count)
        rung = Rung(self._measures, self._batches[: max(1, int(affordable))])
        scored, unscored = [], []
        for candidate in candidates:
            sample = rung.measure(candidate, _SCREEN)
            if sample is None:
                unscored.append(candidate)
            else:
                self._stood[candidate.label] = Run(candidate, sample)
                scored.append((-sample.score, sample.tokens, candidate))
        scored.sort(key=lambda entry: entry[:2])
        names = ", ".join(entry[2].label for entry in scored[:3])
        self._say(f"{rung.examples} examples: {len(candidates)} candidates at {_SCREEN:.0%}; ahead: {names}")
        return better_half([entry[2] for entry in scored], len(scored)) + unscored

    def _rung(self, alive: Sequence[Candidate], count: int) -> Rung:
        rung = Rung(self._measures, self._batches[:count])

        def meets(candidate: Candidate, place: int) -> bool:
            sample = rung.measure(candidate, LADDER[place])
            return sample is not None and sample.retention >= self._retain

        first = not self._places
        start = max(self._places.values(), default=0)
        enough = self._measures.affordable() / 2 if first else 0.0
        for candidate in alive:
            if first and self._places and self._measures.affordable() < enough:
                self._say(f"the time is short: {len(alive) - len(self._places)} candidates are left out")
                break
            test = functools.partial(meets, candidate)
            # A new candidate joins where the best one stands.
            place = bisect(test) if first else walk(test, self._places.get(candidate.label, start))
            self._places[candidate.label] = place
        return rung

    def _run_of(self, rung: Rung, candidate: Candidate) -> Run | None:
        """A candidate where it stands; on the richest budget if no budget meets the goal."""
        return rung.runs.get(candidate.setting(LADDER[max(self._places[candidate.label], 0)]).title)

    def _survivors(self, rung: Rung, alive: Sequence[Candidate]) -> list[Candidate]:
        """Without those that are surely worse than needed or dominated, and of the others the better half."""
        standing = []
        for candidate in alive:
            run = self._run_of(rung, candidate) if candidate.label in self._places else None
            if run is None:
                continue
            self._stood[candidate.label] = run
            if self._places[candidate.label] < 0:
                _, interval = retention_interval(list(run.sample.scores), list(run.sample.full))
                if interval is None or interval[1] < self._retain:
                    continue
            if not dominated(run, list(rung.runs.values())):
                standing.append((self._places[candidate.label] < 0, run.sample.tokens, -run.sample.score, candidate))
        standing.sort(key=lambda entry: entry[:3])
        return better_half([entry[3] for entry in standing], len(alive))

    def _standing(self, rung: Rung, alive: Sequence[Candidate]) -> str:
        best = [run.name for candidate in alive[:3] if (run := self._run_of(rung, candidate)) is not None]
        return f"{len(self._places)} candidates so far, {len(alive)} go on; ahead: {', '.join(best) or 'none'}"

    def _finish(self, alive: Sequence[Candidate], count: int, last: Rung | None) -> Found:
        """On the final share a setting has to meet the goal surely: with the lower bound of its retention."""
        rung = Rung(self._measures, self._batches[:count])
        errors = shared_error([candidate.label for candidate in alive])

        def surely(candidate: Candidate, place: int) -> bool:
            sample = rung.measure(candidate, LADDER[place])
            return sample is not None and self._bound(sample, errors[candidate.label]) >= self._retain

        ahead = -1  # place of the cheapest setting so far that meets the goal
        try:
            for candidate in alive if self._possible(rung, max(errors.values(), default=0)) else ():
                start = max(self._places.get(candidate.label, -1), ahead + 1, 0)
                if not candidate.is_method:  # it is measured to be shown beside the choice
                    surely(candidate, max(self._places.get(candidate.label, -1), 0))
                elif start < len(LADDER):
                    # Behind the first one, a richer budget than the best one so far is of no use.
                    place = walk(functools.partial(surely, candidate), start, ahead)
                    if place > ahead and place + 1 < len(LADDER) and surely(candidate, place + 1):
                        place += 1
                    ahead = max(ahead, place)
        except OutOfTime:
            pass
        self._say(f"{rung.examples} examples: final, {len(alive)} candidates")
        return self._choose(rung, errors, last)

    def _possible(self, rung: Rung, error: float) -> bool:
        """Whether so many examples can show that the goal is met, if nothing at all is lost."""
        best = [1.0] * rung.examples
        return (retention_bound(best, best, error) or 0.0) >= self._retain

    def _choose(self, rung: Rung, errors: Mapping[str, float], last: Rung | None) -> Found:
        sure = [
            (run.sample.tokens, run.sample.costs["flops"], -run.sample.score, run)
            for run in rung.runs.values()
            if run.candidate.is_method and self._bound(run.sample, errors[run.candidate.label]) >= self._retain
        ]
        choice = min(sure, key=lambda entry: entry[:3])[3] if sure else None
        bound = None if choice is None else self._bound(choice.sample, errors[choice.candidate.label])
        complete = len(rung.batches) == len(self._batches)
        runs = list(rung.runs.values()) or (list(last.runs.values()) if last else [])
        return Found(choice, runs, len(errors), rung.examples, complete, bound, list(self._stood.values()))

    def _bound(self, sample: Sample, error: float) -> float:
        return retention_bound(sample.scores, sample.full, error) or 0.0
