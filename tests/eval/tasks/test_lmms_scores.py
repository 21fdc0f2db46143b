# SPDX-License-Identifier: Apache-2.0
"""Metrics of lmms-eval's tasks from plain records: their aggregation, their intervals, the score of one document."""

from types import SimpleNamespace

import numpy as np
import pytest
from lmms_eval.api.metrics import mean

from vtprune.errors import ConfigError
from vtprune.eval.results.aggregated import Aggregated, of_one_study
from vtprune.eval.results.entries import Entry
from vtprune.eval.results.formatting import accuracy
from vtprune.eval.tasks.lmms_scores import Scores


def task(aggregations: dict, filters: tuple = ("none",), **config) -> SimpleNamespace:
    """What `Scores` needs of a task object of lmms-eval."""
    listed = [{"metric": name, "aggregation": function} for name, function in aggregations.items()]
    settings = {"reasoning_tags": None, "auto_strip_thinking": False, "score_key": "score", "metric_list": listed}
    return SimpleNamespace(
        task_name="made",
        aggregation=lambda: aggregations,
        higher_is_better=lambda: {name: "loss" not in name for name in aggregations},
        config=SimpleNamespace(**settings | config),
        _filters=[SimpleNamespace(name=name) for name in filters],
    )


def results(metric: str, values: list) -> list:
    return [{"none": {metric: value}} for value in values]


def pairs(items):
    """Points of pairs that are both right; fails if there is anything but pairs."""
    found = {}
    for item in items:
        found.setdefault(item["question_id"], []).append(item["score"])
    assert {len(scores) for scores in found.values()} == {2}
    return 100 * sum(sum(scores) == 2 for scores in found.values()) / len(found)


PAIRS = [{"question_id": i // 2, "score": float(i % 3 > 0)} for i in range(40)]


def test_a_mean_has_the_interval_of_means():
    scores = Scores(task({"acc": mean}))
    found = Aggregated.of(scores, [r | {} for r in records("acc", [0.0, 1.0, 1.0, 1.0])])
    assert found.metrics == {"acc": 0.75} and len(found.draws) == 2000
    assert set(np.unique(found.draws)) <= {0.0, 0.25, 0.5, 0.75, 1.0}


def records(metric: str, values: list, families: int = 1) -> list[dict]:
    return [{"family": f"f{i % families}", "results": one} for i, one in enumerate(results(metric, values))]


def test_documents_that_belong_together_are_drawn_together():
    scores = Scores(task({"points": pairs}))
    draws = scores.draws(results("points", PAIRS), "points")
    assert len(draws) == 500 and draws.min() >= 0 and draws.max() <= 100
    assert abs(draws.mean() - pairs(PAIRS)) < 3 and draws.std() > 5  # of 20 pairs
    assert (draws == scores.draws(results("points", PAIRS), "points")).all()


def test_a_metric_without_intervals():
    """It reads more from the key than what belongs together, or writes files."""
    odd = Scores(task({"odd": lambda items: float(sum(len(str(item["question_id"])) for item in items))}))
    assert odd.draws(results("odd", PAIRS), "odd") is None
    written = []
    writes = Scores(task({"w": lambda items, args: written.append(args.output_path) or 1.0}))
    assert writes.draws(results("w", [{"a": 1}]), "w") is None and not written
    found = Aggregated.of(writes, records("w", [{"a": 1, "score": 1}]))
    line = found.numbers(found) | {"status": "ok", "n": 1}
    assert (line["ci"], line["retention"], line["retention_ci"]) == (None, 1.0, None)
    (line,) = of_one_study([line])
    entry = Entry((line,))
    assert accuracy(entry) == "100.0" and entry.bounds("retention_ci") is None


def test_retention_is_paired():
    scores = Scores(task({"points": pairs}))
    full = Aggregated.of(scores, records("points", PAIRS))
    line = full.numbers(full)
    assert line["retention"] == 1.0 and line["retention_ci"] == [1.0, 1.0] and line["ci"][0] < line["score"]
    none = Aggregated.of(scores, records("points", [item | {"score": 0.0} for item in PAIRS]))
    assert none.numbers(full)["retention"] == 0.0 and full.numbers(none)["retention"] is None


def test_families_are_those_that_every_cell_has():
    scores = Scores(task({"points": pairs}))
    by_pair = [record | {"family": f"f{place // 2 % 2}"} for place, record in enumerate(records("points", PAIRS))]
    together = Aggregated.of(scores, by_pair)
    apart = Aggregated.of(scores, records("points", PAIRS, families=2))
    assert set(together.families) == {"f0", "f1"} and apart.families == {}
    lines = [one.numbers(together) for one in (together, apart)]
    both = of_one_study(lines)
    assert [line["family_scores"] for line in both] == [{"all documents": together.score}] * 2
    assert {line["score_unit"] for line in both} == {"points"}
    assert Entry((both[0],)).mean("score") == together.score / 100  # tables show it times 100


@pytest.mark.parametrize(
    ("value", "score"),
    [(0.5, 0.5), (True, 1.0), ({"score": 1, "id": "a"}, 1.0), (["a", "b"], 2.0)],
)
def test_the_score_of_a_document(value, score):
    scores = Scores(task({"m": lambda items: len(items[0])}))
    assert scores.of_document({"none": {"m": value}}) == score


def test_the_main_metric():
    three = {"loss": mean, "acc": mean, "f1": mean}
    found = {"none": {"loss": 1.0, "acc": 0.5, "f1": 0.25}}
    assert list(Scores(task(three)).aggregated([found])) == ["acc", "f1", "loss"]
    named = Scores(task(three), "f1")
    assert named.of_document(found) == 0.25
    assert named.of_document({"none": {"acc": 0.5}}) == 0.5  # a document that has no value of it
    twice = Scores(task({"acc": mean}, filters=("first", "none")))
    assert twice.aggregated([{"first": {"acc": 1.0}, "none": {"acc": 0.0}}]) == {"acc,first": 1.0, "acc": 0.0}


def test_what_json_cannot_hold_is_an_error():
    scores = Scores(task({"m": mean}))
    assert scores._plain("m", (np.float32(0.5), {"a": np.arange(2)})) == [0.5, {"a": [0, 1]}]
    for value, problem in [({1: 2}, "gives dict for m"), (object(), "gives object for m"), (float("nan"), "is nan")]:
        with pytest.raises(ConfigError, match=f"lmms:made: .*{problem}"):
            scores._plain("m", value)


def test_failures_of_a_task_are_named():
    def fails(items):
        raise ZeroDivisionError("no items")

    with pytest.raises(ConfigError, match="lmms:made: the aggregation of m fails: ZeroDivisionError: no items"):
        Scores(task({"m": fails})).aggregated(results("m", [1.0]))
    with pytest.raises(ConfigError, match="process_results gives no number for a document; it gives other"):
        Scores(task({"m": mean})).of_document({"none": {"other": 1.0}})
