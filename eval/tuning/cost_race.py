# SPDX-License-Identifier: Apache-2.0
"""The race for the best score at a cost: every candidate gets the budget that costs so much, and the better half stays.

The rungs are those of `race`; here budgets are not for choosing, they follow from the goal.
"""

from __future__ import annotations

from collections.abc import Sequence

from vtprune.eval.results.statistics import difference
from vtprune.eval.tuning.candidates import Candidate
from vtprune.eval.tuning.config import Goal
from vtprune.eval.tuning.measuring import OutOfTime, Sample
from vtprune.eval.tuning.race import Found, Measures, More, Run, Rung, Say, better_half, shares

_TRIES = 5
_NEAR = 0.97
"""A budget that costs so much of the goal, or more, is not raised any further."""
_TOLERANCE = {"flops": 1.01, "kv": 1.01, "latency": 1.05}
"""How far a cost may lie above the goal: counts differ a little between examples, and times between measurements."""
_SMALLEST, _LARGEST = 0.01, 0.99


class CostRace:
    """The race for the highest score at a cost."""

    def __init__(self, measures: Measures, batches: Sequence[range], goal: Goal, more: More, say: Say):
        """batches: those of the tuning share. more: adds candidates after a rung."""
        self._measures, self._batches, self._goal = measures, batches, goal
        self._more, self._say = more, say
        self._ratios: dict[str, float] = {}

    def cost(self, sample: Sample) -> float:
        """What the goal limits: a share of the full model's, or seconds."""
        return sample.seconds if self._goal.seconds else sample.costs[self._goal.kind]

    def fits(self, sample: Sample) -> bool:
        """Whether the cost is at most that of the goal, give or take what measurements differ by."""
        return self.cost(sample) <= self._goal.value * _TOLERANCE[self._goal.kind]

    def run(self, candidates: Sequence[Candidate]) -> Found:
        """Raises OutOfTime if not even the first share could be measured."""
        alive, best = list(candidates), None
        counts = shares(self._batches)
        for number, count in enumerate(counts):
            if best is not None and len(alive) * count > self._measures.affordable():
                break
            try:
                rung = self._rung(alive, count)
            except OutOfTime:
                if best is None:
                    raise
                break
            best = rung
            alive = self._survivors(rung, alive)
            names = ", ".join(run.name for run in self._ranked(rung)[:3])
            self._say(f"{rung.examples} examples: {len(alive)} candidates go on; ahead: {names or 'none'}")
            if count < counts[-1]:
                alive += [new for new in self._more(alive, number) if new.label not in self._ratios]
        assert best is not None  # the first rung raises or is measured
        ranked = self._ranked(best)
        choice = next((run for run in ranked if run.candidate.is_method), None)
        complete = len(best.batches) == len(self._batches)
        return Found(choice, list(best.runs.values()), len(ranked), best.examples, complete)

    def _rung(self, alive: Sequence[Candidate], count: int) -> Rung:
        rung = Rung(self._measures, self._batches[:count])
        for candidate in alive:
            self._fit(rung, candidate)
        return rung

    def _fit(self, rung: Rung, candidate: Candidate) -> None:
        """Measures the candidate at the budget that costs what the goal allows; its other budgets leave the rung.

        The cost of a budget is nearly a line, so a line through two budgets finds the next one to try.
        """
        tried: list[tuple[float, Run]] = []
        ratio = self._ratios.get(candidate.label, self._first_ratio())
        for _ in range(_TRIES):
            sample = rung.measure(candidate, ratio)
            if sample is None:
                break
            tried.append((ratio, rung.runs[candidate.setting(ratio).title]))
            if self.fits(sample) and (self.cost(sample) >= _NEAR * self._goal.value or ratio >= _LARGEST):
                break
            following = self._next_ratio([(r, self.cost(run.sample)) for r, run in tried], self._cost_of_all(sample))
            if following in (r for r, _ in tried):
                break
            ratio = following
        for _, run in tried:
            rung.runs.pop(run.sample.cell.title, None)
        fitting = [(r, run) for r, run in tried if self.fits(run.sample)]
        if fitting:
            self._ratios[candidate.label], run = max(fitting, key=lambda entry: entry[0])
            rung.runs[run.sample.cell.title] = run

    def _first_ratio(self) -> float:
        return 0.5 if self._goal.seconds else self._goal.value

    def _cost_of_all(self, sample: Sample) -> float:
        """The cost of the full model."""
        return sample.seconds / sample.costs["latency"] if self._goal.seconds else 1.0

    def _next_ratio(self, tried: Sequence[tuple[float, float]], all_cost: float) -> float:
        points = sorted([*tried, (1.0, all_cost)], key=lambda point: abs(point[1] - self._goal.value))
        (ratio, cost), (other, other_cost) = points[:2]
        aim = (_NEAR + 1) / 2 * self._goal.value
        slope = (other_cost - cost) / (other - ratio) if other != ratio else 0.0
        found = ratio + (aim - cost) / slope if slope > 0 else ratio * aim / cost
        return round(min(max(found, _SMALLEST), _LARGEST), 4)

    def _ranked(self, rung: Rung) -> list[Run]:
        return sorted(rung.runs.values(), key=lambda run: (-run.sample.score, run.sample.tokens))

    def _survivors(self, rung: Rung, alive: Sequence[Candidate]) -> list[Candidate]:
        """Those that meet the cost and are not significantly worse than the best one; of these the better half."""
        ranked = self._ranked(rung)
        standing = [
            run.candidate
            for run in ranked
            if not (found := difference(run.sample.scores, ranked[0].sample.scores)).significant or found.mean >= 0
        ]
        return better_half(standing, len(alive))
