# SPDX-License-Identifier: Apache-2.0
"""The page of `vtprune report`: what it says, that it needs nothing else, and that nothing it quotes can act."""

import html.parser
import json
import re
import shutil
from dataclasses import replace

import finished_runs
import pytest
import tiny_eval
from typer.testing import CliRunner

from vtprune.cli import app
from vtprune.errors import ConfigError
from vtprune.eval.pages.report import said, write_report
from vtprune.eval.pages.tables import ranking, verdict
from vtprune.eval.results.finished import comparisons
from vtprune.eval.results.formatting import percent
from vtprune.eval.results.records import to_line
from vtprune.eval.results.statistics import Difference, corrected, difference
from vtprune.eval.tasks import TASKS, Task

SHOUT = '<b onclick="x()">shout</b>'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_eval.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    """A finished run, in which the full model answers the first question right and `uniform` shouts; its lines."""
    folder = tmp_path_factory.mktemp("run")
    lines = finished_runs.finish(model, folder)
    finished_runs.rewrite(folder, cell(lines, "full"), lambda i, r: {"score": 1.0} if i == 0 else {})
    shout = {"score": 0.0, "prediction": SHOUT}
    finished_runs.rewrite(folder, cell(lines, "uniform", 0.5), lambda i, r: shout if i == 0 else {})
    return folder, lines


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_report([run[0]], path)
    return path.read_text()


def cell(lines, label, ratio=None):
    return next(line["cell"] for line in lines if line["label"] == label and ratio in (None, line["keep_ratio"]))


