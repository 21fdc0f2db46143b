# SPDX-License-Identifier: Apache-2.0
"""Gain over the smaller image, score on hard questions and loyalty, by hand."""

import numpy as np
import pytest

from vtprune.eval.results.entries import Entry
from vtprune.eval.results.evidence import FIELDS, Answers, add_evidence
from vtprune.eval.results.formatting import gain, hard, short_gain, tokens_per_correct
from vtprune.eval.results.statistics import mean_interval

FULL = [1, 1, 1, 1, 1, 0, 0, 1]
HALF = [1, 0, 1, 0, 1, 0, 1, 1]  # the smaller image of 50 tokens
FIFTH = [0, 0, 1, 0, 0, 0, 0, 1]  # of 20
ROW = [1, 1, 0, 1, 1, 0, 0, 1]
MEASURED = [("full", 100, FULL), ("downsample", 50, HALF), ("downsample", 20, FIFTH)]


def found(tokens, scores=ROW, measured=MEASURED, method="fastv", predictions=None):
    """The fields of a row with so many tokens."""
    cells = [*measured, (method, tokens, scores)]
    lines = [
        {"cell": str(place), "method": name, "status": "ok", "average_tokens": count, "score": np.mean(own)}
        for place, (name, count, own) in enumerate(cells)
    ]
    answers = {
        str(place): Answers(np.array(own, dtype=float), predictions or list(map(str, own)), {})
        for place, (_, _, own) in enumerate(cells)
    }
    answers["0"] = Answers(answers["0"].scores, list(map(str, measured[0][2])), {})
    return add_evidence(lines, answers)[-1]


@pytest.mark.parametrize(("tokens", "other"), [(50, HALF), (50.9, HALF), (49.1, HALF), (20, FIFTH), (19.7, FIFTH)])
def test_with_as_many_tokens_the_gain_is_paired(tokens, other):
    line = found(tokens)
    gaps = [a - b for a, b in zip(ROW, other, strict=True)]
    assert (line["gain"], line["gain_ci"]) == mean_interval(gaps)
    assert line["gain"] == pytest.approx(np.mean(ROW) - np.mean(other))


def test_between_two_smaller_images_their_scores_are_interpolated_by_tokens():
    line = found(30)
    assert line["gain"] == pytest.approx(5 / 8 - (2 / 3 * 2 / 8 + 1 / 3 * 5 / 8))
    assert line["gain_ci"] is None
    entry = Entry((line,))
    assert short_gain(entry) == gain(entry) == "≈ +25.0"


@pytest.mark.parametrize("tokens", [0, 18, 52, 100])
def test_outside_of_what_was_measured_there_is_no_gain(tokens):
    line = found(tokens)
    assert line["gain"] is line["gain_ci"] is None
    assert line["hard_score"] is not None


def test_hard_questions_are_those_that_only_the_full_model_gets_right():
    few, many = found(30), found(40)
    assert (few["hard_score"], few["hard_examples"]) == (1.0, 4)  # 0, 1, 3, 4: not 5 and 6, which nobody gets right
    assert (many["hard_score"], many["hard_examples"]) == (1.0, 2)  # 1, 3
    assert found(30, [0, 1, 1, 0, 0, 1, 1, 1])["hard_score"] == 0.25
    half = found(30, [0.5, 0.25, 1, 0, 0, 1, 1, 1])
    assert half["hard_score"] == 0.75 / 4  # scores count as they are
    assert hard(Entry((half,))) == "18.8 (of 4)"
    easy = [("full", 100, FULL), ("downsample", 50, FULL)]
    assert (found(50, measured=easy)["hard_score"], found(50, measured=easy)["hard_examples"]) == (None, 0)


def test_an_answer_is_right_from_half_a_point_on():
    graded = [("full", 100, [0.5, 0.4, 1.0]), ("downsample", 50, [0.4, 0.0, 0.5])]
    assert found(50, [1, 1, 1], graded)["hard_examples"] == 1


def test_loyalty_compares_answers_and_not_scores():
    same = [*map(str, FULL[:-2]), "else", "else"]
    assert found(30, predictions=same)["loyalty"] == 6 / 8
    assert found(30, FULL)["loyalty"] == 1.0


def test_the_full_model_and_smaller_images_are_not_compared_with_themselves():
    for method in ("full", "downsample"):
        line = found(50, method=method)
        assert [line[field] for field in FIELDS] == [None, None, None, None, 7 / 8]
    alone = found(50, measured=MEASURED[:1])
    assert [alone[field] for field in FIELDS] == [None, None, None, None, 7 / 8]


def test_rows_without_numbers_have_the_fields_too():
    lines = [
        {"cell": "0", "method": "full", "status": "ok", "average_tokens": 100},
        {"cell": "1", "method": "fastv", "status": "unsupported", "average_tokens": None},
    ]
    answers = {"0": Answers(np.array(FULL, dtype=float), list(map(str, FULL)), {})}
    assert [add_evidence(lines, answers)[1][field] for field in FIELDS] == [None] * 5


def test_tokens_per_right_answer():
    assert tokens_per_correct(Entry(({"average_tokens": 30, "score": 0.625},))) == "48.0"
    assert tokens_per_correct(Entry(({"average_tokens": 30, "score": 0.0},))) == "–"
