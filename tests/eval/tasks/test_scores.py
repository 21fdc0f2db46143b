# SPDX-License-Identifier: Apache-2.0
"""Scores of own data, by hand: what is right, what is nearly right, and what only looks like it."""

import pytest

from vtprune.eval.tasks.scores import SCORES, anls, last_number, lettered, levenshtein, number, picked

CHOICES = ("red", "blue", "dark blue", "a cat")


@pytest.mark.parametrize(
    ("score", "prediction", "answer", "wanted"),
    [
        ("exact", " Red. ", "red", 1),
        ("exact", "dark  blue", "Dark blue", 1),
        ("exact", "redder", "red", 0),
        ("exact", "3.", "3", 1),
        ("contains", "It is Red, I think.", "red", 1),
        ("contains", "It is redder.", "red", 0),
        ("contains", "There are 10.", "1", 0),
        ("contains", "It costs 3.50 (with tax)", "3.50 (with tax)", 1),
        ("anls", "hello world", "Hello  World", 1),
        ("anls", "hallo", "hello", 0.8),
        ("anls", "ab", "ac", 0),  # half of it is wrong
        ("anls", "", "hello", 0),
        ("relaxed", "105", "100", 1),
        ("relaxed", "105.1", "100", 0),
        ("relaxed", "-10", "10", 0),
        ("relaxed", "52%", "0.5", 1),
        ("relaxed", "0.0", "0", 0),  # as in ChartQA: an answer of 0 is a text
        ("relaxed", "Japan ", "japan", 1),
        ("relaxed", "about 100", "100", 0),
        ("number", "The answer is 42.", "42", 1),
        ("number", "1,234 people", "1234.0", 1),
        ("number", "12 of 30", "12", 0),
        ("number", "none", "0", 0),
        ("number", "0.30000000000000004", "0.3", 1),
    ],
)
def test_scores(score, prediction, answer, wanted):
    assert SCORES[score].of(prediction, answer) == pytest.approx(wanted)


def test_numbers_within_a_tolerance():
    assert [number(0.5)(said, "10") for said in ("10.5", "9.5", "10.51", "ten")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("from -3 to 5", 5),
        ("it is -3", -3),
        ("2020-2021", 2021),
        ("$1,234,567.5", 1234567.5),
        (".5", 0.5),
        ("1e3", 1000),
        ("50%", 50),
        ("word7", None),
        ("", None),
    ],
)
def test_the_last_number(text, wanted):
    assert last_number(text) == wanted


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("blue", 1),
        ("Dark blue.", 2),
        ("B", 1),
        ("b.", 1),
        ("(C)", 2),
        ("C) dark blue", 2),
        ("A: red", 0),
        ("The answer is B.", 1),
        ("Answer: (C)", 2),
        ("the right option is d", 3),
        ("It is a red thing.", 0),
        ("A red thing", 0),  # not for its article
        ("A cat", 3),
        ("It is dark blue", 2),  # which has "blue" in it
        ("red or blue", None),
        ("The answer is a dog", None),
        ("E", None),
        ("", None),
    ],
)
def test_what_choice_a_prediction_names(prediction, wanted):
    assert picked(prediction, CHOICES) == wanted


def test_letters_of_choices():
    assert lettered(CHOICES) == ["A. red", "B. blue", "C. dark blue", "D. a cat"]


def test_levenshtein():
    pairs = [("", "abc"), ("kitten", "sitting"), ("flaw", "lawn"), ("same", "same")]
    assert [levenshtein(*pair) for pair in pairs] == [3, 3, 2, 0]
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
