# SPDX-License-Identifier: Apache-2.0
"""DigitScenes clips: handwritten digits that appear, vanish and move, drawn at any number of frames.

All of it is integer arithmetic from `numpy.random.RandomState`, as in `scenes`: a seed gives the same pixels
everywhere.
"""

from dataclasses import dataclass

import numpy as np

from .scenes import COLOURS, INK, background, digit_images, digit_ink, paint

FRAME_SIZE = 112
"""Height and width of a frame in pixels."""

TICKS = 48
"""A clip lasts so many ticks, whatever its number of frames."""

LEAD = 10
"""Ticks that a digit is seen at least, and by which the first or last to appear leads: of twelve frames sampled
uniformly two fall into it."""

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Steps in x and y."""

_MIN_FRAMES, _MAX_FRAMES = 24, 48
_MIN_DIGITS, _MAX_DIGITS = 2, 5
_MIN_SIZE, _MAX_SIZE = 28, 32  # pixels
_MIN_TRAVEL = 50  # pixels
_GAP = 3  # pixels between the boxes of two digits that are seen together
_LATEST = TICKS - LEAD - 2  # start after which not every sampling sees a digit twice


@dataclass(frozen=True)
class Actor:
    """One digit of a clip.

    value, colour, size, image: as `scenes.Digit`. x, y: left and top of its box at tick 0, in pixels. dx, dy: how far
    it goes during the whole clip, at uniform speed. It is seen from tick `start` to before tick `end`.
    """

    value: int
    colour: str
    size: int
    image: int
    x: int
    y: int
    dx: int
    dy: int
    start: int
    end: int

    @property
    def direction(self) -> str | None:
        """Where it moves, a key of `DIRECTIONS`; None if it stays."""
        step = int(np.sign(self.dx)), int(np.sign(self.dy))
        return next((name for name, unit in DIRECTIONS.items() if unit == step), None)

    def box(self, frame: int, frames: int) -> tuple[slice, slice] | None:
        """Rows and columns it covers in frame `frame` of `frames`; None while it is not seen."""
        if not self.start * frames <= frame * TICKS < self.end * frames:
            return None
        x, y = self.x + self.dx * frame // frames, self.y + self.dy * frame // frames
        return slice(y, y + self.size), slice(x, x + self.size)


@dataclass(frozen=True)
class Clip:
    """A clip of `count` frames: its background, uint8 (FRAME_SIZE, FRAME_SIZE, 3), and 2 to 5 digits, no value and no
    colour twice, with their ink, int32 (size, size)."""

    background: np.ndarray
    actors: tuple[Actor, ...]
    inks: tuple[np.ndarray, ...]
    count: int

    def frames(self, count: int | None = None) -> np.ndarray:
        """The clip in `count` (default its own) frames, uint8 (count, FRAME_SIZE, FRAME_SIZE, 3)."""
        count = count or self.count
        frames = np.repeat(self.background[None], count, 0)
        for actor, ink in zip(self.actors, self.inks, strict=True):
            for number, frame in enumerate(frames):
                if box := actor.box(number, count):
                    paint(frame[box], ink, actor.colour)
        return frames

    def masks(self, count: int | None = None) -> np.ndarray:
        """uint8 (count, FRAME_SIZE, FRAME_SIZE): `i + 1` on the ink of `actors[i]`, 0 elsewhere."""
        count = count or self.count
        masks = np.zeros((count, FRAME_SIZE, FRAME_SIZE), np.uint8)
        for i, (actor, ink) in enumerate(zip(self.actors, self.inks, strict=True)):
            for number, mask in enumerate(masks):
                if box := actor.box(number, count):
                    mask[box][ink >= INK] = i + 1
        return masks


def draw_clip(rng: np.random.RandomState, split: str, family: str) -> Clip:
    """Draws a random clip with digit images of `split`, about which a question of `family` can be asked.

    "order": 3 to 5 digits, one of which appears clearly before or clearly after the others. "third": one digit is seen
    in one third of the clip only. "motion" and "mover": one or two digits move, in different directions.
    """
    count = rng.randint(3 if family == "order" else _MIN_DIGITS, _MAX_DIGITS + 1)
    movers = rng.randint(1 if family in ("motion", "mover") else 0, 3)
    movers = min(movers, count - 1)
    paths = None
    while paths is None:
        seen = _appearances(rng, family, count, movers)
        directions = [DIRECTIONS[list(DIRECTIONS)[i]] for i in rng.permutation(4)[:movers]]
        paths = _place(rng, seen, directions + [(0, 0)] * (count - movers))
    values = rng.permutation(10)[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    actors, inks = [], []
    for value, colour, (x, y, dx, dy, size), (start, end) in zip(values, colours, paths, seen, strict=True):
        images = digit_images(split)[value]
        image = rng.randint(len(images))
        inks.append(digit_ink(images[image], size))
        numbers = map(int, (x, y, dx, dy, start, end))
        actors.append(Actor(int(value), list(COLOURS)[colour], int(size), int(image), *numbers))
    order = rng.permutation(count)  # so that nothing follows from an actor's place in the list
    return Clip(
        background(rng, FRAME_SIZE, strokes=(1, 5)),
        tuple(actors[i] for i in order),
        tuple(inks[i] for i in order),
        int(rng.randint(_MIN_FRAMES, _MAX_FRAMES + 1)),
    )


def third_of(start: int, end: int) -> int | None:
    """In which third of the clip, 0 to 2, alone a digit is seen that is seen from tick `start` to before `end`."""
    first, last = start * 3 // TICKS, (end - 1) * 3 // TICKS
    return first if first == last else None


def _appearances(rng, family: str, count: int, movers: int) -> list[tuple[int, int]]:
    """Start and end of each digit; those that move, which come first, are seen all the time, but for "order"."""
    if family == "order":
        return _ordered(rng, count)
    seen = [(0, TICKS)] * movers
    while len(seen) < count:
        appearance = _appearance(rng)
        if family != "third" or third_of(*appearance) is None:  # by chance it would mostly be the first third
            seen.append(appearance)
    if family == "third":
        seen[-1] = _within_third(rng)
    return seen


def _appearance(rng) -> tuple[int, int]:
    """Start and end: the whole clip, or appearing, or vanishing, or both."""
    start = rng.randint(1, _LATEST + 1) if rng.randint(2) else 0
    return start, _end(rng, start)


def _end(rng, start: int) -> int:
    return rng.randint(start + LEAD, TICKS) if rng.randint(2) else TICKS


def _within_third(rng) -> tuple[int, int]:
    third = TICKS // 3
    first = third * rng.randint(3)
    start = rng.randint(first, min(first + third - LEAD, _LATEST) + 1)
    return start, rng.randint(start + LEAD, first + third + 1)


def _ordered(rng, count: int) -> list[tuple[int, int]]:
    """One start is `LEAD` before all others, or after them."""
    if rng.randint(2):
        outer = rng.randint(0, LEAD + 1)
        starts = [outer, *rng.randint(outer + LEAD, _LATEST + 1, count - 1)]
    else:
        outer = rng.randint(2 * LEAD, _LATEST + 1)
        starts = [outer, *rng.randint(0, outer - LEAD + 1, count - 1)]
    return [(start, _end(rng, start)) for start in rng.permutation(starts)]


def _place(rng, seen, steps) -> list[tuple[int, int, int, int, int]] | None:
    """x, y, dx, dy and size of digits that never touch one another; None if that was not found.

    seen: start and end of each. steps: the direction of each, (0, 0) for one that stays.
    """
    ticks = np.arange(TICKS + 1)
    paths, tracks = [], []
    for (start, end), (step_x, step_y) in zip(seen, steps, strict=True):
        for _ in range(60):
            size = rng.randint(_MIN_SIZE, _MAX_SIZE + 1)
            room = FRAME_SIZE - size
            travel = rng.randint(_MIN_TRAVEL, room + 1)
            dx, dy = step_x * travel, step_y * travel
            x, y = (rng.randint(max(0, -d), room - max(0, d) + 1) for d in (dx, dy))
            track = np.stack([x + dx * ticks // TICKS, y + dy * ticks // TICKS], 1)
            for other, other_size, other_start, other_end in tracks:
                together = slice(max(start, other_start), max(min(end, other_end), max(start, other_start)))
                apart = track[together] - other[together]
                if ((apart < other_size + _GAP) & (apart > -size - _GAP)).all(1).any():
                    break
            else:
                paths.append((x, y, dx, dy, size))
                tracks.append((track, size, start, end))
                break
        else:
            return None
    return paths
