# SPDX-License-Identifier: Apache-2.0
"""Answers and numbers of settings are those of the library, by click and by code."""

import contextlib
import io

import pytest
import torch
import yaml

import vtprune
from vtprune.demo.code import as_python, as_yaml
from vtprune.demo.comparison import Comparison, Refused, Source
from vtprune.demo.setting import Setting
from vtprune.errors import ConfigError
from vtprune.eval.digitscenes import example
from vtprune.eval.inputs import answers, chat_inputs, load_model

QUESTION = "How many digits are there?"


@pytest.fixture(scope="module")
def comparison():
    return Comparison.open(Source())


@pytest.fixture(scope="module")
def clips():
    return Comparison.open(Source("digitscenes_video"))


@pytest.fixture(scope="module")
def outcome(comparison):
    return comparison.compare(Setting(QUESTION, ("auto", "fastv"), 0.25, example=3))


def test_the_numbers_are_those_of_the_report(outcome):
    model, processor = load_model("digitscenes")
    inputs = chat_inputs(processor, [example(3).image], [QUESTION])
    full, auto, fastv = outcome.answers
    assert full.text == answers(model, processor, inputs, 64)[0][0]
    assert full.kept == tuple(range(144)) and full.numbers.tokens == full.numbers.average == 144
    for answer, method in ((auto, "mmtok"), (fastv, "fastv")):
        with vtprune.prune(model, method, keep_ratio=0.25) as session:
            text = answers(model, processor, inputs, 64)[0][0]
        report, numbers = session.report, answer.numbers
        assert answer.text == text
        assert torch.equal(report.visual[0][list(answer.kept)], report.kept(0))
        assert (numbers.tokens, numbers.prefill_flops, numbers.kv_bytes) == (
            report.final_tokens[0],
            report.prefill_flops,
            report.kv_bytes,
        )
        assert numbers.average == pytest.approx(float(report.counts.sum()) / report.depth)
        assert full.numbers.prefill_flops == report.unpruned_prefill_flops
        assert full.numbers.kv_bytes == report.unpruned_kv_bytes
        assert 0 < numbers.seconds < 60
    assert fastv.numbers.average > fastv.numbers.tokens


def test_clicks_take_tokens_away_and_bring_them_back(comparison, outcome):
    auto, side = outcome.answers[1], outcome.prompt.sheet.size[0] / 12
    gone = auto.kept[5]
    point = (gone % 12 * side + side / 2, gone // 12 * side + side / 2)
    without = comparison.toggle(outcome, 1, *point)
    assert without.answers[:3] == outcome.answers
    assert without.answers[3].kept == without.setting.chosen == tuple(t for t in auto.kept if t != gone)
    assert comparison.toggle(without, 3, *point).answers[3].kept == auto.kept
    again = comparison.compare(Setting.of_query(without.setting.query()))
    assert [a.kept for a in again.answers] == [a.kept for a in without.answers]


def test_a_click_beside_the_picture_says_so(comparison, outcome):
    with pytest.raises(ConfigError, match="no token at this point"):
        comparison.toggle(outcome, 1, 1000, 10)


def test_what_a_method_refuses_is_one_answer_of_several(comparison):
    found = comparison.compare(Setting(QUESTION, ("fastv", "uniform"), 0.03, example=3)).answers
    assert isinstance(found[1], Refused) and "fastv" in found[1].why
    assert found[2].numbers.tokens == 4


def test_tokens_that_are_not_there_are_refused(comparison):
    found = comparison.compare(Setting(QUESTION, (), 0.25, chosen=(3, 144), example=3)).answers
    assert found[1] == Refused("by hand", "token 144 was chosen, and there are 144, counted from 0")


def test_something_must_be_shown_and_fit_the_model(comparison, tmp_path):
    from vtprune.eval.digitscenes import video_example

    setting = Setting(QUESTION, ("auto",), 0.25)
    with pytest.raises(ConfigError, match="upload an image or a clip"):
        comparison.compare(setting)
    with pytest.raises(ConfigError, match="takes image inputs, and this is a video"):
        comparison.compare(setting, video_example(3).video_path(tmp_path))


def test_an_upload_is_what_is_asked_about(comparison, outcome, tmp_path):
    example(3).image.save(tmp_path / "scene.png")
    found = comparison.compare(Setting(QUESTION, ("auto",), 0.25), tmp_path / "scene.png")
    assert [a.kept for a in found.answers] == [a.kept for a in outcome.answers[:2]]
    assert "load_picture(Path('scene.png'))" in as_python(comparison, found, found.answers[1])


def test_a_clip_is_compared_too(clips):
    found = clips.compare(Setting(QUESTION, ("auto",), 0.25, example=3))
    found = clips.toggle(found, 0, 1, 1)
    full, auto, by_hand = found.answers
    assert (len(full.kept), len(auto.kept)) == (193, 49)
    assert by_hand.kept == tuple(range(1, 193))


def test_without_places_there_are_answers_but_no_picture(monkeypatch, outcome):
    from vtprune.demo import comparison as module

    monkeypatch.setattr(module, "view_of", lambda *_: None)
    blind = Comparison.open(Source())
    found = blind.compare(Setting(QUESTION, ("auto",), 0.25, chosen=(1, 2), example=3))
    assert found.prompt.sheet is None
    assert [answer.kept for answer in found.answers[:2]] == [answer.kept for answer in outcome.answers[:2]]
    assert isinstance(found.answers[2], Refused) and "places" in found.answers[2].why
    with pytest.raises(ConfigError, match="no tokens to choose from"):
        blind.toggle(found, 1, 1, 1)


def test_methods_are_those_that_fit(comparison, clips):
    assert comparison.methods()[0] == clips.methods()[0] == "auto"
    assert "visionzip" in comparison.methods() and "vtc_cls" not in clips.methods()


@pytest.mark.parametrize("index", [0, 1, 3])
def test_the_code_gives_the_answer_again(comparison, outcome, index):
    found = comparison.toggle(outcome, 1, 1, 1)
    answer, printed = found.answers[index], io.StringIO()
    scope: dict = {}
    with contextlib.redirect_stdout(printed):
        exec(as_python(comparison, found, answer), scope)
    assert printed.getvalue().splitlines()[0] == answer.text
    if index:
        report = scope["session"].report
        assert torch.equal(report.visual[0][list(answer.kept)], report.kept(0))


def test_the_file_is_the_method(outcome):
    spec = yaml.safe_load(as_yaml(outcome.answers[1]))
    assert vtprune.build_method(spec) == vtprune.build_method("mmtok", keep_ratio=0.25)