class Parsed(html.parser.HTMLParser):
    """Tags, attributes and text of a page as a parser sees them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.words = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.words.append(data)


def test_rows_numbers_and_provenance_are_there(run, page):
    _, lines = run
    words = Parsed(page).words
    for line in lines:
        assert line["label"] in words
        if line["status"] == "ok" and line["seed"] is None:
            low, high = line["ci"]
            assert f"{percent(line['score'])} [{percent(low)}, {percent(high)}]" in words
    for value in lines[0]["versions"].values():
        assert value in words
    assert "under its floor (12.5%)" in words
    assert "0, 1" in words  # seeds of random
    assert any(json.dumps(lines[0]["config"], indent=2) == text for text in words)


def test_what_was_kept_is_drawn_from_the_records(run, page):
    _, lines = run
    kept = [line for line in lines if line["label"] in ("random", "uniform", "fastv") and line["status"] == "ok"]
    rows = {(line["label"], line["keep_ratio"]) for line in kept}
    drawn = re.findall(r'aria-label="(\S+) at ([\d.]+) %: (\d+) of 16 tokens kept"><use[^>]*/>(<path[^>]*>)', page)
    assert len(drawn) == 4 * len(rows)  # four examples
    for label, budget, count, path in drawn:
        # the tiny image is 56 x 56 pixels of 4 x 4 patches; a run of dropped patches is one rectangle
        dark = sum(float(width) / 14 for width in re.findall(r"h(\d[\d.]*)v14h", path))
        assert int(count) == 16 - dark == {"50": 8, "10": 2}.get(budget) or label == "fastv"


def test_disagreements_are_quoted_with_pictures(page):
    cards = re.findall(r'<div class="card">(.*?)</div>\s*</div>', page, re.DOTALL)
    (shouted,) = {card for card in cards if "shout" in card}
    assert '<use href="#picture-' in shouted
    assert "&lt;script&gt;" in shouted and "&lt;b onclick=" in shouted


def test_nothing_that_is_quoted_can_act(page):
    parsed = Parsed(page)
    assert not {"script", "img", "iframe", "object", "form", "b onclick"} & set(parsed.tags)
    assert parsed.tags.count("style") == 1
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    for text in (finished_runs.QUESTION, finished_runs.ANSWER, finished_runs.FAMILY, SHOUT):
        assert text in parsed.words
    assert "\u202e" not in page and "tfel⟨U+202E⟩right {{ 7 * 7 }}" in parsed.words
    assert finished_runs.LONG not in page  # cut


def test_text_is_quoted_whole_up_to_a_length_and_signs_that_act_are_named():
    assert said("déjà vu 日本 👩‍🔬\nשלום") == "déjà vu 日本 👩‍🔬\nשלום"
    assert said("a\x00b\u2066c\ud800d") == "a⟨U+0000⟩b⟨U+2066⟩c⟨U+D800⟩d"
    assert said("x" * 401) == "x" * 400 + "…"


def test_the_page_refers_to_itself_alone_and_is_the_same_each_time(run, page, tmp_path):
    parsed = Parsed(page)
    targets = [value for name, value in parsed.attributes if name in ("href", "src", "xlink:href", "srcset", "data")]
    assert targets and all(value.startswith(("#", "data:")) for value in targets)
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in targets if value.startswith("#")} <= set(ids)
    assert set(re.findall(r"url\((.)", page)) == {"#"} and "@import" not in page
    assert "default-src 'none'" in page
    write_report([run[0]], tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_ranking_is_paired_with_the_next_row_and_with_random(run):
    (comparison,) = comparisons([run[0]])
    standings = ranking(comparison, 0.5)
    scores = [standing.row.entry.mean("score") for standing in standings]
    assert scores == sorted(scores, reverse=True)
    assert {standing.row.label for standing in standings} == {"full", "zero", "random", "uniform", "fastv"}
    means = {standing.row.label: 100 * comparison.scores(standing.row.entry).mean() for standing in standings}
    for standing, below in zip(standings, standings[1:], strict=False):
        label = standing.row.label
        assert points(standing.below) == pytest.approx(means[label] - means[below.row.label], abs=0.051)
        if standing.random is not None:
            assert points(standing.random) == pytest.approx(means[label] - means["random"], abs=0.051)
    assert standings[-1].below is None
    random = next(standing for standing in standings if standing.row.label == "random")
    assert "±" in random.accuracy and "±" in random.retention and random.random is None


def test_what_a_paper_reports_stands_beside_ours(run, tmp_path):
    folder = tmp_path / "preset"
    shutil.copytree(run[0], folder)
    given = {"metric": "retention", "value": 0.5, "benchmarks": "nine", "source": "<i>A paper", "table": "Table 2"}
    lines = [line | {"published": given if line["label"] == "fastv" else None} for line in run[1]]
    (folder / "results.jsonl").write_bytes(b"".join(map(to_line, lines)))
    write_report([folder], tmp_path / "report.html")
    (fastv,) = (line for line in lines if line["label"] == "fastv" and line["status"] == "ok")
    ours = f"{100 * (fastv['retention'] - 0.5):+.1f}"
    words = Parsed((tmp_path / "report.html").read_text()).words
    assert f"50.0 (retention, ours {ours}; nine; <i>A paper, Table 2)" in words


def points(found):
    return float(found.text.split()[0].replace("−", "-"))


@pytest.mark.parametrize(
    ("interval", "p", "sign", "text"),
    [
        ([0.01, 0.05], 0.04, "better", "+3.0 [+1.0, +5.0]"),
        ([-0.05, -0.01], 0.04, "worse", "−3.0 [−5.0, −1.0]"),
        ([0.0, 0.06], 0.06, "open", "+3.0 [0.0, +6.0]"),
        ([0.01, 0.05], 0.06, "open", "+3.0 [+1.0, +5.0]"),  # significant alone, not among so many
    ],
)
def test_a_difference_counts_when_its_p_does(interval, p, sign, text):
    found = verdict(Difference(sum(interval) / 2, interval, p))
    assert (found.sign, found.text, found.p) == (sign, text, f"p = {p:.3f}")


def test_p_is_corrected_for_all_of_a_column(run):
    (comparison,) = comparisons([run[0]])
    standings = ranking(comparison, 0.5)
    scores = [comparison.scores(standing.row.entry) for standing in standings]
    alone = [difference(some, others) for some, others in zip(scores, scores[1:], strict=False)]
    shown = [standing.below for standing in standings[:-1]]
    assert shown == [verdict(found) for found in corrected(alone)] != [verdict(found) for found in alone]
    labels = [standing.row.label for standing in standings]
    methods = [label in ("uniform", "fastv") for label in labels]
    alone = [difference(s, scores[labels.index("random")]) for s, method in zip(scores, methods, strict=True) if method]
    shown = [standing.random for standing, method in zip(standings, methods, strict=True) if method]
    assert shown == [verdict(found) for found in corrected(alone)]


def test_two_folders_of_one_comparison_share_a_section(run, model, tmp_path):
    folder, lines = run
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    finished_runs.rewrite(again, cell(lines, "uniform", 0.1), lambda i, r: {"prediction": f"other {i}"})
    (comparison,) = comparisons([folder, again])
    labels = [line["label"] for line in comparison.lines]
    assert labels == [line["label"] for line in lines] + ["uniform · again"]
    finished_runs.rewrite(again, cell(lines, "full"), lambda i, r: {"prediction": f"other {i}"})
    assert len(comparisons([folder, again])) == 2  # another full model: nothing can be compared
    write_report([folder, again], tmp_path / "both.html")
    assert (tmp_path / "both.html").read_text().count("<section") == 2


def test_without_the_task_or_the_pictures_the_rest_is_shown(run, tmp_path, monkeypatch):
    folder = tmp_path / "moved"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("views", "timings.jsonl"))
    monkeypatch.delitem(TASKS, "nasty")
    write_report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Without pictures: the examples of nasty cannot be loaded here (expected the name of a task" in page
    assert "The results hold no pictures" in page and "<image" not in page
    assert "uniform" in page


def test_a_picture_that_cannot_be_read_is_left_out(run, tmp_path, monkeypatch):
    class Gone:
        def convert(self, mode):
            raise OSError("truncated")

    def examples(limit):
        first, *rest = finished_runs.nasty_examples(limit)
        return [replace(first, image=Gone()), *rest]

    monkeypatch.setitem(TASKS, "nasty", lambda: Task(examples, tiny_eval.score, max_new_tokens=3))
    write_report([run[0]], tmp_path / "report.html")
    cards = re.findall(r'<div class="card">(.*?)</div>\s*</div>', (tmp_path / "report.html").read_text(), re.DOTALL)
    assert {"&lt;script&gt;" in card for card in cards if "<use" not in card} == {True}
    assert any("<use" in card for card in cards)


def test_the_command_writes_the_page_into_the_folder(run):
    result = CliRunner().invoke(app, ["report", str(run[0])])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(run[0] / "report.html")
    assert (run[0] / "report.html").read_text().startswith("<!doctype html>")


def test_folders_that_hold_no_results_are_refused(run, tmp_path):
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "no results.jsonl here" in result.stderr
    folder, lines = run
    shutil.copy(folder / "results.jsonl", tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "results.jsonl").write_bytes(to_line({"method": "full"}))
    with pytest.raises(ConfigError, match="not of this version"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "results.jsonl").write_text("{torn")
    with pytest.raises(ConfigError, match="is not JSON"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
