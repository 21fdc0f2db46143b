# SPDX-License-Identifier: Apache-2.0
"""DigitScenes-Video questions: five families, each answered by one word."""

import numpy as np

from .clips import LEAD, TICKS, Actor, third_of
from .questions import Question, pick

THIRDS = ("start", "middle", "end")
"""Names of the thirds of a clip."""


def ask(rng: np.random.RandomState, actors: tuple[Actor, ...], family: str) -> Question | None:
    """A random question of `family` (a key of `VIDEO_FAMILIES`) about a clip with `actors`; None where there is none
    with a clear answer."""
    asked = VIDEO_FAMILIES[family](rng, actors)
    return asked and Question(*asked, family)


def leader(actors: tuple[Actor, ...], word: str) -> Actor | None:
    """The digit that appears "first" or "last", if it is ahead of the others by `LEAD`; what is there from the
    beginning appears with the first frame."""
    outer, next_one = sorted(actors, key=lambda actor: actor.start, reverse=word == "last")[:2]
    return outer if abs(outer.start - next_one.start) >= LEAD else None


def _order(rng, actors):
    clear = [(word, found) for word in ("first", "last") if (found := leader(actors, word))]
    if not clear:
        return None
    word, found = pick(rng, clear)
    return f"what digit appears {word} ?", str(found.value)


def _motion(rng, actors):
    if not (moving := _movers(actors)):
        return None
    chosen = pick(rng, moving)
    return f"what digit moves {chosen.direction} ?", str(chosen.value)


def _mover(rng, actors):
    """The direction is named where two digits move."""
    if not (moving := _movers(actors)):
        return None
    chosen = pick(rng, moving)
    return f"what colour moves {chosen.direction} ?" if len(moving) > 1 else "what colour moves ?", chosen.colour


def _count(rng, actors):
    return "how many digits are there ?", str(len(actors))


def _third(rng, actors):
    short = [(actor, third) for actor in actors if (third := third_of(actor.start, actor.end)) is not None]
    if not short:
        return None
    actor, third = pick(rng, short)
    return f"when is {actor.value} seen ?", THIRDS[third]


def _movers(actors):
    """Those that move; none where one of them is not seen all the time, which makes its way short."""
    moving = [actor for actor in actors if actor.direction]
    return moving if all((actor.start, actor.end) == (0, TICKS) for actor in moving) else []


VIDEO_FAMILIES = {
    "order": _order,
    "motion": _motion,
    "mover": _mover,
    "count": _count,
    "third": _third,
}
"""The question families, in the order in which `video_examples` cycles through them."""
