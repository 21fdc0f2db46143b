# SPDX-License-Identifier: Apache-2.0
"""The budgets that a race tries, and how a candidate finds its place among them."""

from __future__ import annotations

from collections.abc import Callable

LADDER = tuple(round(2 ** (-step / 8), 4) for step in range(1, 49))
"""Budgets, from the richest to the cheapest; each has 8 % fewer tokens than the one before."""

_STRIDE = 2
"""Places of one step of a walk. Only the last step of the final is a single place."""


def bisect(meets: Callable[[int], bool]) -> int:
    """The cheapest place of the ladder that meets, if richer ones meet whatever a cheaper one meets; -1 if none."""
    low, high = 0, len(LADDER) - 1
    while low <= high:
        middle = (low + high) // 2
        if meets(middle):
            low = middle + 1
        else:
            high = middle - 1
    return high


def walk(meets: Callable[[int], bool], start: int, floor: int = -1) -> int:
    """The same, found step by step from `start`: cheaper as long as that meets, else richer until one does.

    floor: where to give up and stay.
    """
    place = max(start, 0)
    if meets(place):
        while place + _STRIDE < len(LADDER) and meets(place + _STRIDE):
            place += _STRIDE
        return place
    while place - _STRIDE > floor:
        place -= _STRIDE
        if meets(place):
            return place
    return floor
