# SPDX-License-Identifier: Apache-2.0
"""Runs `vtprune tune`: loads the model once, lets the candidates race, and measures the choice on held-out examples."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from rich.console import Console

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval.progress import progress_bar, say
from vtprune.eval.running.devices import taken, with_devices
from vtprune.eval.running.evaluator import refuse_mismatches
from vtprune.eval.running.questions import QuestionEvaluator
from vtprune.eval.running.runner import Opened, Study, evaluator_class
from vtprune.eval.running.shards import claim
from vtprune.eval.tasks import Classification, open_tasks
from vtprune.eval.tuning import output
from vtprune.eval.tuning.candidates import Candidate, compositions, first_candidates, twins
from vtprune.eval.tuning.choice import Outcome
from vtprune.eval.tuning.config import TuneConfig
from vtprune.eval.tuning.cost_race import CostRace
from vtprune.eval.tuning.measuring import FULL, Bench, Clock, OutOfTime, Sample, split
from vtprune.eval.tuning.race import Found, RetentionRace, Run
from vtprune.support import why_not

_HELD_OUT_TIME = 1 / 3
"""The largest share of the time that is kept for the examples held out."""
_MARGIN = 1.3
"""The full model's time is measured on a few batches, so somewhat more is kept."""


def tune(config: TuneConfig, console: Console | None = None) -> Outcome:
    """Chooses a setting for a model and a task; writes `tune.txt` and, if there is a choice, `tuned.yaml`.

    If it was stopped, the same call goes on: what is on disk is not computed again.

    Args:
        config: from `TuneConfig.of`.
        console: where progress goes; default nowhere.

    Raises:
        ConfigError: the model or the task cannot be loaded, they do not go together, there are too few examples, the
            time is too short for anything, or another run uses the folder.
    """
    started = monotonic()
    end = started + 60 * config.minutes if config.minutes is not None else float("inf")
    settings = with_devices(config.evaluation)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("vtprune tune runs in one process; start it without torchrun")
    task, *others = open_tasks(settings.task, settings.include_path).values()
    if others:
        names = ", ".join(each.name for each in (task, *others))
        raise ConfigError(f"--task names several tasks ({names}); vtprune tune takes one")
    if isinstance(task, Classification):
        raise ConfigError(f"task {task.name!r} has classes for a CLIP; vtprune tune is for tasks with questions")
    refuse_mismatches(settings, {task.name: task})
    with ExitStack() as stack:
        claim(settings.output, None, stack)
        say(console, taken(settings))
        if task.metrics is not None:
            say(console, f"{task.name}: scores are means over its documents, whatever its metric is")
        bar = stack.enter_context(progress_bar(console, "loading the model"))
        study, tuning, held_out = split(Study.of(settings, settings.model[0], Opened.of(task, settings.limit)))
        kind = evaluator_class(task)
        evaluator = kind(settings, study, kind.load(settings, study.model, settings.device))
        clock = Clock(end)
        bench = Bench(study, evaluator, settings.output, clock, bar.advance)
        tuner = _Tuner(config, bench, evaluator, clock, tuning, held_out, console)
        outcome = tuner.run(end)
    output.write(outcome, config)
    return outcome


@dataclass
class _Tuner:
    """One command: the race, then the examples held out."""

    config: TuneConfig
    bench: Bench
    evaluator: QuestionEvaluator
    clock: Clock
    tuning: Sequence[range]
    held_out: Sequence[range]
    console: Console | None

    def run(self, end: float) -> Outcome:
        """end: clock at which all has to be over."""
        candidates, refused = first_candidates(self._why_not)
        held_out_of = sum(map(len, self.held_out))
        try:
            # The first batches say how long a batch takes, so how much time the others need.
            if self.bench.sample(FULL, self.tuning[:2]) is None:
                raise ConfigError("the full model cannot run: " + "; ".join(self.bench.refused.values()))
            reserve = self._reserve()
            self.clock.end = end - reserve
            self._say(
                f"{sum(map(len, self.tuning))} examples to tune on, {held_out_of} held out; {len(candidates)} "
                f"candidates fit the model, {len(refused)} methods do not"
            )
            found = self._race(candidates)
        except OutOfTime as error:
            raise ConfigError(
                f"--time {self.config.minutes:g} is over before the first examples were compared; what is measured is "
                "kept: start the command again, with more time"
            ) from error
        self.clock.end = end
        held_out = None if found.choice is None else self._held_out(found.choice)
        return Outcome(self.config.goal, found, held_out, held_out_of, refused)

    def _why_not(self, spec: Any) -> str | None:
        return why_not(self.evaluator.model, spec)

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False)

    def _reserve(self) -> float:
        """Seconds for the examples held out: the full model and the choice on each of them."""
        if self.clock.left == float("inf"):
            return 0.0
        wanted = 2 * len(self.held_out) * self.bench.seconds_a_batch * _MARGIN
        return min(wanted, _HELD_OUT_TIME * self.clock.left)

    def _race(self, candidates: Sequence[Candidate]) -> Found:
        goal = self.config.goal
        if goal.kind == "latency":
            self.bench.warm(self.tuning)
        if goal.kind == "retain":
            return RetentionRace(self.bench, self.tuning, goal.value, self._more, self._say).run(candidates)
        return CostRace(self.bench, self.tuning, goal, self._more, self._say).run(candidates)

    def _more(self, ranked: Sequence[Candidate], rung: int) -> list[Candidate]:
        """Compositions join after the first rung, other positions and scopes after the second."""
        if rung == 0:
            return compositions(ranked, self._why_not)
        return twins(ranked, self._several_crops(), self._why_not) if rung == 1 else []

    def _several_crops(self) -> bool:
        inputs = self.evaluator.inputs(self.tuning[0])
        kind = self.evaluator.task.kind
        crops = vtprune.adapter_for(self.evaluator.model).encoder_sequences(kind, inputs)
        return len(crops) > len(self.tuning[0])

    def _held_out(self, choice: Run) -> Sample | None:
        """The choice on as many of the held-out examples as the time allows; None if it allows none."""
        self._say(f"chosen: {choice.name}; now the examples held out")
        count = max(1, min(len(self.held_out), int(min(self.bench.affordable(), 1e9) / (2 * _MARGIN))))
        with suppress(OutOfTime):
            return self.bench.sample(choice.sample.cell, self.held_out[:count])
        return None
