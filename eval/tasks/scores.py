# SPDX-License-Identifier: Apache-2.0
"""Scores for own data: how right an answer is, from 0 to 1, given the accepted answers.

Texts are compared without case, outer blanks, repeated blanks and a final full stop, unless a score says otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_lowercase, ascii_uppercase
from typing import Literal

ScoreName = Literal["exact", "contains", "choice", "anls", "relaxed", "number"]

_ANLS_THRESHOLD = 0.5
_RELAXED = 0.05
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?(?:e[-+]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Score:
    """A way to score: the function, and the length of answers that it is for."""

    of: Callable[[str, str], float]
    """(prediction, accepted answer) -> 0..1"""
    max_new_tokens: int
    """default length of answers, in tokens"""


def plain(text: str) -> str:
    """Without case, outer blanks, repeated blanks and a final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text` as whole words; both are `plain`."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text) is not None


def exact(prediction: str, answer: str) -> float:
    """1.0 if the prediction is the answer, else 0.0."""
    return float(plain(prediction) == plain(answer))


def contains(prediction: str, answer: str) -> float:
    """1.0 if the answer stands in the prediction as whole words, else 0.0."""
    return float(has_words(plain(prediction), plain(answer)))


def anls(prediction: str, answer: str) -> float:
    """Normalised Levenshtein similarity, and 0.0 under a half (DocVQA, arXiv 1907.00490)."""
    said, wanted = (" ".join(text.lower().split()) for text in (prediction, answer))
    apart = levenshtein(said, wanted) / max(len(said), len(wanted), 1)
    return 1 - apart if apart < _ANLS_THRESHOLD else 0.0


def relaxed(prediction: str, answer: str) -> float:
    """1.0 for a number within 5 % of the answer, or for the same text without case, else 0.0 (ChartQA).

    As in ChartQA (arXiv 2203.10244) a per cent sign divides by 100, and an answer of 0 is compared as a text.
    """
    said, wanted = _chart_number(prediction), _chart_number(answer)
    if said is not None and wanted:
        return float(abs(said - wanted) / abs(wanted) <= _RELAXED)
    return float(prediction.strip().lower() == answer.strip().lower())


def _chart_number(text: str) -> float | None:
    text = text.strip()
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def last_number(text: str) -> float | None:
    """The last number in a text; commas between thousands are left out, units do not count. None if there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number(tolerance: float) -> Callable[[str, str], float]:
    """The score that is 1.0 if the last number of the prediction differs from the answer by `tolerance` at most."""

    def score(prediction: str, answer: str) -> float:
        said, wanted = last_number(prediction), last_number(answer)
        if said is None or wanted is None:
            return 0.0
        return float(abs(said - wanted) <= tolerance + 1e-9 * abs(wanted))  # 0.1 + 0.2 is 0.3

    return score


def levenshtein(first: str, second: str) -> int:
    """Smallest number of letters to put in, take out or change, to make one text from the other."""
    costs = list(range(len(second) + 1))
    for row, letter in enumerate(first, start=1):
        above, costs[0] = costs[0], row
        for place, other in enumerate(second, start=1):
            above, costs[place] = costs[place], min(costs[place] + 1, costs[place - 1] + 1, above + (letter != other))
    return costs[-1]


SCORES: dict[ScoreName, Score] = {
    "exact": Score(exact, 16),
    "contains": Score(contains, 64),
    "choice": Score(exact, 16),  # of the choice that is `picked`
    "anls": Score(anls, 32),
    "relaxed": Score(relaxed, 16),
    "number": Score(number(0.0), 16),
}


# -- choices ----------------------------------------------------------------------------------------------------------


def lettered(choices: Sequence[str]) -> list[str]:
    """`["A. red", "B. blue"]`"""
    return [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]


def picked(prediction: str, choices: Sequence[str]) -> int | None:
    """Which choice a prediction names, by its letter or its text; None if it names none, or not clearly one.

    In this order: the text alone ("blue"); the letter at the beginning ("B", "(B)", "B. blue", "B: blue"); the letter
    behind "answer", "option" or "choice" ("The answer is B."); the text of a single choice anywhere in the prediction.
    """
    said, texts = plain(prediction), [plain(choice) for choice in choices]
    if said in texts:
        return texts.index(said)
    letters = ascii_lowercase[: len(choices)]
    # An "a" that is followed by a word is an article.
    first = re.match(rf"\(([{letters}])\)|([{letters}])(?:[.:)](?=\s|$)|$)", said)
    if first:
        return letters.index(first[1] or first[2])
    stated = re.findall(rf"(?<!\w)(?:answer|option|choice)(?: is)?:? \(?([{letters}])(?:[).,;:]|$)", said)
    if stated:
        return letters.index(stated[-1])
    named = [place for place, text in enumerate(texts) if has_words(said, text)]
    inside = {place for place in named for other in named if other != place and has_words(texts[other], texts[place])}
    named = [place for place in named if place not in inside]
    return named[0] if len(named) == 1 else None
