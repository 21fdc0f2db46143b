# SPDX-License-Identifier: Apache-2.0
"""The race against answers drawn from known curves: it finds the best setting, and is seldom wrong about the goal."""

import pytest
from simulated import Simulated, candidates

from vtprune.eval.running.cells import Cell
from vtprune.eval.tuning.config import Goal
from vtprune.eval.tuning.cost_race import CostRace
from vtprune.eval.tuning.ladder import LADDER, bisect, walk
from vtprune.eval.tuning.measuring import OutOfTime, Sample
from vtprune.eval.tuning.race import (
    ERROR,
    FINALISTS,
    RetentionRace,
    Run,
    dominated,
    shared_error,
    shares,
)

NAMES = ["mmtok", "divprune", "random", "uniform", "pool", "vtc_cls", "cdpruner", "dart"]


def curve(budget, goal=0.9):
    """Retention that is `goal` at this budget, and lower under it."""
    return lambda ratio: max(0.0, 1 - (1 - goal) * (budget / ratio) ** 1.5)


def batches(examples):
    return [range(start, start + 20) for start in range(0, examples, 20)]


def raced(measures, examples=400, retain=0.9, more=lambda ranked, rung: [], said=None):
    race = RetentionRace(measures, batches(examples), retain, more, (said if said is not None else []).append)
    return race.run(candidates(*NAMES))


def test_the_method_that_needs_fewest_tokens_wins():
    """The best one needs a tenth of the tokens, the next one twice as many."""
    curves = {name: curve(0.1 * 2**place) for place, name in enumerate(NAMES)}
    for seed in range(3):
        found = raced(Simulated(curves, seed))
        assert found.choice.candidate.label == "mmtok"
        assert 0.1 <= found.choice.sample.cell.keep_ratio <= 0.17
        assert found.bound >= 0.9 and found.complete and found.examples == 400


def test_the_choice_is_seldom_below_the_goal():
    """All methods are alike, so the luckiest one is chosen: the hardest case. At most one race in ten may be wrong."""
    curves = {name: curve(0.2) for name in NAMES}
    trials = 20
    below = 0
    for seed in range(trials):
        choice = raced(Simulated(curves, seed), examples=200).choice
        below += choice is not None and choice.sample.cell.keep_ratio < 0.2
    assert below <= 2 * ERROR * trials  # seen: 0; more than 4 of 20 has a chance of 4 % at the stated rate


def test_no_choice_rather_than_one_that_is_not_sure():
    """60 examples cannot show that 98 % are retained, even where nothing is lost."""
    curves = dict.fromkeys(NAMES, lambda ratio: 1.0)
    assert raced(Simulated(curves), examples=60, retain=0.98).choice is None
    assert raced(Simulated(curves), examples=600, retain=0.98).choice is not None


def test_most_of_the_work_is_spent_on_few_candidates():
    curves = {name: curve(0.1 * 1.5**place) for place, name in enumerate(NAMES)}
    measures = Simulated(curves)
    found = raced(measures)
    assert found.finalists <= FINALISTS
    all_of_the_ladder = len(NAMES) * len(LADDER) * len(batches(400))
    assert len(measures.measured) < all_of_the_ladder / 15


def test_candidates_that_join_later_can_win():
    curves = {name: curve(0.4) for name in NAMES} | {"tome": curve(0.1)}
    found = raced(Simulated(curves), more=lambda ranked, rung: candidates("tome") if rung == 1 else [])
    assert found.choice.candidate.label == "tome"


def test_the_smaller_image_is_measured_and_never_chosen():
    curves = {name: curve(0.4) for name in NAMES} | {"downsample": curve(0.05)}
    race = RetentionRace(Simulated(curves), batches(400), 0.9, lambda ranked, rung: [], lambda text: None)
    found = race.run(candidates("downsample", *NAMES))
    assert found.choice is not None and found.choice.candidate.is_method
    assert any(run.candidate.names == ("downsample",) for run in found.runs)


def test_when_the_time_is_short_the_race_ends_with_fewer_examples():
    curves = {name: curve(0.1 * 2**place) for place, name in enumerate(NAMES)}
    measures = Simulated(curves, batches=150)
    found = raced(measures, examples=2000)
    assert not found.complete and 0 < found.examples < 2000
    assert measures.left >= 0


def test_no_time_at_all():
    with pytest.raises(OutOfTime):
        raced(Simulated(dict.fromkeys(NAMES, curve(0.1)), batches=3))


@pytest.mark.parametrize("kind", ["flops", "kv", "latency"])
def test_at_a_cost_the_best_score_wins_and_the_cost_is_kept(kind):
    curves = {name: curve(0.05 * 2**place) for place, name in enumerate(NAMES)}
    race = CostRace(Simulated(curves), batches(400), Goal(kind, 0.25), lambda ranked, rung: [], lambda text: None)
    found = race.run(candidates(*NAMES))
    assert found.choice.candidate.label == "mmtok"
    assert all(0.24 <= run.sample.costs[kind] <= 0.2625 for run in found.runs)


def test_the_shares_double():
    assert shares(batches(400)) == [2, 4, 8, 16, 20]
    assert shares(batches(20)) == [1]


@pytest.mark.parametrize("last", [-1, 0, 7, 30, len(LADDER) - 1])
def test_bisecting_and_walking_find_the_last_place_that_meets(last):
    def meets(place):
        return place <= last

    assert bisect(meets) == last
    found = [walk(meets, start) for start in (0, 6, 31)]
    assert all(place in (last, last - 1) for place in found)


def test_a_run_is_dominated_by_a_cheaper_one_that_is_significantly_better():
    def run(tokens, right, of=100):
        scores = (1.0,) * right + (0.0,) * (of - right)
        return Run(candidates("mmtok")[0], Sample(Cell("mmtok", 0.5), scores, (1.0,) * of, tokens))

    good = run(tokens=10, right=90)
    assert dominated(run(tokens=10, right=70), [good])
    assert dominated(run(tokens=30, right=70), [good])
    assert not dominated(run(tokens=5, right=70), [good])
    assert not dominated(run(tokens=10, right=89), [good])


def test_the_chance_of_a_false_choice_is_shared():
    assert sum(shared_error(["a", "b", "c"]).values()) == pytest.approx(ERROR)
    assert shared_error(["a"]) == {"a": ERROR}
