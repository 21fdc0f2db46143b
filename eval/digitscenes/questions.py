# SPDX-License-Identifier: Apache-2.0
"""DigitScenes questions: six families, each answered by one word."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from .scenes import COLOURS, Digit

Item = TypeVar("Item")

DIRECTIONS: dict[str, Callable[[Digit], float]] = {
    "leftmost": lambda digit: digit.centre[0],
    "rightmost": lambda digit: -digit.centre[0],
    "topmost": lambda digit: digit.centre[1],
    "bottom": lambda digit: -digit.centre[1],
}
"""Sort key (pixels) under which the digit that a direction names comes first."""

_CLEAR_LEAD = 10  # pixels by which the outermost digit should lead, so that the answer can be seen


@dataclass(frozen=True)
class Question:
    """A question, the one word that answers it, and its family."""

    text: str
    answer: str
    family: str


def pick(rng: np.random.RandomState, items: Sequence[Item]) -> Item:
    """One of them, each as likely as the others."""
    return items[rng.randint(len(items))]


def ask(rng: np.random.RandomState, digits: tuple[Digit, ...], family: str) -> Question:
    """A random question of `family` (a key of `FAMILIES`) about a scene with `digits`."""
    text, answer = FAMILIES[family](rng, digits)
    return Question(text, answer, family)


def _digit(rng, digits):
    chosen = pick(rng, digits)
    return f"what digit is {chosen.colour} ?", str(chosen.value)


def _colour(rng, digits):
    chosen = pick(rng, digits)
    return f"what colour is {chosen.value} ?", chosen.colour


def _presence(rng, digits):
    """Half "yes". Half of the "no" pair a colour and a digit that are both there, but not together (POPE's adversarial
    negatives, arXiv 2305.10355); in the rest one of the two is absent."""
    chosen = pick(rng, digits)
    colour, value = chosen.colour, chosen.value
    answer = "yes" if rng.randint(2) else "no"
    if answer == "no":
        kind = rng.randint(4)
        if kind < 2:
            colour = pick(rng, [other for other in digits if other is not chosen]).colour
        elif kind == 2:
            colour = pick(rng, [name for name in COLOURS if all(name != other.colour for other in digits)])
        else:
            value = pick(rng, [v for v in range(10) if all(v != other.value for other in digits)])
    return f"is there a {colour} {value} ?", answer


def _count(rng, digits):
    return "how many digits are there ?", str(len(digits))


def _position(rng, digits):
    def lead(direction: str) -> float:
        first, second = sorted(map(DIRECTIONS[direction], digits))[:2]
        return min(second - first, _CLEAR_LEAD)

    direction = max(DIRECTIONS, key=lambda name: (lead(name), rng.rand()))
    return f"what digit is {direction} ?", str(min(digits, key=DIRECTIONS[direction]).value)


def _comparison(rng, digits):
    """Compares the values of two digits that are named by their colours."""
    first, second = (digits[i] for i in rng.permutation(len(digits))[:2])
    word, choose = (("larger", max), ("smaller", min))[rng.randint(2)]
    answer = choose(first, second, key=lambda digit: digit.value).colour
    return f"which is {word} {first.colour} or {second.colour} ?", answer


FAMILIES = {
    "digit": _digit,
    "colour": _colour,
    "presence": _presence,
    "count": _count,
    "position": _position,
    "comparison": _comparison,
}
"""The question families, in the order in which `examples` cycles through them."""
