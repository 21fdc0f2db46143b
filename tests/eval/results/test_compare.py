# SPDX-License-Identifier: Apache-2.0
"""`vtprune compare`: two runs, example by example; what it refuses, and its exit code."""

import shutil

import finished_runs
import pytest
import tiny_eval
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.results.compare import compare
from vtprune.eval.results.records import cell_records


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, finished_runs.finish(model, folder, task="tiny")


@pytest.fixture
def changed(run, tmp_path):
    """A copy of the run, and a function that rewrites the records of a row there."""
    folder = tmp_path / "changed"
    shutil.copytree(run[0], folder)

    def change(label, ratio, how, seed=None):
        (line,) = (r for r in run[1] if (r["label"], r["keep_ratio"], r["seed"]) == (label, ratio, seed))
        finished_runs.rewrite(folder, line["cell"], how)

    return folder, change


def command(*folders):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["compare", *map(str, folders)])


def pair(compared, label, ratio):
    (found,) = (p for p in compared.pairs if (p.first.label, p.first.keep_ratio) == (label, ratio))
    return found


def test_a_run_is_the_same_as_itself(run):
    folder, lines = run
    compared = compare(folder, folder)
    rows = {(line["label"], line["keep_ratio"]) for line in lines if line["status"] == "ok"}
    assert {(p.first.label, p.first.keep_ratio) for p in compared.pairs} == rows
    assert all((p.verdict, p.changed, p.difference.p) == ("same", 0, 1.0) for p in compared.pairs)
    assert compared.only == ([], [])
    assert command(folder, folder).exit_code == 0


def test_a_row_that_got_worse_is_named_and_sets_the_exit_code(run, changed):
    folder, change = changed
    change("uniform", 0.5, lambda i, r: {"score": r["score"] - 0.5, "prediction": r["prediction"] + "?"})
    change("fastv", 0.5, lambda i, r: {"score": r["score"] + 0.5})
    compared = compare(run[0], folder)
    worse, better = pair(compared, "uniform", 0.5), pair(compared, "fastv", 0.5)
    assert (worse.verdict, worse.changed, worse.difference.mean) == ("worse", 1.0, pytest.approx(-0.5))
    assert (better.verdict, better.changed) == ("better", 0)
    assert pair(compared, "uniform", 0.1).verdict == "same"
    result = command(run[0], folder)
    assert result.exit_code == 1
    (line,) = (line for line in result.stdout.splitlines() if "uniform" in line and "50 %" in line)
    assert "-50.0 [-50.0, -50.0]" in line and "worse" in line and "100 %" in line
    assert command(folder, run[0]).exit_code == 1  # then fastv is the one that got worse


def test_seeds_count_once_an_example(run, changed):
    folder, change = changed
    change("random", 0.5, lambda i, r: {"score": r["score"] - 1}, seed=1)  # the other seed stays
    found = pair(compare(run[0], folder), "random", 0.5)
    assert found.difference.mean == pytest.approx(-0.5) and found.first.seeds == [0, 1]


def test_rows_of_one_run_alone_are_listed(run, model, tmp_path):
    finished_runs.finish(model, tmp_path, task="tiny", methods=({"name": "uniform"}, {"name": "divprune"}))
    compared = compare(run[0], tmp_path)
    assert compared.only == (
        ["tiny: random at 50 %", "tiny: random at 10 %", "tiny: fastv at 50 %"],
        ["tiny: divprune at 50 %", "tiny: divprune at 10 %"],
    )
    assert f"only in {tmp_path}: tiny: divprune at 50 %" in command(run[0], tmp_path).stdout


def test_the_questions_of_the_shorter_run_are_compared(run, model, tmp_path):
    finished_runs.finish(model, tmp_path, task="tiny", limit=6, methods=({"name": "uniform"},))
    compared = compare(run[0], tmp_path)
    for found in compared.pairs:
        assert len(found.first.scores) == len(found.second.scores) == 6
        assert (found.verdict, found.changed) == ("same", 0)
    (line,) = (r for r in run[1] if (r["label"], r["keep_ratio"]) == ("uniform", 0.5))
    records = cell_records(run[0], line["cell"])[:6]
    assert pair(compared, "uniform", 0.5).first.score == pytest.approx(sum(r["score"] for r in records) / 6)
    said = f"tiny: compared on the 6 questions that both runs asked (10 in {run[0]}, 6 in {tmp_path})"
    assert compared.shared == [said]
    result = command(run[0], tmp_path)
    assert result.exit_code == 0 and said in result.stdout


def ask(run, change, asked):
    """Gives the questions of a copied run other fields, the same in all of its cells; asked: index -> fields."""
    for line in (line for line in run[1] if line["status"] == "ok"):
        change(line["label"], line["keep_ratio"], lambda i, r: asked.get(i, {}), line["seed"])


def question(run, index):
    """What is known of one question of a run."""
    record = cell_records(run[0], run[1][0]["cell"])[index]
    return {key: record[key] for key in ("question", "answer", "family", "data")}


def test_questions_in_another_order_are_paired_by_what_is_known_of_them(run, changed):
    folder, change = changed
    ask(run, change, {2: question(run, 4), 4: question(run, 2)})
    places = pair(compare(run[0], folder), "uniform", 0.5).second.places
    assert places == [{2: 4, 4: 2}.get(place, place) for place in range(10)]


def test_other_tasks_uncertain_questions_and_seeds_are_refused(run, changed, model, tmp_path):
    other = tmp_path / "other"
    finished_runs.finish(model, other, task="nasty", limit=5, methods=())
    with pytest.raises(ConfigError, match="different tasks: tiny and nasty"):
        compare(run[0], other)
    result = command(run[0], other)
    assert result.exit_code == 2 and result.stderr.startswith("error: ")
    one = tmp_path / "one"
    finished_runs.finish(model, one, task="tiny", methods=({"name": "random", "seeds": (0,)},))
    with pytest.raises(ConfigError, match=r"random at 50 %: seeds \[0, 1\] in .*, \[0\] in"):
        compare(run[0], one)
    folder, change = changed
    ask(run, change, {3: {"question": "who ?"}})
    with pytest.raises(ConfigError, match=r"example 3 is '.*' .* in .*, 'who \?'"):
        compare(run[0], folder)
    ask(run, change, {3: question(run, 1)})  # which of the two is the same as ours is not certain
    with pytest.raises(ConfigError, match=r"example 3 is '.*' .* in .*, '.*'"):
        compare(run[0], folder)
