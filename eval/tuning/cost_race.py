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
_AGAIN = 3
"""How often a budget is made smaller on a new share."""
_AIM = 0.985
"""Share of the goal that the next budget is aimed at."""
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
        self._stood: dict[str, Run] = {}

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
            if best is not None and len(alive) * (count - len(best.batches)) > self._measures.affordable():
                break
            try:
                rung = self._rung(alive, count)
            except OutOfTime:
                if best is None:
                    raise
                break
            best = rung
            self._stood.update((run.candidate.label, run) for run in rung.runs.values())
            alive = self._survivors(rung, alive)
            names = ", ".join(run.name for run in self._ranked(rung)[:3])
            self._say(f"{rung.examples} examples: {len(alive)} candidates go on; ahead: {names or 'none'}")
            if count < counts[-1]:
                alive += [new for new in self._more(alive, number) if new.label not in self._ratios]
        assert best is not None  # the first rung raises or is measured
        ranked = self._ranked(best)
        choice = next((run for run in ranked if run.candidate.is_method), None)
        complete = len(best.batches) == len(self._batches)
        runs, earlier = list(best.runs.values()), list(self._stood.values())
        return Found(choice, runs, len(ranked), best.examples, complete, earlier=earlier)

    def _rung(self, alive: Sequence[Candidate], count: int) -> Rung:
        rung = Rung(self._measures, self._batches[:count])
        first = not self._ratios
        enough = self._measures.affordable() / 2 if first else 0.0
        for place, candidate in enumerate(alive):
            if self._ratios and self._measures.affordable() < enough:
                self._say(f"the time is short: {len(alive) - place} candidates are left out")
                break
            self._measure(rung, candidate)
        return rung

    def _measure(self, rung: Rung, candidate: Candidate) -> None:
        """Measures the candidate at its budget; if that costs too much on these examples, at a smaller one."""
        ratio = self._ratios.get(candidate.label) or self._searched(candidate)
        for _ in range(_AGAIN if ratio is not None else 0):
            sample = rung.measure(candidate, ratio)
            if sample is None:
                return
            if self.fits(sample):
                self._ratios[candidate.label] = ratio
                return
            del rung.runs[sample.cell.title]
            ratio = round(ratio * _AIM * self._goal.value / self.cost(sample), 4)

    def _searched(self, candidate: Candidate) -> float | None:
        """The largest budget found that the goal allows on the first batch; None if there is none.

        The cost of a budget is nearly a line, so a line through two budgets finds the next one to try.
        """
        rung = Rung(self._measures, self._batches[:1])
        tried: dict[float, float] = {}  # budget -> its cost
        ratio = self._first_ratio()
        while ratio not in tried and len(tried) < _TRIES:
            sample = rung.measure(candidate, ratio)
            if sample is None:
                break
            tried[ratio] = self.cost(sample)
            if self.fits(sample) and tried[ratio] >= _NEAR * self._goal.value:
                break
            ratio = self._next_ratio(list(tried.items()), self._cost_of_all(sample))
        tolerance = self._goal.value * _TOLERANCE[self._goal.kind]
        return max((ratio for ratio, cost in tried.items() if cost <= tolerance), default=None)

    def _first_ratio(self) -> float:
        return 0.5 if self._goal.seconds else self._goal.value

    def _cost_of_all(self, sample: Sample) -> float:
        """The cost of the full model."""
        return sample.seconds / sample.costs["latency"] if self._goal.seconds else 1.0

    def _next_ratio(self, tried: Sequence[tuple[float, float]], all_cost: float) -> float:
        points = sorted([*tried, (1.0, all_cost)], key=lambda point: abs(point[1] - self._goal.value))
        (ratio, cost), (other, other_cost) = points[:2]
        aim = _AIM * self._goal.value
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
