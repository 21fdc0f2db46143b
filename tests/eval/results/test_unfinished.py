# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped: what is there is shown, what is missing is said, and nothing on disk changes."""

import finished_runs
import pytest
import tiny_eval
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.pages.report import write_report
from vtprune.eval.results.finished import comparisons
from vtprune.eval.running import evaluator
from vtprune.eval.running.unfinished import unfinished

BATCHES = 2  # of 5 examples each, of every cell


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """The lines of the run that was not stopped."""
    return finished_runs.finish(model, tmp_path_factory.mktemp("finished"), task="tiny")


def stopped(model, folder, batches, limit=None):
    """Runs until so many batches are done, and one more is written but not logged."""
    log, left = evaluator.append, [batches]

    def stops(path, content):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("stopped")
        log(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "append", stops)
        with pytest.raises(RuntimeError, match="stopped"):
            finished_runs.finish(model, folder, task="tiny", limit=limit)
    return folder


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Full, zero and the first of the two seeds of random at 50 % have finished; the second has one batch."""
    return stopped(model, tmp_path_factory.mktemp("stopped"), 3 * BATCHES)


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_rows_that_have_finished_are_as_they_will_be_and_others_have_a_reason(folder, finished):
    before = content(folder)
    (comparison,) = comparisons([folder])
    assert content(folder) == before
    assert [line["cell"] for line in comparison.lines] == [line["cell"] for line in finished]
    for ours, line in zip(comparison.lines, finished, strict=True):
        if line["label"] in ("full", "zero"):
            assert ours | {"config": None} == line | {"config": None}
        else:
            assert (ours["status"], ours["score"], ours["n"]) == ("unfinished", None, 0)
    reasons = {(line["label"], line["keep_ratio"]): line.get("reason") for line in comparison.lines}
    assert reasons["random", 0.5] == "15 of 20 examples are done"
    assert reasons["random", 0.1] == "0 of 20 examples are done"
    assert reasons["uniform", 0.1] == "0 of 10 examples are done"


def test_the_page_and_the_command_say_what_is_missing(folder, tmp_path):
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(folder), "--output", str(page)])
    assert result.exit_code == 0, result.output
    (study,) = unfinished(folder)
    said = "3 of 10 cells are finished; begun: random at 50 %, seed 1 (5 of 10 examples)"
    assert result.stderr.startswith("unfinished: ") and said in result.stderr
    assert str(study) in page.read_text()
    assert "uniform at 50 %, 10 %: unfinished: 0 of 10 examples are done" in page.read_text()


def test_without_the_full_model_nothing_can_be_compared(model, tmp_path):
    stopped(model, tmp_path, 0)
    with pytest.raises(
        ConfigError, match=r"the full model.* not finished: tiny, .*: 0 of 10 cells are finished; begun"
    ):
        comparisons([tmp_path])


def test_a_run_that_goes_on_and_ends_is_finished(model, folder, finished, tmp_path):
    stopped(model, tmp_path, BATCHES)
    assert unfinished(tmp_path)
    lines = finished_runs.finish(model, tmp_path, task="tiny")
    assert unfinished(tmp_path) == []
    (comparison,) = comparisons([tmp_path])
    assert comparison.lines == lines
    assert [line | {"config": None} for line in lines] == [line | {"config": None} for line in finished]


def test_until_another_run_has_its_full_model_the_finished_one_is_shown(model, tmp_path):
    lines = finished_runs.finish(model, tmp_path, task="tiny", limit=5)
    stopped(model, tmp_path, 0)
    (comparison,) = comparisons([tmp_path])
    assert comparison.lines == lines
    assert "0 of 10 cells" in write_report([tmp_path], tmp_path / "report.html")[0]
